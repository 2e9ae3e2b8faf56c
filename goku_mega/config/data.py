"""What the commands that make training data are given: corpora, curation, encoding."""

from dataclasses import dataclass
from typing import Literal

from goku_mega.config.checks import require, require_at_least


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

    corpus: str
    output: str
    vae: str = "tiny"
    """`tiny`: the VAE that ships with the package; else a local folder or a hub name."""
    text: str = "tiny"
    """`tiny`: a small T5 with a sentencepiece model trained on the captions; else a folder or a hub name."""
    samples_per_shard: int = 256
    max_frames: int = 241
    """Longer videos are cut to this many frames; lengths are cut to 4n + 1."""
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "samples_per_shard", "max_frames", "workers")
