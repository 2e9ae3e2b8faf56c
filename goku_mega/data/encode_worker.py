"""A worker of `goku-mega encode`: it takes shards that nobody has, decodes ahead of the codec, and writes behind it.

A shard is the unit of work and of resuming: which rows it holds is fixed, and it is made once its part file is there.
"""

import fcntl
import functools
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from goku_mega.data.captions import Row
from goku_mega.data.clips import Piece, read_pieces
from goku_mega.data.embeddings import CaptionEncoder, Embedding, EmbeddingFolder
from goku_mega.data.shards import DATASET, NULL_TEXT, EncodedSample, npy, write_shard
from goku_mega.data.whole_files import write_whole
from goku_mega.data.workers import ahead
from goku_mega.encoders.vae import ClipEncoding, VideoVae, group_size, load_vae
from goku_mega.errors import MediaError

PARTS = "parts"
SHARDS = "shards"

PIECES_AHEAD = 8
"""Decoded pieces that wait for the codec; the largest, 13 frames of a large picture, is the measure of their memory."""
SAMPLES_BEHIND = 16
"""Encoded samples that wait for the disk."""
WAITING_SAMPLES = 64
"""A clip waits for another of its shape until so many samples of the shard are encoded behind it."""


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to make one shard."""

    number: int
    rows: tuple[Row, ...]
    corpus: Path
    output: Path
    max_frames: int

    @property
    def shard(self) -> Path:
        return self.output / SHARDS / f"{self.number:05d}.tar"

    @property
    def part(self) -> Path:
        """The shard's index rows, skipped files and checksum, written after it: with this file it is made."""
        return self.output / PARTS / f"{self.number:05d}.json"

    @property
    def lock(self) -> Path:
        return self.output / PARTS / f"{self.number:05d}.lock"

    def is_made(self) -> bool:
        # In this order: part files are taken away once the data set is complete.
        return (self.part.exists() or (self.output / DATASET).exists()) and self.shard.exists()


@dataclass(frozen=True)
class Encoders:
    """Which networks a worker loads, and where to."""

    vae: str
    text: str
    device: str
    embeddings: Path
    embeddings_limit_bytes: float
    """How much the worker may add to the folder of embeddings."""


@dataclass(frozen=True)
class ShardMade:
    """A worker's word of one shard."""

    name: str
    samples: int
    skipped: list[Row]


@dataclass(frozen=True)
class WorkerEnds:
    """A worker's last word."""

    vae_s: float
    """Seconds in the codec, of `total_s` from the first shard's beginning on."""
    total_s: float


@dataclass(frozen=True)
class _Begin:
    task: ShardTask
    lock: int


@dataclass(frozen=True)
class _End:
    pass


@dataclass(frozen=True)
class _Refused:
    """A row whose file cannot be decoded."""

    row: Row
    reason: str


@dataclass
class _Clock:
    vae_s: float = 0.0

    @contextmanager
    def runs(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.vae_s += time.monotonic() - began


def make_shards(
    encoders: Encoders, tasks: list[ShardTask], pieces_ahead: int = PIECES_AHEAD
) -> Iterator[ShardMade | WorkerEnds]:
    """Make those of the shards that are neither made nor in another's hands.

    Args:
        pieces_ahead: decoded pieces that wait for the codec; 0: decoding, codec and writing take turns.
    """
    clock = _Clock()
    vae, text = _loaded(encoders)
    _write_null_text(tasks, text)
    began = time.monotonic()
    pieces = ahead(_decoded(tasks), pieces_ahead)
    samples = ahead(_encoded(pieces, vae, text, clock), SAMPLES_BEHIND if pieces_ahead else 0)
    yield from _written(samples)
    yield WorkerEnds(clock.vae_s, time.monotonic() - began)


def is_free(task: ShardTask) -> bool:
    """Whether nobody, as far as locks can be seen from here, is making the shard."""
    lock = _lock(task)
    if lock is not None:
        os.close(lock)
    return lock is not None


@functools.cache
def _loaded(encoders: Encoders) -> tuple[VideoVae, CaptionEncoder]:
    device = torch.device(encoders.device)
    kept = EmbeddingFolder(encoders.embeddings, encoders.embeddings_limit_bytes)
    return load_vae(encoders.vae, device), CaptionEncoder(encoders.text, (device,), kept)


def _write_null_text(tasks: list[ShardTask], text: CaptionEncoder) -> None:
    path = tasks[0].output / NULL_TEXT
    if not path.exists():
        write_whole(path, npy(text.encode([""])[""]))


def _decoded(tasks: list[ShardTask]) -> Iterator[_Begin | Piece | _Refused | _End]:
    """The pixels of one shard after the other; a shard is taken when the one before it is decoded."""
    for task in tasks:
        lock = _lock(task)
        if lock is None:
            continue
        if task.is_made():
            os.close(lock)
            continue
        yield _Begin(task, lock)
        for row in task.rows:
            try:
                yield from read_pieces(task.corpus, row, task.max_frames)
            except MediaError as error:
                yield _Refused(row, str(error))
        yield _End()


def _lock(task: ShardTask) -> int | None:
    """The shard's lock, held until it is closed or the process ends; None where another has it, or all is made."""
    try:
        lock = os.open(task.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _encoded(
    items: Iterable[_Begin | Piece | _Refused | _End], vae: VideoVae, text: CaptionEncoder, clock: _Clock
) -> Iterator[_Begin | EncodedSample | _Refused | _End]:
    """The samples of each shard in the order of its rows."""
    if vae.device.type == "cpu":
        torch.set_num_threads(1)  # in the thread that computes; workers are the parallelism
    shard: _Shard | None = None
    for item in items:
        if isinstance(item, _Begin):
            shard = _Shard(vae, text.encode(row["caption"] for row in item.task.rows), clock)
            yield item
            continue
        assert shard is not None
        if isinstance(item, Piece):
            shard.add(item)
        elif isinstance(item, _Refused):
            shard.refuse(item)
        else:
            shard.encode_waiting()
        yield from shard.ready()
        if isinstance(item, _End):
            yield item


@dataclass
class _Shard:
    """The samples of one shard on their way through the codec."""

    vae: VideoVae
    texts: dict[str, Embedding]
    clock: _Clock
    rows: dict[str, Row] = field(default_factory=dict)
    results: dict[str, NDArray[np.float32] | _Refused | None] = field(default_factory=dict)
    """By key, in the order of the rows; None: not encoded yet."""
    waiting: dict[tuple[int, ...], list[Piece]] = field(default_factory=dict)
    """Clips that wait for another of their shape."""
    clip: ClipEncoding | None = None
    """The large clip whose pieces are coming."""

    def add(self, piece: Piece) -> None:
        key = piece.row["key"]
        self.rows[key] = piece.row
        self.results.setdefault(key, None)
        if group_size(*piece.shape) > 1:
            group = self.waiting.setdefault(piece.shape, [])
            group.append(piece)
            if len(group) == group_size(*piece.shape):
                self._encode_group(piece.shape)
            elif len(self.results) > WAITING_SAMPLES:
                self.encode_waiting()
            return
        with self.clock.runs():
            self.clip = self.clip or self.vae.begin_clip(*piece.shape[1:])
            self.clip.push(piece.pixels[None])
        if piece.is_last:
            self.results[key] = self.clip.latents()[0].numpy()
            self.clip = None

    def refuse(self, refused: _Refused) -> None:
        self.clip = None
        self.rows[refused.row["key"]] = refused.row
        self.results[refused.row["key"]] = refused

    def encode_waiting(self) -> None:
        for shape in list(self.waiting):
            self._encode_group(shape)

    def ready(self) -> Iterator[EncodedSample | _Refused]:
        while self.results:
            key, result = next(iter(self.results.items()))
            if result is None:
                return
            row = self.rows.pop(key)
            del self.results[key]
            if isinstance(result, _Refused):
                yield result
            else:
                yield EncodedSample(key, result, self.texts[row["caption"]], row)

    def _encode_group(self, shape: tuple[int, ...]) -> None:
        group = self.waiting.pop(shape)
        with self.clock.runs():
            latents = self.vae.encode([piece.pixels for piece in group])
        for piece, latent in zip(group, latents.numpy(), strict=True):
            self.results[piece.row["key"]] = latent


def _written(items: Iterator[_Begin | EncodedSample | _Refused | _End]) -> Iterator[ShardMade]:
    """Each shard and, after it, its part file."""
    for item in items:
        assert isinstance(item, _Begin)
        task, skipped, digest = item.task, list[Row](), xxhash.xxh3_128()
        rows = write_shard(task.shard, _samples(items, skipped), digest)
        content = {
            "shard": {
                "name": f"{SHARDS}/{task.shard.name}",
                "bytes": task.shard.stat().st_size,
                "xxh3_128": digest.hexdigest(),
            },
            "rows": rows,
            "skipped": skipped,
        }
        write_json(task.part, content)
        os.close(item.lock)
        yield ShardMade(task.shard.name, len(rows), skipped)


def _samples(items: Iterator[Any], skipped: list[Row]) -> Iterator[EncodedSample]:
    """A shard's samples; the files that cannot be decoded are added to `skipped`."""
    for item in items:
        if isinstance(item, _End):
            return
        if isinstance(item, _Refused):
            skipped.append({"key": item.row["key"], "file": item.row["file"], "reason": item.reason})
        else:
            yield item


def write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
