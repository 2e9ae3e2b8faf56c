"""What the commands that make training data are given: corpora, curation, encoding."""

from dataclasses import dataclass
from typing import Literal

from goku_mega.config.checks import part_of, require, require_at_least


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """`goku-mega corpus shapes`: write captioned clips and images of moving shapes."""

    output: str
    videos: int = 2000
    images: int = 600
    seed: int = 0
    level: Literal["one", "two", "mixed"] = "one"
    """one: one object on a plain ground; two: two objects, positions, textured grounds; mixed: half and half."""
    height: int = 64
    """Height of most clips, px."""
    width: int = 64
    """Width of most clips, px."""
    frames: int = 9
    """Length of most clips; frames - 1 is a multiple of 4."""
    varied_fraction: float = 0.15
    """Share of clips with another size, aspect ratio or length."""
    workers: int = 2

    def __post_init__(self) -> None:
        require_at_least(0, self, "videos", "images")
        require_at_least(1, self, "workers")
        require(0 <= self.varied_fraction <= 1, f"varied_fraction is {self.varied_fraction}; use a value from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """`goku-mega encode`: a corpus to latents and text embeddings in tar shards."""

    corpus: str = ""
    """Folder with captions.jsonl; `verify` needs none."""
    output: str
    vae: str = "tiny"
    """`tiny`: the VAE that ships with the package; else a local folder or a hub name."""
    text: str = "tiny"
    """`tiny`: a small T5 with a sentencepiece model trained on the captions; else a folder or a hub name."""
    samples_per_shard: int = 256
    max_frames: int = 241
    """Longer videos are cut to this many frames; lengths are cut to 4n + 1."""
    workers: int = 0
    """Processes that encode, each with both encoders; 0: one for each GPU, two without."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs where there are some."""
    slice: str = "0/1"
    """Part of the shards that this command makes, as `number/parts`, for the tasks of a SLURM array that share the
    output; the command that finds all of them made writes the index."""
    text_devices: Literal["auto", "one", "all"] = "auto"
    """one: each worker has the text encoder on its device; all: it is spread over all GPUs and encodes the captions
    before the workers begin; auto: all where it would take more than half of a GPU's memory."""
    text_cache: str = ""
    """Folder in which embeddings of captions are kept from run to run; empty: in the output, until it is whole."""
    text_cache_gib: float = 4.0
    """Embeddings beyond this are not kept; with text_devices=all, all are."""
    verify: bool = False
    """Encode nothing: read every byte of the output, and say which shards are damaged."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "samples_per_shard", "max_frames")
        require_at_least(0, self, "workers", "text_cache_gib")
        require(bool(self.corpus) or self.verify, "corpus is missing; give the folder with captions.jsonl, or --verify")
        part_of(self.slice)

    @property
    def part(self) -> tuple[int, int]:
        """(number, parts) of `slice`."""
        return part_of(self.slice)


@dataclass(frozen=True, kw_only=True)
class DataStatsConfig:
    """`goku-mega data stats`: what a data set holds, from its index alone."""

    path: str
    """What `goku-mega encode` wrote: a folder, or an fsspec URL."""
    size: str = "tiny"
    """A name in `model.sizes`, of the model whose tokens and FLOPs are counted."""
    fps: float = 0.0
    """Frames a second of the videos, for their hours, which the index does not know; 0: no hours."""
    shapes: int = 20
    """Rows of the table of shapes, the most frequent first; the others are one row."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "fps")
        require_at_least(1, self, "shapes")


@dataclass(frozen=True, kw_only=True)
class DataShowConfig:
    """`goku-mega data show`: samples of a data set, decoded again, with their captions."""

    path: str
    """What `goku-mega encode` wrote: a folder, or an fsspec URL."""
    output: str
    """The PNG to write: a row a sample."""
    samples: int = 16
    """Samples drawn at random."""
    seed: int = 0
    keys: str = ""
    """Names of the samples to show instead of random ones, with commas between them."""
    frames: int = 9
    """Most frames of a sample: the first, the last and those evenly between them."""
    height: int = 128
    """Greatest height of a frame on the sheet, px; larger ones are made smaller."""
    threads: int = 2
    """CPU threads to decode with."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "samples", "frames", "height", "threads")
