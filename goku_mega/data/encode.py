"""A corpus to latents and text embeddings in shards; killed at any moment and run again, the same bytes.

A shard is the unit of work and of resuming: which rows of captions.jsonl it holds is fixed, and it
exists only once it is whole. Files that cannot be decoded are skipped and listed.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.data import EncodeConfig
from goku_mega.data.captions import Row, corpus_key, read_captions
from goku_mega.data.shards import (
    DATASET,
    INDEX,
    NULL_TEXT,
    TEMPORARY,
    EncodedSample,
    IndexRow,
    npy,
    write_index,
    write_shard,
    write_whole,
)
from goku_mega.data.workers import end_with_parent
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
SHARDS = "shards"
CLAIM = "claim.json"

CHUNK_BYTES = 256 * 2**20
"""Decoded pixels a worker holds at once, to the clip."""

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class _ShardTask:
    """What a worker needs to make one shard."""

    number: int
    rows: tuple[Row, ...]
    corpus: Path
    output: Path
    vae: str
    text: str
    max_frames: int

    @property
    def shard(self) -> Path:
        return self.output / SHARDS / f"{self.number:05d}.tar"

    @property
    def part(self) -> Path:
        """The shard's index rows and skipped files, written after it: with this file it is done."""
        return self.output / PARTS / f"{self.number:05d}.json"


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Encode every readable file of the corpus into `config.output`.

    Raises:
        DataError: the corpus is missing or wholly unreadable, or the output holds another data set.
        ConfigError: there is no such VAE or text encoder.
    """
    began = time.monotonic()
    output = Path(config.output)
    rows = read_captions(Path(config.corpus))
    _claim(output, config, rows)
    with _alone(output):
        if not (output / DATASET).exists():
            tasks = _tasks(config, rows, _prepare_text(config, output, rows))
            (output / PARTS).mkdir(exist_ok=True)
            _run([task for task in tasks if not task.part.exists()], len(tasks), config.workers)
            _finish(config, output, tasks)
        shutil.rmtree(output / PARTS, ignore_errors=True)
    dataset = json.loads((output / DATASET).read_text())
    seconds = time.monotonic() - began
    counts = {"samples": dataset["samples"], "skipped": dataset["skipped"]}
    return {"output": str(output), **counts, "seconds": round(seconds, 1)}


def _tasks(config: EncodeConfig, rows: list[Row], text: str) -> list[_ShardTask]:
    size = config.samples_per_shard
    corpus, output = Path(config.corpus), Path(config.output)
    return [
        _ShardTask(number, tuple(rows[start : start + size]), corpus, output, config.vae, text, config.max_frames)
        for number, start in enumerate(range(0, len(rows), size))
    ]


def _claim(output: Path, config: EncodeConfig, rows: list[Row]) -> None:
    """Mark the folder with what is made in it; refuse a folder in which something else was begun."""
    claim = {
        "samples_in_corpus": len(rows),
        "corpus_key": corpus_key(Path(config.corpus), rows),
        "vae_key": content_key(config.vae),
        "text_key": config.text if config.text == "tiny" else content_key(config.text),
        "samples_per_shard": config.samples_per_shard,
        "max_frames": config.max_frames,
        "seed": config.seed,
    }
    path = output / CLAIM
    if path.exists():
        begun = json.loads(path.read_text())
        for name, value in claim.items():
            if begun.get(name) != value:
                raise DataError(
                    f"{output} was begun with {name}={begun.get(name)}, now it is {value}; "
                    "give another output, or remove the folder"
                )
        return
    _check_encoders(config)
    try:
        (output / SHARDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{output}: cannot make the folder ({error.strerror}); give another output") from error
    _write_json(path, claim)


def _check_encoders(config: EncodeConfig) -> None:
    """Load both once, so that a wrong name leaves nothing behind."""
    from goku_mega.encoders.text import load_text_encoder
    from goku_mega.encoders.vae import load_vae

    load_vae(config.vae)
    if config.text != "tiny":
        load_text_encoder(config.text)


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep a second command away while this one works on the folder."""
    with (output / CLAIM).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another command is encoding into {output}; wait for it, or stop it") from error
        yield


def _prepare_text(config: EncodeConfig, output: Path, rows: list[Row]) -> str:
    """The text encoder's place; the tiny one is made from the captions, and the empty caption is encoded."""
    from goku_mega.encoders.text import build_tiny_text_encoder, load_text_encoder

    name = config.text
    if name == "tiny":
        folder = output / TEXT_ENCODER
        if not folder.exists():
            temporary = output / f".{TEXT_ENCODER}{TEMPORARY}"
            shutil.rmtree(temporary, ignore_errors=True)
            build_tiny_text_encoder((row["caption"] for row in rows), temporary, config.seed)
            for path in temporary.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            temporary.rename(folder)
        name = str(folder)
    write_whole(output / NULL_TEXT, npy(load_text_encoder(name).encode([""])[0].numpy()))
    return name


def _run(tasks: list[_ShardTask], total: int, workers: int) -> None:
    """Make the shards that are not there yet, `workers` at a time."""
    done = total - len(tasks)
    context = get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        futures = [pool.submit(_make_shard, task) for task in tasks]
        try:
            for task, future in _progress(list(zip(tasks, futures, strict=True)), done, total):
                skipped = future.result()
                for row in skipped:
                    logger.warning("skipped %s: %s", row["key"], row["reason"])
                logger.info("shard %s is written: %d samples", task.shard.name, len(task.rows) - len(skipped))
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


def _make_shard(task: _ShardTask) -> list[Row]:
    """One shard and, after it, its part file; the skipped files."""
    skipped: list[Row] = []
    rows = write_shard(task.shard, _encoded(task, skipped))
    _write_json(task.part, {"rows": rows, "skipped": skipped})
    return skipped


def _encoded(task: _ShardTask, skipped: list[Row]) -> Iterator[EncodedSample]:
    """The shard's samples in order; files that cannot be decoded are added to `skipped`."""
    vae, text = _encoders(task.vae, task.text)
    for chunk in _chunks(_decoded(task, skipped)):
        latents: dict[str, NDArray[np.float32]] = {}
        for rows, clips in _by_shape(chunk):
            latents.update(zip((row["key"] for row in rows), vae.encode(clips).numpy(), strict=True))
        texts = text.encode([row["caption"] for row, _ in chunk])
        for (row, _), embedding in zip(chunk, texts, strict=True):
            yield EncodedSample(row["key"], latents[row["key"]], embedding.numpy(), row)


def _decoded(task: _ShardTask, skipped: list[Row]) -> Iterator[tuple[Row, Frames]]:
    for row in task.rows:
        try:
            yield row, fit_to_strides(decode_media(task.corpus / row["file"], max_frames=task.max_frames))
        except MediaError as error:
            skipped.append({"key": row["key"], "file": row["file"], "reason": str(error)})


def _chunks(clips: Iterable[tuple[Row, Frames]]) -> Iterator[list[tuple[Row, Frames]]]:
    """Neighbours whose pixels fit into memory together, so that a shard of long videos need not."""
    chunk: list[tuple[Row, Frames]] = []
    for row, frames in clips:
        chunk.append((row, frames))
        if sum(frames.nbytes for _, frames in chunk) >= CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@functools.cache
def _encoders(vae: str, text: str) -> tuple["VideoVae", "TextEncoder"]:
    """A worker's networks, loaded for its first shard. One thread: workers are the parallelism."""
    import torch

    from goku_mega.encoders.text import load_text_encoder
    from goku_mega.encoders.vae import load_vae

    torch.set_num_threads(1)
    return load_vae(vae), load_text_encoder(text)


def fit_to_strides(frames: Frames) -> Frames:
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


def _by_shape(chunk: list[tuple[Row, Frames]]) -> Iterator[tuple[list[Row], list[Frames]]]:
    """Clips of equal shape together."""
    groups: dict[tuple[int, ...], tuple[list[Row], list[Frames]]] = {}
    for row, frames in chunk:
        rows, clips = groups.setdefault(frames.shape, ([], []))
        rows.append(row)
        clips.append(frames)
    yield from groups.values()


def _finish(config: EncodeConfig, output: Path, tasks: list[_ShardTask]) -> None:
    """The index over all shards, then dataset.json: with it the data set is complete."""
    parts = [json.loads(task.part.read_text()) for task in tasks]
    rows = [IndexRow(*row) for part in parts for row in part["rows"]]
    skipped = [row for part in parts for row in part["skipped"]]
    if not rows:
        _discard(output)
        raise DataError(f"no file of {config.corpus} can be decoded; the first: {skipped[0]['reason']}")
    write_whole(output / SKIPPED, "".join(json.dumps(row) + "\n" for row in skipped).encode())
    write_index(output / INDEX, rows)
    for path in (*output.glob(f".*{TEMPORARY}"), *(output / SHARDS).glob(f".*{TEMPORARY}")):
        path.unlink(missing_ok=True)  # of commands that were killed
    dataset = {
        "samples": len(rows),
        "skipped": len(skipped),
        "latent_channels": rows[0].channels,
        "text_width": int(np.load(output / NULL_TEXT).shape[1]),
        "vae": _place(config.vae),
        "vae_key": content_key(config.vae),
        "text": TEXT_ENCODER if config.text == "tiny" else _place(config.text),
    }
    _write_json(output / DATASET, dataset)


def _place(name_or_path: str) -> str:
    """A local folder by its full path, to be found from anywhere."""
    local = name_or_path != "tiny" and Path(name_or_path).is_dir()
    return str(Path(name_or_path).resolve()) if local else name_or_path


def _discard(output: Path) -> None:
    """Take away what was made in the folder, and the folder if nothing else is in it."""
    for name in (PARTS, SHARDS, TEXT_ENCODER):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (NULL_TEXT, CLAIM):
        (output / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        output.rmdir()


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
