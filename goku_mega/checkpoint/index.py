"""The list of what a checkpoint holds: its tensors, the boxes they were written as, where each lies, and checksums.

A checkpoint of thousands of ranks has millions of boxes, so they are columns of numbers and never Python objects. The
file is a safetensors file: no pickle, nothing in it can run. Nothing here needs torch.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from goku_mega.errors import CheckpointError

BLOCK_BYTES = 4 * 2**20
"""Files are checked in blocks of this many bytes; the last one of a file may be shorter."""

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of one number, by torch's name of the dtype; these can be stored."""

_COLUMN_TYPES = (np.uint8, np.uint16, np.int32, np.int64)
"""From narrow to wide; a column takes the first that holds its values."""


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, whatever boxes it was written as."""

    name: str
    dtype: str
    """torch's name of it without "torch."."""
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Chunks:
    """The boxes that were written; row i of every column describes chunk i. None is empty.

    A chunk ends at `data` + product of `sizes` x bytes of a number.
    """

    tensor: NDArray[np.int32]
    """[chunks], number in `Index.tensors`."""
    file: NDArray[np.int32]
    """[chunks], number in `Index.files`."""
    head: NDArray[np.int64]
    """[chunks], the byte in the file where the chunk's torch head begins."""
    data: NDArray[np.int64]
    """[chunks], the byte in the file where its raw numbers begin."""
    offsets: NDArray[np.int64]
    """[chunks, max_dims], the box's first corner in the whole tensor; 0 in the dims the tensor has not."""
    sizes: NDArray[np.int64]
    """[chunks, max_dims], the box's lengths; 1 in the dims the tensor has not."""

    def __len__(self) -> int:
        return len(self.tensor)

    def sorted(self) -> "Chunks":
        """By tensor, then by offsets: the order an `Index` wants."""
        order = np.lexsort((*self.offsets.T[::-1], self.tensor))
        return Chunks(*(getattr(self, column.name)[order] for column in fields(self)))


@dataclass(frozen=True, eq=False)
class Index:
    """Everything that is needed to find and to check any element of any tensor of a checkpoint."""

    tensors: tuple[StoredTensor, ...]
    """Sorted by name."""
    files: tuple[str, ...]
    chunks: Chunks
    """Sorted by tensor, then by offsets."""
    file_bytes: NDArray[np.int64]
    """[files]"""
    digests: tuple[NDArray[np.uint64], ...]
    """For each file one xxh3_64 a block of `BLOCK_BYTES`, [blocks]."""

    @cached_property
    def by_name(self) -> Mapping[str, int]:
        """A tensor's number in `tensors`."""
        return {tensor.name: number for number, tensor in enumerate(self.tensors)}

    @cached_property
    def chunk_bytes(self) -> NDArray[np.int64]:
        """[chunks], the bytes of each chunk's raw numbers."""
        item_bytes = np.array([ITEM_BYTES[tensor.dtype] for tensor in self.tensors], dtype=np.int64)
        return self.chunks.sizes.prod(axis=1) * item_bytes[self.chunks.tensor]

    def chunks_of(self, name: str) -> slice:
        """The rows of `chunks` that hold the tensor `name`.

        Raises:
            KeyError: there is no such tensor.
        """
        number = self.by_name[name]
        return slice(int(self._first_chunk[number]), int(self._first_chunk[number + 1]))

    @cached_property
    def _first_chunk(self) -> NDArray[np.int64]:
        """[tensors + 1], the first row of each tensor's chunks, and the number of rows."""
        return np.searchsorted(self.chunks.tensor, np.arange(len(self.tensors) + 1)).astype(np.int64)

    @cached_property
    def _shapes(self) -> NDArray[np.int64]:
        """[tensors, max_dims], 1 in the dims a tensor has not."""
        shapes = np.ones((len(self.tensors), self.chunks.sizes.shape[1]), dtype=np.int64)
        for row, tensor in zip(shapes, self.tensors, strict=True):
            row[: len(tensor.shape)] = tensor.shape
        return shapes

    def check_complete(self) -> None:
        """Check that the chunks of every tensor cover each of its elements exactly once.

        Every position of every dim of every tensor gets a random weight, and an element weighs the product over its
        dims, modulo 2**64. A box then weighs a product of differences of prefix sums, and the boxes of a tensor weigh
        together as much as the whole exactly if they cover it once (but for a chance of some 2**-45). So one pass over
        the boxes decides, instead of comparing each with each.

        Raises:
            ValueError: names the first tensor for which it is not so.
        """
        shapes, tensor = self._shapes, self.chunks.tensor
        starts, ends = self.chunks.offsets, self.chunks.offsets + self.chunks.sizes
        outside = ((starts < 0) | (self.chunks.sizes < 1) | (ends > shapes[tensor])).any(axis=1)
        if outside.any():
            row = int(outside.argmax())
            name, shape = self.tensors[tensor[row]].name, self.tensors[tensor[row]].shape
            dims = slice(0, max(len(shape), 1))
            raise ValueError(
                f"a chunk of {name} from {starts[row, dims].tolist()} to {ends[row, dims].tolist()} "
                f"is empty or not inside its shape {list(shape)}"
            )
        numbers = np.arange(len(self.tensors))
        whole = _weights(numbers, np.zeros_like(shapes), shapes)
        total = np.zeros(len(self.chunks) + 1, dtype=np.uint64)
        np.cumsum(_weights(tensor, starts, ends), out=total[1:])
        wrong = total[self._first_chunk[1:]] - total[self._first_chunk[:-1]] != whole
        if wrong.any():
            name = self.tensors[int(wrong.argmax())].name
            raise ValueError(f"the chunks of {name} do not cover each of its elements exactly once")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Index):
            return NotImplemented
        return (self.tensors, self.files) == (other.tensors, other.files) and all(
            np.array_equal(mine, others)
            for mine, others in zip(self._arrays().values(), other._arrays().values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def _arrays(self) -> dict[str, NDArray[Any]]:
        columns = {column.name: getattr(self.chunks, column.name) for column in fields(self.chunks)}
        return {**columns, "file_bytes": self.file_bytes, "digests": _joined(self.digests)}

    def to_bytes(self) -> bytes:
        """The index as a safetensors file; the same index gives the same bytes."""
        chunks = self.chunks
        columns: dict[str, NDArray[Any]] = {
            "chunk.tensor": chunks.tensor,
            "chunk.file": chunks.file,
            "chunk.head": chunks.head,
            "chunk.head_bytes": chunks.data - chunks.head,
            **{f"chunk.offsets.{dim}": chunks.offsets[:, dim] for dim in range(chunks.offsets.shape[1])},
            **{f"chunk.sizes.{dim}": chunks.sizes[:, dim] for dim in range(chunks.sizes.shape[1])},
            "file.bytes": self.file_bytes,
        }
        arrays = {name: _narrow(column) for name, column in columns.items()}
        arrays["file.digests"] = _joined(self.digests)
        tensors = [[tensor.name, tensor.dtype, tensor.shape] for tensor in self.tensors]
        for name, table in (("tensors", tensors), ("files", self.files)):
            arrays[name] = np.frombuffer(_json(table), dtype=np.uint8)
        return save(arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Index":
        """Read what `to_bytes` wrote.

        Raises:
            CheckpointError: the bytes are damaged. What only changes a number without contradicting another is for the
                file's checksum in the manifest to find.
        """
        try:
            return _parse(data)
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError, OverflowError, struct.error) as error:
            raise CheckpointError(f"the index of the checkpoint is damaged: {error or type(error).__name__}") from None


def block_digests(data: bytes | memoryview) -> NDArray[np.uint64]:
    """The xxh3_64 of each block of a file's content, [blocks]; none if it is empty."""
    view = memoryview(data).cast("B")
    starts = range(0, len(view), BLOCK_BYTES)
    return np.array([xxhash.xxh3_64_intdigest(view[start : start + BLOCK_BYTES]) for start in starts], dtype=np.uint64)


def digest_file(digests: NDArray[np.uint64]) -> str:
    """A file's checksum: the xxh3_128 of its blocks' digests, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(digests.astype("<u8").tobytes())


def _joined(digests: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.zeros(0, dtype=np.uint64), *digests])


def _narrow(column: NDArray[Any]) -> NDArray[Any]:
    """The same values, all at least 0, in the narrowest type that holds them."""
    low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
    if low < 0:
        raise ValueError(f"{low} cannot stand in an index")
    chosen = next(kind for kind in _COLUMN_TYPES if high <= np.iinfo(kind).max)
    return np.ascontiguousarray(column, dtype=chosen)


def _json(table: Any) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()


def _parse(data: bytes) -> Index:
    (length,) = struct.unpack_from("<Q", data)
    if not data[8 : 8 + length].rstrip(b" ").endswith(b"}"):  # JSON takes other padding for the same
        raise ValueError("its header does not end")
    arrays = load(data)
    tensors, files = (arrays.pop(name).tobytes() for name in ("tensors", "files"))
    digests = arrays.pop("file.digests")
    if digests.dtype != np.uint64 or any(
        column.dtype not in _COLUMN_TYPES or column.ndim != 1 for column in arrays.values()
    ):
        raise ValueError("a column has the wrong type")
    dims = sum(name.startswith("chunk.offsets.") for name in arrays)
    head = arrays["chunk.head"].astype(np.int64)
    chunks = Chunks(
        tensor=arrays["chunk.tensor"].astype(np.int32),
        file=arrays["chunk.file"].astype(np.int32),
        head=head,
        data=head + arrays["chunk.head_bytes"],
        offsets=_matrix([arrays[f"chunk.offsets.{dim}"] for dim in range(dims)], len(head)),
        sizes=_matrix([arrays[f"chunk.sizes.{dim}"] for dim in range(dims)], len(head)),
    )
    file_bytes = arrays["file.bytes"].astype(np.int64)
    blocks = -(-file_bytes // BLOCK_BYTES)
    if len(arrays) != 5 + 2 * dims or digests.shape != (blocks.sum(),):
        raise ValueError("its columns do not fit together")
    parts = tuple(np.split(digests, np.cumsum(blocks)[:-1])) if len(blocks) else ()
    index = Index(_stored_tensors(tensors), _names(files), chunks, file_bytes, parts)
    _check_fit(index)
    return index


def _matrix(columns: list[NDArray[Any]], rows: int) -> NDArray[np.int64]:
    """[rows, columns]"""
    matrix = np.empty((rows, len(columns)), dtype=np.int64)
    for dim, column in enumerate(columns):
        if len(column) != rows:
            raise ValueError("its columns do not fit together")
        matrix[:, dim] = column
    return matrix


# A coordinator reads thousands of indices that list the same tensors; it parses and keeps each list once.
@lru_cache(maxsize=256)
def _stored_tensors(text: bytes) -> tuple[StoredTensor, ...]:
    tensors = tuple(StoredTensor(name, dtype, tuple(shape)) for name, dtype, shape in _table(text))
    for tensor in tensors:
        whole = all(type(length) is int and 0 <= length < 2**63 for length in tensor.shape)
        if not isinstance(tensor.name, str) or tensor.dtype not in ITEM_BYTES or not whole:
            raise ValueError(f"{tensor} is no tensor")
    names = [tensor.name for tensor in tensors]
    if names != sorted(set(names)):
        raise ValueError("its tensors are not in order")
    return tensors


def _names(text: bytes) -> tuple[str, ...]:
    names = tuple(_table(text))
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a file has no name")
    return names


def _table(text: bytes) -> list[Any]:
    table = json.loads(text)
    if _json(table) != text:  # JSON can say the same in other ways
        raise ValueError("it is not as it was written")
    return table


def _check_fit(index: Index) -> None:
    chunks, dims = index.chunks, index.chunks.sizes.shape[1]
    if any(len(tensor.shape) > dims for tensor in index.tensors):
        raise ValueError("a tensor has more dims than its chunks")
    if len(index.files) != len(index.file_bytes) or not len(chunks.tensor) == len(chunks.file) == len(chunks.data):
        raise ValueError("its columns do not fit together")
    if (np.diff(chunks.tensor) < 0).any() or (chunks.tensor >= len(index.tensors)).any():
        raise ValueError("a chunk belongs to no tensor")
    if (chunks.file >= len(index.files)).any():
        raise ValueError("a chunk lies in no file")
    if (chunks.data + index.chunk_bytes > index.file_bytes[chunks.file]).any():
        raise ValueError("a chunk lies behind its file's end")


def _weights(tensor: NDArray[Any], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """What each box weighs, modulo 2**64: [boxes] from [boxes], [boxes, max_dims], [boxes, max_dims]."""
    weights = np.ones(len(tensor), dtype=np.uint64)
    for dim in range(starts.shape[1]):
        line = _scramble(tensor.astype(np.uint64) * np.uint64(starts.shape[1]) + np.uint64(dim))
        weights *= _scramble(line + ends[:, dim].astype(np.uint64)) - _scramble(line + starts[:, dim].astype(np.uint64))
    return weights


def _scramble(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers that look random, a fixed one for each: SplitMix64 (Steele, Lea, Flood 2014, figure 17)."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
