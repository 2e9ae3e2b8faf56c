"""Reads boxes of a checkpoint's tensors one after the other, for those who pass them on and keep none."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from goku_mega.checkpoint.load import Stored
from goku_mega.parallel.shards import Shard

BATCH_BYTES = 64 * 2**20
"""What is read at once. Small tensors share the blocks of a file, which are read whole to be checked."""


class Part(NamedTuple):
    """A box of a stored tensor, and the type to read it as."""

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def read_in_turn(stored: Stored, parts: Iterable[Part]) -> Iterator[Tensor]:
    """Each part on the host, in the order given. No more than BATCH_BYTES, or one part, is in memory.

    Raises:
        CheckpointError: a file is damaged or cannot be read.
    """
    batch: dict[str, Part] = {}
    size = 0
    for part in parts:
        if batch and (size + part.bytes > BATCH_BYTES or part.name in batch):
            yield from _read(stored, list(batch.values()))
            batch, size = {}, 0
        batch[part.name] = part
        size += part.bytes
    yield from _read(stored, list(batch.values()))


def _read(stored: Stored, batch: list[Part]) -> Iterator[Tensor]:
    tensors = {part.name: torch.empty(part.sizes, dtype=part.dtype) for part in batch}
    numbers = stored.index.by_name
    stored.fill({
        part.name: Shard(tensors[part.name], stored.index.tensors[numbers[part.name]].shape, part.offsets)
        for part in batch
    })  # fmt: skip
    for part in batch:
        yield tensors.pop(part.name)
