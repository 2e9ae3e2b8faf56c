"""Whole tensors known by name, and many ways to cut them over ranks."""

import math
from pathlib import Path

import torch
from torch import Tensor

from goku_mega.checkpoint.load import Place, Stored, load_named, load_newest, location
from goku_mega.checkpoint.state import State
from goku_mega.checkpoint.tools import content_faults
from goku_mega.errors import DamagedCheckpoint
from goku_mega.parallel.shards import Copies, Shard
from goku_mega.seeding import derive_seed

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "blocks.0.mlp.fc1.weight": ((11, 6), torch.float32),
    "blocks.0.mlp.fc1.bias": ((11,), torch.float32),
    "blocks.1.patch.weight": ((3, 4, 5), torch.bfloat16),
    "final.weight": ((1, 7), torch.float64),
    "scale": ((), torch.float32),
}
KINDS = ("rows", "columns", "grid", "replicas")
PARTS = ("model", "ema", "exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...], Copies]
"""Offsets, sizes, and which copy it is."""


def whole(part: str, name: str, step: int = 0) -> Tensor:
    """The global tensor, a function of its names and the step."""
    shape, dtype = SHAPES[name]
    generator = torch.Generator().manual_seed(derive_seed(part, name, step))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def box(kind: str, shape: tuple[int, ...], rank: int, world: int) -> Box:
    """This rank's box under a way of cutting: uneven, with empty boxes and replicas where they arise."""
    if not shape or kind == "replicas":
        return (0,) * len(shape), shape, Copies(rank, world, ("replicate",))
    if kind == "rows" or len(shape) == 1:
        return (*_cut(shape, 0, rank, world), Copies())
    if kind == "columns":
        return (*_cut(shape, 1, rank, world), Copies())
    columns = 2 if world % 2 == 0 else 1  # tensor parallel columns, the rest of the ranks hold row shards
    row_offsets, row_sizes = _cut(shape, 0, rank // columns, world // columns)
    offsets, sizes = _cut(shape, 1, rank % columns, columns)
    return (row_offsets[0], *offsets[1:]), (row_sizes[0], *sizes[1:]), Copies()


def _cut(shape: tuple[int, ...], dim: int, rank: int, world: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    length = math.ceil(shape[dim] / world)  # as FSDP2 cuts: the last ranks get less, or nothing
    start = min(rank * length, shape[dim])
    end = min(start + length, shape[dim])
    offsets = tuple(start if axis == dim else 0 for axis in range(len(shape)))
    return offsets, tuple(end - start if axis == dim else size for axis, size in enumerate(shape))


def state(kind: str, rank: int = 0, world: int = 1, *, step: int | None = 0, parts: tuple[str, ...] = PARTS) -> State:
    """This rank's boxes, filled with the values of `step`, or with NaN if it is None."""
    return {part: {name: _shard(kind, part, name, rank, world, step) for name in SHAPES} for part in parts}


def _shard(kind: str, part: str, name: str, rank: int, world: int, step: int | None) -> Shard:
    shape, dtype = SHAPES[name]
    offsets, sizes, copies = box(kind, shape, rank, world)
    shard = Shard(torch.full(sizes, math.nan, dtype=dtype), shape, offsets, copies)
    if step is not None:
        shard.tensor.copy_(shard.take(whole(part, name, step)))
    return shard


def differences(loaded: State, step: int = 0, *, stored: str | None = None) -> list[str]:
    """Names of the boxes that are not bitwise the values of `step` (of the part `stored`, if it is another)."""
    return [
        f"{part}/{name}"
        for part, shards in loaded.items()
        for name, shard in shards.items()
        if not torch.equal(shard.tensor, shard.take(whole(stored or part, name, step)))
    ]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def find_latest(place: Place, *, verify: bool = True) -> Path | None:
    """The checkpoint that a run would go on from; with `verify`, one of which every byte is as it was written."""
    loaded = load_newest(place, _read_all if verify else lambda stored: None)
    return None if loaded is None else Path(location(loaded[0].folder))


def open_checkpoint(place: Place) -> Path:
    """The checkpoint that `goku-mega sample` would take, every byte of it as it was written."""
    stored, _ = load_named(place, _read_all)
    return Path(location(stored.folder))


def _read_all(stored: Stored) -> None:
    (fault,) = content_faults([stored.folder])
    if fault is not None:
        raise DamagedCheckpoint(fault)
