"""Encoded samples on disk: WebDataset tar shards, and a Parquet index with the byte offset of every array.

Reading goes straight to the bytes: no scan, any order.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as arrow
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor

from goku_mega.data.insisting import USUAL_RULES, ReadRules
from goku_mega.data.shard_store import ByteRange, Fetch, ShardStore, checksum_of, open_store
from goku_mega.data.whole_files import appearing, write_whole
from goku_mega.errors import DataError
from goku_mega.model.sizes import ModelShape
from goku_mega.plan.flops import training_flops

INDEX = "index.parquet"
DATASET = "dataset.json"
NULL_TEXT = "null_text.npy"


_NPY_MAGIC = b"\x93NUMPY\x01\x00"


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
    repeat: int = 1
    """How often an epoch of training takes it."""
    checksum: int | None = None
    """Of its bytes in the shard, from the first array's to the last's; None in data sets of older versions."""


@dataclass(frozen=True)
class Index:
    """The samples of a data set, by number."""

    place: str
    """The folder, or an fsspec URL."""
    identity: str
    """A hash of the place and of the data set's lists: tells it from others, and from itself encoded anew."""
    null_text: Tensor  # [text_tokens, text_width] float32
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

    def repeated(self) -> "Index":
        """Every sample as often as an epoch takes it, under keys of their own: each has noise and times of its own."""
        rows = [
            row._replace(key=f"{row.key}#{number}" if number else row.key)
            for row in self.rows
            for number in range(row.repeat)
        ]
        return replace(self, rows=tuple(rows))

    def tokens(self, shape: ModelShape) -> NDArray[np.int64]:
        """Tokens of every sample."""
        pt, ph, pw = shape.patch
        return np.array([(row.t // pt) * (row.h // ph) * (row.w // pw) for row in self.rows], dtype=np.int64)

    def flops(self, shape: ModelShape) -> NDArray[np.int64]:
        """Training FLOPs of every sample."""
        counts = zip(self.tokens(shape).tolist(), self.rows, strict=True)
        return np.array([training_flops(tokens, row.text_tokens, shape) for tokens, row in counts], dtype=np.int64)


def load_index(place: str | Path, rules: ReadRules = USUAL_RULES) -> Index:
    """Open a data set written by `goku-mega encode`.

    Args:
        place: a folder, or an fsspec URL.

    Raises:
        DataError: there is none, it is not finished, its index is damaged, or its storage fails.
    """
    store = open_store(place, rules)
    contents = {}
    try:
        for name in (DATASET, INDEX, NULL_TEXT):
            contents[name] = store.content(name)
    except FileNotFoundError:
        command = f"goku-mega encode --corpus FOLDER --output {place}"
        raise DataError(f"{store}/{name} is missing; make the data set with `{command}`") from None
    finally:
        store.close()
    try:
        # Not by `read_table`: it imports the half of pyarrow that a start of a rank can do without.
        table = parquet.ParquetFile(arrow.BufferReader(contents[INDEX])).read().to_pylist()
        rows = tuple(IndexRow(**row) for row in table)
        dataset = json.loads(contents[DATASET])
        null_text = _tensor(memoryview(bytearray(contents[NULL_TEXT])))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(
            f"{place} has a damaged {INDEX}, {DATASET} or {NULL_TEXT} ({error}); remove it and encode again"
        ) from error
    identity = hashlib.sha256(b"\0".join([str(store).encode(), *contents.values()])).hexdigest()[:16]
    return Index(str(place), identity, null_text, dataset, rows)


def write_index(path: Path, rows: Iterable[IndexRow]) -> None:
    """Write the Parquet index, whole or not at all."""
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist([row._asdict() for row in rows]), buffer)
    write_whole(path, buffer.getvalue())


class ShardReader:
    """Reads samples at their offsets. For one thread; the store may use more of its own."""

    def __init__(self, index: Index, store: ShardStore | None = None) -> None:
        """
        Args:
            store: where the shards are, with its threads and its cache; None: the index's place.
        """
        self.index = index
        self.store = store or open_store(index.place)

    def read(self, number: int) -> Sample:
        """Sample `number` of the index.

        Raises:
            DataError: the shard is missing, shorter than the index says or damaged, or its storage fails.
        """
        return self.start([number])(number)

    def start(self, numbers: Sequence[int]) -> Callable[[int], Sample]:
        """Begin to read samples that will be wanted soon; what it returns gives each of them once, like `read`."""
        fetch = self.store.start([_range(self.index.rows[number]) for number in numbers])
        return partial(self._sample, fetch)

    def close(self) -> None:
        self.store.close()

    def _sample(self, fetch: Fetch, number: int) -> Sample:
        row = self.index.rows[number]
        wanted = _range(row)
        try:
            content = fetch(wanted)
            arrays = (
                _tensor(content[offset - wanted.start :][:size])
                for offset, size in ((row.latent_offset, row.latent_bytes), (row.text_offset, row.text_bytes))
            )
            return Sample(row.key, *arrays)
        except FileNotFoundError as error:
            raise DataError(
                f"{self.store}/{row.shard} is missing; put it back, or encode the data set again"
            ) from error
        except ValueError as error:
            raise DataError(
                f"{self.store}/{row.shard} cannot be read at byte {wanted.start} ({error}); encode the data set again"
            ) from error


def _range(row: IndexRow) -> ByteRange:
    """The sample's arrays, which are neighbours, and what is between them."""
    start = min(row.latent_offset, row.text_offset)
    end = max(row.latent_offset + row.latent_bytes, row.text_offset + row.text_bytes)
    return ByteRange(row.shard, start, end - start, row.checksum)


def _tensor(content: memoryview) -> Tensor:
    """The array of a .npy file in fp32, in the same memory where it is fp32 already.

    Raises:
        ValueError: it is none, or not whole.
    """
    if content[: len(_NPY_MAGIC)] != _NPY_MAGIC:
        raise ValueError("no array begins there")
    start = len(_NPY_MAGIC) + 2 + int.from_bytes(content[len(_NPY_MAGIC) :][:2], "little")
    dtype, shape = _npy_header(bytes(content[:start]))
    return torch.from_numpy(np.frombuffer(content[start:], dtype).reshape(shape).astype(np.float32, copy=False))


@lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """What the beginning of a .npy file says; the shapes of a data set are few, and reading it takes long."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if in_columns:
        raise ValueError("its numbers are in the order of columns")
    return dtype, shape


class Digest(Protocol):
    """A hash on its way, of hashlib's manner."""

    def update(self, data: bytes, /) -> None: ...


class _Watched:
    """A file whose bytes go into a hash as they are written, if there is one; the newest are kept."""

    def __init__(self, file: BinaryIO, digest: Digest | None) -> None:
        self._file, self._digest = file, digest
        self.newest = bytearray()

    def write(self, data: bytes) -> int:
        if self._digest is not None:
            self._digest.update(data)
        self.newest += data
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


def write_shard(path: Path, samples: Iterable[EncodedSample], digest: Digest | None = None) -> list[IndexRow]:
    """Write samples as a tar of KEY.latent.npy, KEY.text.npy and KEY.json: the same bytes for the same samples.

    The shard appears whole, by a rename. The rows' shard is relative to the data set's folder.

    Args:
        digest: is given every byte that is written.
    """
    rows: list[IndexRow] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as file, _tar(watched := _Watched(file, digest)) as tar:
        for sample in samples:
            watched.newest.clear()
            began = tar.offset
            latent_at, latent_bytes = _add(tar, f"{sample.key}.latent.npy", npy(sample.latent))
            text_at, text_bytes = _add(tar, f"{sample.key}.text.npy", npy(sample.text))
            checksum = checksum_of(watched.newest[latent_at - began : text_at + text_bytes - began])
            _add(tar, f"{sample.key}.json", json.dumps(sample.about, sort_keys=True).encode())
            channels, t, h, w = sample.latent.shape
            rows.append(
                IndexRow(
                    sample.key, f"{path.parent.name}/{path.name}", latent_at, latent_bytes, text_at, text_bytes,
                    channels, t, h, w, len(sample.text), sample.about["caption"], sample.about.get("repeat", 1),
                    checksum,
                )
            )  # fmt: skip
    return rows


def _tar(file: Any) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


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
