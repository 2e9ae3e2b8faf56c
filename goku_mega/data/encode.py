"""A corpus to latents and text embeddings in shards; killed at any moment and run again, the same bytes.

A shard is the unit of work and of resuming: which rows of captions.jsonl it holds is fixed, and it
exists only once it is whole. Files that cannot be decoded are skipped and listed.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.config import EncodeConfig
from goku_mega.data.shards import DATASET, INDEX, NULL_TEXT, EncodedSample, IndexRow, write_index, write_shard
from goku_mega.encoders.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, content_key
from goku_mega.errors import DataError, MediaError
from goku_mega.media.decode import decode_media

if TYPE_CHECKING:
    from goku_mega.encoders.text import TextEncoder
    from goku_mega.encoders.vae import VideoVae

logger = logging.getLogger(__name__)

TEXT_ENCODER = "text_encoder"
SKIPPED = "skipped.jsonl"
PARTS = "parts"


@dataclass(frozen=True)
class _ShardTask:
    """What a worker needs to make one shard."""

    number: int
    rows: tuple[dict[str, Any], ...]
    corpus: Path
    output: Path
    vae: str
    text: str
    max_frames: int

    @property
    def shard(self) -> Path:
        return self.output / "shards" / f"{self.number:05d}.tar"

    @property
    def part(self) -> Path:
        """The shard's index rows and skipped files, written after it: with this file it is done."""
        return self.output / PARTS / f"{self.number:05d}.json"


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Encode every readable file of the corpus into `config.output`.

    Raises:
        DataError: the corpus is missing or wholly unreadable, or the output holds another data set.
    """
    began = time.monotonic()
    corpus, output = Path(config.corpus), Path(config.output)
    rows = read_captions(corpus)
    _claim(output, config, rows)
    if not (output / DATASET).exists():
        text = _prepare_text(config, output, rows)
        tasks = [
            _ShardTask(number, tuple(rows[start : start + config.samples_per_shard]), corpus, output, config.vae, text,
                       config.max_frames)
            for number, start in enumerate(range(0, len(rows), config.samples_per_shard))
        ]  # fmt: skip
        _run([task for task in tasks if not task.part.exists()], len(tasks), config.workers)
        _finish(config, output, tasks)
    dataset = json.loads((output / DATASET).read_text())
    seconds = time.monotonic() - began
    counts = {"samples": dataset["samples"], "skipped": dataset["skipped"]}
    return {"output": str(output), **counts, "seconds": round(seconds, 1)}


def read_captions(corpus: Path) -> list[dict[str, Any]]:
    """The rows of captions.jsonl by key.

    Raises:
        DataError: the file is missing, or a row lacks `key`, `file` or `caption`.
    """
    path = corpus / "captions.jsonl"
    if not path.exists():
        raise DataError(f"{path} is missing; write a corpus with `goku-mega corpus shapes --output {corpus}`")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("key", "file", "caption")})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number}: {error}; each line needs key, file and caption") from error
    if not rows:
        raise DataError(f"{path} is empty; write the corpus again")
    return sorted(rows, key=lambda row: row["key"])


def _claim(output: Path, config: EncodeConfig, rows: list[dict[str, Any]]) -> None:
    """Mark the folder with what is made in it; refuse a folder in which something else was begun."""
    claim = {
        "samples_in_corpus": len(rows),
        "captions_key": captions_key(rows),
        "vae_key": content_key(config.vae),
        "text_key": content_key(config.text),
        "samples_per_shard": config.samples_per_shard,
        "max_frames": config.max_frames,
        "seed": config.seed,
    }
    path = output / "claim.json"
    if path.exists():
        for name, value in json.loads(path.read_text()).items():
            if claim[name] != value:
                raise DataError(
                    f"{output} was begun with {name}={value}, now it is {claim[name]}; "
                    "give another output, or remove the folder"
                )
        return
    (output / PARTS).mkdir(parents=True, exist_ok=True)
    _write_json(path, claim)


def captions_key(rows: list[dict[str, Any]]) -> str:
    """A short hash of the captions and file names."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _prepare_text(config: EncodeConfig, output: Path, rows: list[dict[str, Any]]) -> str:
    """The text encoder's place; the tiny one is made from the captions, and the empty caption is encoded."""
    from goku_mega.encoders.text import build_tiny_text_encoder, load_text_encoder

    name = config.text
    if name == "tiny":
        folder = output / TEXT_ENCODER
        if not folder.exists():
            temporary = output / f".{TEXT_ENCODER}.tmp"
            build_tiny_text_encoder((row["caption"] for row in rows), temporary, config.seed)
            temporary.rename(folder)
        name = str(folder)
    null_text = load_text_encoder(name).encode([""])[0]
    temporary = output / f".{NULL_TEXT}"
    np.save(temporary, null_text.numpy())
    temporary.replace(output / NULL_TEXT)
    return name


def _run(tasks: list[_ShardTask], total: int, workers: int) -> None:
    """Make the shards that are not there yet, `workers` at a time."""
    done = total - len(tasks)
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        futures = [pool.submit(_make_shard, task) for task in tasks]
        try:
            for task, future in _progress(list(zip(tasks, futures, strict=True)), done, total):
                future.result()
                logger.info("shard %s is written", task.shard.name)
        except BrokenProcessPool as error:
            raise DataError("an encoding worker was killed; run the command again to go on where it stopped") from error
        finally:
            for future in futures:
                future.cancel()


def _progress(work: list[Any], done: int, total: int) -> Iterator[Any]:
    """The work, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from work
    else:
        yield from track(work, description="encode shards", console=console, total=total, completed=done)


def _make_shard(task: _ShardTask) -> None:
    """One shard and, after it, its part file."""
    vae, text = _encoders(task.vae, task.text)
    clips: dict[str, NDArray[np.uint8]] = {}
    skipped = []
    for row in task.rows:
        try:
            clips[row["key"]] = fit_to_strides(decode_media(task.corpus / row["file"], max_frames=task.max_frames))
        except MediaError as error:
            skipped.append({"key": row["key"], "file": row["file"], "reason": str(error)})
            logger.warning("skipped %s: %s", row["key"], error)
    latents: dict[str, NDArray[np.float32]] = {}
    for keys in _by_shape(clips):
        encoded = vae.encode([clips[key] for key in keys]).numpy()
        latents.update(zip(keys, encoded, strict=True))
    kept = [row for row in task.rows if row["key"] in latents]
    texts = text.encode([row["caption"] for row in kept])
    samples = [
        EncodedSample(row["key"], latents[row["key"]], embedding.numpy(), row)
        for row, embedding in zip(kept, texts, strict=True)
    ]
    rows = write_shard(task.shard, samples)
    _write_json(task.part, {"rows": rows, "skipped": skipped})


@functools.cache
def _encoders(vae: str, text: str) -> tuple["VideoVae", "TextEncoder"]:
    """A worker's networks, loaded for its first shard. One thread: workers are the parallelism."""
    import torch

    from goku_mega.encoders.text import load_text_encoder
    from goku_mega.encoders.vae import load_vae

    torch.set_num_threads(1)
    return load_vae(vae), load_text_encoder(text)


def fit_to_strides(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut a clip to 4n + 1 frames and, around its centre, to multiples of 16 px.

    Raises:
        MediaError: the picture is smaller than 16 px.
    """
    multiple = 2 * SPATIAL_STRIDE
    count, height, width, _ = frames.shape
    kept_height, kept_width = height - height % multiple, width - width % multiple
    if not kept_height or not kept_width:
        raise MediaError(f"{height}x{width} px is too small; {multiple} px are needed")
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    count -= (count - 1) % TEMPORAL_STRIDE
    return frames[:count, top : top + kept_height, left : left + kept_width]


def _by_shape(clips: dict[str, NDArray[np.uint8]]) -> Iterator[list[str]]:
    """Keys of clips of equal shape together."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key, clip in clips.items():
        groups.setdefault(clip.shape, []).append(key)
    yield from groups.values()


def _finish(config: EncodeConfig, output: Path, tasks: list[_ShardTask]) -> None:
    """The index over all shards, then dataset.json: with it the data set is complete."""
    from goku_mega.encoders.text import load_text_encoder
    from goku_mega.encoders.vae import load_vae

    parts = [json.loads(task.part.read_text()) for task in tasks]
    rows = [IndexRow(*row) for part in parts for row in part["rows"]]
    skipped = [row for part in parts for row in part["skipped"]]
    if not rows:
        raise DataError(f"no file of {config.corpus} can be decoded; the first: {skipped[0]['reason']}")
    _write_text(output / SKIPPED, "".join(json.dumps(row) + "\n" for row in skipped))
    write_index(output / INDEX, rows)
    text = TEXT_ENCODER if config.text == "tiny" else config.text
    dataset = {
        "samples": len(rows),
        "skipped": len(skipped),
        "latent_channels": load_vae(config.vae).latent_channels,
        "text_width": load_text_encoder(str(output / text) if config.text == "tiny" else text).width,
        "vae": config.vae,
        "vae_key": content_key(config.vae),
        "text": text,
    }
    _write_json(output / DATASET, dataset)
    shutil.rmtree(output / PARTS)


def _write_json(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
