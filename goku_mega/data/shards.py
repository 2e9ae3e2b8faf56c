"""Encoded samples on disk: WebDataset tar shards, and a Parquet index with the byte offset of every array.

Reading goes straight to the bytes: no scan, any order.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as arrow
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor

from goku_mega.errors import DataError
from goku_mega.model.sizes import ModelShape
from goku_mega.plan.flops import training_flops

INDEX = "index.parquet"
DATASET = "dataset.json"
NULL_TEXT = "null_text.npy"

TEMPORARY = ".tmp"
"""How the name of a file ends that is not whole yet."""
MAX_OPEN_SHARDS = 256
"""Fewer than the open files that systems allow a process by default."""


class Sample(NamedTuple):
    """One encoded sample."""

    key: str
    latent: Tensor  # [channels, t, h, w] float32
    text: Tensor  # [text_tokens, text_width] float32


class EncodedSample(NamedTuple):
    """What goes into a shard."""

    key: str
    latent: NDArray[np.float32]
    text: NDArray[np.float32]
    about: dict[str, Any]


class IndexRow(NamedTuple):
    """Where a sample's arrays are and what shape they have."""

    key: str
    shard: str
    latent_offset: int
    latent_bytes: int
    text_offset: int
    text_bytes: int
    channels: int
    t: int
    h: int
    w: int
    text_tokens: int
    caption: str


@dataclass(frozen=True)
class Index:
    """The samples of a data set, by number."""

    path: Path
    dataset: dict[str, Any]
    rows: tuple[IndexRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def latent_channels(self) -> int:
        return int(self.dataset["latent_channels"])

    @property
    def text_width(self) -> int:
        return int(self.dataset["text_width"])

    def tokens(self, shape: ModelShape) -> NDArray[np.int64]:
        """Tokens of every sample."""
        pt, ph, pw = shape.patch
        return np.array([(row.t // pt) * (row.h // ph) * (row.w // pw) for row in self.rows], dtype=np.int64)

    def flops(self, shape: ModelShape) -> NDArray[np.int64]:
        """Training FLOPs of every sample."""
        counts = zip(self.tokens(shape).tolist(), self.rows, strict=True)
        return np.array([training_flops(tokens, row.text_tokens, shape) for tokens, row in counts], dtype=np.int64)


def load_index(path: Path) -> Index:
    """Open a data set written by `goku-mega encode`.

    Raises:
        DataError: there is none, it is not finished, or its index is damaged.
    """
    for name in (DATASET, INDEX, NULL_TEXT):
        if not (path / name).exists():
            command = f"goku-mega encode --corpus FOLDER --output {path}"
            raise DataError(f"{path / name} is missing; make the data set with `{command}`")
    try:
        # Not by `read_table`: it imports the half of pyarrow that a start of a rank can do without.
        table = parquet.ParquetFile(path / INDEX).read().to_pylist()
        return Index(path, json.loads((path / DATASET).read_text()), tuple(IndexRow(**row) for row in table))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} has a damaged {INDEX} or {DATASET} ({error}); remove it and encode again") from error


def write_index(path: Path, rows: Iterable[IndexRow]) -> None:
    """Write the Parquet index, whole or not at all."""
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist([row._asdict() for row in rows]), buffer)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears with all its bytes, by a rename."""
    with _appearing(path) as file:
        file.write(data)


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file under a name of this process's own until all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class ShardReader:
    """Reads samples at their offsets; keeps the shards it reads from open. For one thread."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.null_text = torch.from_numpy(np.load(index.path / NULL_TEXT).astype(np.float32))
        self._files: dict[str, int] = {}

    def read(self, number: int) -> Sample:
        """Sample `number` of the index.

        Raises:
            DataError: the shard is missing or shorter than the index says.
        """
        row = self.index.rows[number]
        latent = self._array(row.shard, row.latent_offset, row.latent_bytes)
        return Sample(row.key, latent, self._array(row.shard, row.text_offset, row.text_bytes))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _array(self, shard: str, offset: int, size: int) -> Tensor:
        path = self.index.path / shard
        try:
            if shard not in self._files:
                if len(self._files) == MAX_OPEN_SHARDS:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[shard] = os.open(path, os.O_RDONLY)
            data = os.pread(self._files[shard], size, offset)
            return torch.from_numpy(np.load(io.BytesIO(data)).astype(np.float32))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read at byte {offset} ({error}); encode the data set again") from error


def write_shard(path: Path, samples: Iterable[EncodedSample]) -> list[IndexRow]:
    """Write samples as a tar of KEY.latent.npy, KEY.text.npy and KEY.json: the same bytes for the same samples.

    The shard appears whole, by a rename. The rows' shard is relative to the data set's folder.
    """
    rows: list[IndexRow] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with _appearing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            latent_at, latent_bytes = _add(tar, f"{sample.key}.latent.npy", npy(sample.latent))
            text_at, text_bytes = _add(tar, f"{sample.key}.text.npy", npy(sample.text))
            _add(tar, f"{sample.key}.json", json.dumps(sample.about, sort_keys=True).encode())
            channels, t, h, w = sample.latent.shape
            rows.append(
                IndexRow(
                    sample.key, f"{path.parent.name}/{path.name}", latent_at, latent_bytes, text_at, text_bytes,
                    channels, t, h, w, len(sample.text), sample.about["caption"],
                )
            )  # fmt: skip
    return rows


def npy(array: NDArray[np.float32]) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Add a member without times and owners; where its bytes begin and how many there are."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return start, len(data)
