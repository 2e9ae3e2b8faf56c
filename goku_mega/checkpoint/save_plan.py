"""What one rank writes, worked out by each rank for itself: nothing is gathered, so nothing has to wait.

Ranks that hold copies of the same boxes lay them end to end and each writes its equal share of the whole, so every
number is written once and all write alike. A share ends between rows of a box.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from goku_mega.checkpoint.index import BLOCK_BYTES, ITEM_BYTES, Chunks, Index, StoredTensor
from goku_mega.checkpoint.torch_file import torch_head
from goku_mega.parallel.shards import Copies

ALIGNMENT = 64
"""Bytes; where a chunk's numbers begin in a file, so that they can be used in place."""
PAGE_BYTES = 4096
"""A file is filled up to whole pages, so that it can be written past the page cache."""


@dataclass(frozen=True)
class Box:
    """A rank's part of a stored tensor, and which of its copies the rank has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    copies: Copies

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Piece:
    """Rows of a box that this rank writes as one chunk, and where they go in its file."""

    box: Box
    offsets: tuple[int, ...]
    """Where the piece begins in the whole tensor."""
    sizes: tuple[int, ...]
    head: int
    """Byte of the file where torch's head of the chunk begins."""
    data: int
    """Byte of the file where its numbers begin."""

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * ITEM_BYTES[self.box.dtype]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The piece in the rank's own tensor."""
        starts = (at - begin for at, begin in zip(self.offsets, self.box.offsets, strict=True))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


@dataclass(frozen=True)
class SavePlan:
    """The file of one rank."""

    pieces: tuple[Piece, ...]
    file_bytes: int

    def index(self, file: str) -> Index:
        """What the file holds; its checksums are zeros."""
        tensors = sorted({StoredTensor(p.box.name, p.box.dtype, p.box.shape) for p in self.pieces}, key=_name)
        number = {tensor.name: position for position, tensor in enumerate(tensors)}
        pieces = sorted(self.pieces, key=lambda piece: (piece.box.name, piece.offsets))
        dims = max((len(piece.sizes) for piece in pieces), default=0)

        def column(values: Sequence[int] | Sequence[tuple[int, ...]], kind: type[np.signedinteger]) -> np.ndarray:
            return np.array(values, dtype=kind)

        chunks = Chunks(
            tensor=column([number[piece.box.name] for piece in pieces], np.int32),
            file=np.zeros(len(pieces), dtype=np.int32),
            head=column([piece.head for piece in pieces], np.int64),
            data=column([piece.data for piece in pieces], np.int64),
            offsets=column([_filled(p.offsets, dims, 0) for p in pieces], np.int64).reshape(len(pieces), dims),
            sizes=column([_filled(p.sizes, dims, 1) for p in pieces], np.int64).reshape(len(pieces), dims),
        )
        blocks = -(-self.file_bytes // BLOCK_BYTES)
        return Index(
            tensors=tuple(tensors), files=(file,), chunks=chunks,
            file_bytes=np.array([self.file_bytes], dtype=np.int64), digests=(np.zeros(blocks, dtype=np.uint64),),
        )  # fmt: skip


def plan_rank(boxes: Sequence[Box]) -> SavePlan:
    """The pieces of `boxes` that this rank writes, in their order, and the places in its file.

    Ranks with copies of the same boxes must give them in the same order.
    """
    shared: dict[tuple[str, ...], list[Box]] = {}
    for box in boxes:
        if box.bytes:
            shared.setdefault(box.copies.over, []).append(box)
    chosen = {box.name: rows for alike in shared.values() for box, rows in _share(alike)}
    pieces, end = [], 0
    for box in boxes:
        if box.name in chosen:
            first, last = chosen[box.name]
            dim = _rows_dim(box)
            offsets = tuple(at + (first if axis == dim else 0) for axis, at in enumerate(box.offsets))
            sizes = tuple(last - first if axis == dim else size for axis, size in enumerate(box.sizes))
            head = len(torch_head(box.dtype, sizes))
            data = -(-(end + head) // ALIGNMENT) * ALIGNMENT
            pieces.append(Piece(box, offsets, sizes, data - head, data))
            end = data + pieces[-1].bytes
    return SavePlan(tuple(pieces), -(-end // PAGE_BYTES) * PAGE_BYTES)


def _share(boxes: Sequence[Box]) -> list[tuple[Box, tuple[int, int]]]:
    """Boxes, and their rows from first to last, that this copy's rank writes of what all its copies hold."""
    copies = boxes[0].copies
    ends = list(accumulate(box.bytes for box in boxes))
    cuts = [ends[-1] * number // copies.count for number in (copies.number, copies.number + 1)]
    first, last = (bisect.bisect_right(ends, cut) for cut in cuts)
    share = []
    for position in range(first, min(last, len(boxes) - 1) + 1):
        box = boxes[position]
        begin = ends[position] - box.bytes
        rows = [_row(box, cut - begin) for cut in cuts]
        if rows[1] > rows[0]:
            share.append((box, (rows[0], rows[1])))
    return share


def _rows_dim(box: Box) -> int:
    """The axis whose rows lie one after the other in the box's memory: the first that has more than one."""
    return next((axis for axis, size in enumerate(box.sizes) if size > 1), 0)


def _row(box: Box, at: int) -> int:
    """The row nearest to a byte of the box, from before it to behind it."""
    rows = box.sizes[_rows_dim(box)] if box.sizes else 1
    return max(0, min(rows, round(at * rows / box.bytes)))


def _filled(values: tuple[int, ...], dims: int, filler: int) -> tuple[int, ...]:
    return values + (filler,) * (dims - len(values))


def _name(tensor: StoredTensor) -> str:
    return tensor.name
