"""The `.metadata` file of torch's distributed checkpoint, so that torch's own tools read our folders.

It is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. As Python objects the millions of chunks of a big
run take minutes and gigabytes, so the pickle is written as what it is: a program of opcodes, in which all chunks are
records of one length that numpy fills. We write this file and never read it. Nothing here needs torch.
"""

import pickle
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.checkpoint.index import Index

_CLASSES = {
    "Metadata": "torch.distributed.checkpoint.metadata",
    "TensorStorageMetadata": "torch.distributed.checkpoint.metadata",
    "TensorProperties": "torch.distributed.checkpoint.metadata",
    "ChunkStorageMetadata": "torch.distributed.checkpoint.metadata",
    "MetadataIndex": "torch.distributed.checkpoint.metadata",
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "Size": "torch",
}
_CALL = {1: pickle.TUPLE1 + pickle.REDUCE, 2: pickle.TUPLE2 + pickle.REDUCE, 3: pickle.TUPLE3 + pickle.REDUCE}
"""Call the function below the last 1, 2 or 3 values with them."""

_Part = bytes | NDArray[Any]
"""Of a record: bytes that are the same in all of them, or one little-endian number for each."""


def torch_metadata(index: Index) -> bytes:
    """The content of `.metadata` for `index`: the tensors, their chunks, and the file, place and length of each.

    A chunk's place begins at its torch head and ends with its numbers.
    """
    # The machine that reads the pickle keeps values it is told to in numbered places; ours are, in this order,
    # the classes, the files' names, the tensors' names, and the chunks' offsets.
    first_file = len(_CLASSES)
    first_name = first_file + len(index.files)
    first_chunk = first_name + len(index.tensors)
    classes = (_global(module, name) for name, module in _CLASSES.items())
    kept = [_keep(value, place) for place, value in enumerate([*classes, *map(_string, index.files)])]
    return b"".join(
        [
            pickle.PROTO + b"\x02",
            *kept,
            _class("Metadata"),
            *_state_dict_metadata(index, first_name, first_chunk),
            pickle.NONE,
            *_storage_data(index, first_file, first_name, first_chunk),
            _CALL[3],
            pickle.STOP,
        ]
    )


def _state_dict_metadata(index: Index, first_name: int, first_chunk: int) -> list[bytes | memoryview]:
    """{name: TensorStorageMetadata(TensorProperties(dtype), Size(shape), [chunk, ...])}"""
    pieces: list[bytes | memoryview] = [pickle.EMPTY_DICT, pickle.MARK]
    records = _chunk_records(index, first_chunk)
    for number, tensor in enumerate(index.tensors):
        shape = np.array([tensor.shape], dtype=np.int64).reshape(1, -1)
        pieces += [
            _string(tensor.name),
            pickle.LONG_BINPUT + struct.pack("<I", first_name + number),
            _class("TensorStorageMetadata"),
            _class("TensorProperties") + _global("torch", tensor.dtype) + _CALL[1],
            _records(1, _size(shape)).tobytes(),
            pickle.EMPTY_LIST + pickle.MARK,
            records[number],
            pickle.APPENDS,
            _CALL[3],
        ]
    return [*pieces, pickle.SETITEMS]


def _chunk_records(index: Index, first_chunk: int) -> list[memoryview]:
    """For each tensor ChunkStorageMetadata(Size(offsets), Size(sizes)) of all its chunks; the offsets are kept."""
    chunks, dims = index.chunks, np.array([len(tensor.shape) for tensor in index.tensors], dtype=np.int64)
    places = np.arange(first_chunk, first_chunk + len(chunks), dtype="<u4")
    of_tensor = [memoryview(b"")] * len(index.tensors)
    for count in np.unique(dims):
        rows = np.flatnonzero(dims[chunks.tensor] == count)
        table = _records(
            len(rows),
            [
                _class("ChunkStorageMetadata"),
                *_size(chunks.offsets[rows, :count]),
                pickle.LONG_BINPUT,
                places[rows],
                *_size(chunks.sizes[rows, :count]),
                _CALL[2],
            ],
        )
        numbers = np.flatnonzero(dims == count)
        starts, ends = (np.searchsorted(chunks.tensor[rows], numbers, side=side) for side in ("left", "right"))
        for number, start, end in zip(numbers, starts, ends, strict=True):
            of_tensor[number] = table[start:end].reshape(-1).data
    return of_tensor


def _storage_data(index: Index, first_file: int, first_name: int, first_chunk: int) -> list[bytes]:
    """{MetadataIndex(name, offsets): _StorageInfo(file, first byte, bytes)}"""
    chunks = index.chunks
    table = _records(
        len(chunks),
        [
            _class("MetadataIndex"),
            pickle.LONG_BINGET,
            (first_name + chunks.tensor).astype("<u4"),
            pickle.LONG_BINGET,
            np.arange(first_chunk, first_chunk + len(chunks), dtype="<u4"),
            _CALL[2],
            _class("_StorageInfo"),
            pickle.LONG_BINGET,
            (first_file + chunks.file).astype("<u4"),
            *_integer(chunks.head),
            *_integer(chunks.data + index.chunk_bytes - chunks.head),
            _CALL[3],
        ],
    )
    return [pickle.EMPTY_DICT, pickle.MARK, table.tobytes(), pickle.SETITEMS]


def _records(count: int, parts: Sequence[_Part]) -> NDArray[np.uint8]:
    """[count, bytes of a record]"""
    constant = b"".join(part if isinstance(part, bytes) else bytes(part.dtype.itemsize) for part in parts)
    table = np.empty((count, len(constant)), dtype=np.uint8)
    table[:] = np.frombuffer(constant, dtype=np.uint8)
    start = 0
    for part in parts:
        width = len(part) if isinstance(part, bytes) else part.dtype.itemsize
        if not isinstance(part, bytes):
            table[:, start : start + width].view(part.dtype)[:, 0] = part
        start += width
    return table


def _size(lengths: NDArray[np.int64]) -> list[_Part]:
    """torch.Size(lengths), for `lengths` [records, dims]."""
    numbers = [part for column in lengths.T for part in _integer(column)]
    return [_class("Size") + pickle.MARK, *numbers, pickle.TUPLE + _CALL[1]]


def _integer(numbers: NDArray[np.int64]) -> list[_Part]:
    """An integer that is at least 0: of four bytes if all of the records' numbers have room in that, else of eight."""
    if numbers.max(initial=0) < 2**31:
        return [pickle.BININT, numbers.astype("<i4")]
    return [pickle.LONG1 + b"\x08", numbers.astype("<i8")]


def _class(name: str) -> bytes:
    return pickle.BINGET + bytes([list(_CLASSES).index(name)])


def _keep(value: bytes, place: int) -> bytes:
    return value + pickle.LONG_BINPUT + struct.pack("<I", place) + pickle.POP


def _string(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
