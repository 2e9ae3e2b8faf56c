"""What the ranks read, each by the same plan: every block that one of them needs once, and every number in its place."""

import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import KINDS, box, differences, state
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.checkpoint import index as index_module
from goku_mega.checkpoint import reading
from goku_mega.checkpoint.agree import Ranks
from goku_mega.checkpoint.load import Stored, load_into
from goku_mega.checkpoint.reading import _boxes, read_boxes
from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.checkpoint.storage import LocalFolder
from goku_mega.errors import CheckpointError, DamagedCheckpoint
from goku_mega.parallel.shards import Shard
from launch import run_ranks

# --- Boxes of a range ------------------------------------------------------------------------------------------------


@st.composite
def ranges(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Sizes of a box, and a range of its numbers."""
    sizes = draw(st.lists(st.integers(1, 6), max_size=5))
    first, last = sorted(draw(st.lists(st.integers(0, math.prod(sizes)), min_size=2, max_size=2)))
    return sizes, first, last


@given(ranges())
@settings(max_examples=1000, deadline=None)
def test_a_range_of_numbers_is_cut_into_few_boxes_that_are_exactly_it(case: tuple[list[int], int, int]) -> None:
    sizes, first, last = case
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    found = []
    for corner, lengths, start in _boxes(sizes, first, last):
        part = numbers[tuple(slice(c, c + n) for c, n in zip(corner, lengths, strict=True))].ravel()
        assert part.tolist() == list(range(start, start + math.prod(lengths)))  # one stretch of memory
        found += part.tolist()
    assert found == list(range(first, last))
    assert len(list(_boxes(sizes, first, last))) <= max(1, 2 * len(sizes) - 1)


# --- Real ranks ------------------------------------------------------------------------------------------------------

SMALL_BLOCK = 4096
ROWS, COLUMNS = 512, 96


@contextmanager
def small_blocks() -> Iterator[None]:
    """Many blocks and many rounds without much data."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (index_module, reading):
            patch.setattr(module, "BLOCK_BYTES", SMALL_BLOCK)
        patch.setattr("goku_mega.checkpoint.save_plan.BLOCK_BYTES", SMALL_BLOCK)
        patch.setattr("goku_mega.checkpoint.commit.BLOCK_BYTES", SMALL_BLOCK)
        patch.setattr("goku_mega.checkpoint.manifest.BLOCK_BYTES", SMALL_BLOCK)
        patch.setattr(reading, "ROUND_BYTES", 16 * SMALL_BLOCK)
        patch.setattr(reading, "READ_BYTES", 4 * SMALL_BLOCK)
        yield


@dataclass(frozen=True)
class Counting:
    """A folder that notes what is read of it."""

    folder: LocalFolder
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    """File, first byte, and the byte behind the last."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.reads.append((name, start, start + len(buffer)))
        self.folder.read_into(name, start, buffer)

    def __str__(self) -> str:
        return str(self.folder)


def weight() -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)


def boxes(kind: str, rank: int, world: int, value: torch.Tensor | None) -> dict[str, Shard]:
    """This rank's boxes of two tensors; NaN where there is no value."""
    offsets, sizes, copies = box(kind, (ROWS, COLUMNS), rank, world)
    made = {}
    for name in ("a", "b"):
        shard = Shard(torch.full(sizes, math.nan), (ROWS, COLUMNS), offsets, copies)
        if value is not None:
            shard.tensor.copy_(shard.take(value))
        made[name] = shard
    return made


def save_kind(rank: int, world: int, kind: str, folder: str) -> None:
    with small_blocks():
        save_checkpoint(folder, 1, {"model": boxes(kind, rank, world, weight())}, {}, keep=1)


@dataclass(frozen=True)
class Read:
    """What one rank did."""

    reads: list[tuple[str, int, int]]
    needed: set[tuple[str, int]]
    """File and number of the blocks that hold something of its boxes."""
    wrong: list[str]
    from_kernel: int
    """Bytes that its read calls returned, as the kernel counts them."""


def read_kind(rank: int, world: int, kind: str, folder: str, ranks_a_node: int, parts: tuple[str, ...]) -> Read:
    """Read `parts` of a checkpoint as `kind` cuts them; the ranks are on nodes of so many."""
    with small_blocks():
        stored = Stored.open(f"{folder}/step_00000001")
        place = stored.folder
        assert isinstance(place, LocalFolder)
        folder_here, mine = Counting(place), boxes(kind, rank, world, None)
        shards = {f"model/{name}": shard for name, shard in mine.items() if name in parts}
        before = rchar()
        read_boxes(folder_here, stored.index, shards, Ranks.of(None), node=f"node {rank // ranks_a_node}")  # type: ignore[arg-type]
        counted = rchar() - before
        wrong = [
            name
            for name, shard in mine.items()
            if name in parts and not torch.equal(shard.tensor, shard.take(weight()))
        ]
        wrong += [name for name, shard in mine.items() if name not in parts and not shard.tensor.isnan().all()]
        return Read(folder_here.reads, blocks_of(stored, shards), wrong, counted)


def rchar() -> int:
    """Bytes that this process has read so far; sockets and pipes are not among them."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def blocks_of(stored: Stored, shards: dict[str, Shard]) -> set[tuple[str, int]]:
    """Worked out number by number, as slowly and as plainly as can be."""
    index, blocks = stored.index, set()
    for name, shard in shards.items():
        rows = index.chunks_of(name)
        for row in range(rows.start, rows.stop):
            at = index.chunks.offsets[row].tolist()
            size = index.chunks.sizes[row].tolist()
            held = np.zeros(size, dtype=bool)
            held[
                tuple(
                    slice(max(o - a, 0), max(o + n - a, 0))
                    for a, o, n in zip(at, shard.offsets, shard.tensor.shape, strict=True)
                )
            ] = True
            numbers = np.flatnonzero(held)
            if len(numbers):  # from the first of them to the last
                data = int(index.chunks.data[row])
                first, last = data + 4 * int(numbers[0]), data + 4 * int(numbers[-1]) + 3
                blocks |= {
                    (index.files[index.chunks.file[row]], block)
                    for block in range(first // SMALL_BLOCK, last // SMALL_BLOCK + 1)
                }
    return blocks


CASES = [
    (2, "rows", 4, "rows"), (4, "rows", 2, "rows"), (2, "rows", 2, "columns"), (2, "columns", 4, "rows"),
    (3, "rows", 2, "replicas"), (4, "replicas", 3, "grid"), (1, "rows", 4, "replicas"), (4, "grid", 4, "columns"),
]  # fmt: skip


@pytest.mark.parametrize("ranks_a_node", [4, 1], ids=["one node", "a node each"])
@pytest.mark.parametrize(("saved_on", "saved_as", "read_on", "read_as"), CASES)
def test_every_block_is_read_by_one_rank_and_nothing_else_is(
    tmp_path: Path, saved_on: int, saved_as: str, read_on: int, read_as: str, ranks_a_node: int
) -> None:
    run_ranks(save_kind, saved_on, saved_on, saved_as, str(tmp_path))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "step_00000001").iterdir()}
    for parts in (("a", "b"), ("b",), ()):
        found = run_ranks(read_kind, read_on, read_on, read_as, str(tmp_path), ranks_a_node, parts)
        assert [one.wrong for one in found] == [[]] * read_on
        needed = set().union(*(one.needed for one in found))
        reads = [read for one in found for read in one.reads]
        blocks = [
            (name, block) for name, start, end in reads for block in range(start // SMALL_BLOCK, -(-end // SMALL_BLOCK))
        ]
        assert len(blocks) == len(set(blocks))
        assert set(blocks) == needed
        bytes_needed = sum(min(SMALL_BLOCK, sizes[name] - block * SMALL_BLOCK) for name, block in needed)
        assert sum(end - start for _, start, end in reads) == bytes_needed
        assert all(
            one.needed >= {(n, s // SMALL_BLOCK) for n, s, _ in one.reads} for one in found
        )  # no rank for another


@pytest.mark.parametrize("ranks_a_node", [4, 1], ids=["one node", "a node each"])
def test_the_kernel_counts_no_byte_twice(tmp_path: Path, ranks_a_node: int) -> None:
    """By /proc: stock readers read whole shards on each rank that needs a part of them."""
    run_ranks(save_kind, 2, 2, "rows", str(tmp_path))
    stored = sum(path.stat().st_size for path in (tmp_path / "step_00000001").glob("*.distcp"))
    found = run_ranks(read_kind, 4, 4, "columns", str(tmp_path), ranks_a_node, ("a", "b"))
    assert stored <= sum(one.from_kernel for one in found) <= 1.1 * stored  # and what gloo reads beside
    shares = [sum(end - start for _, start, end in one.reads) for one in found]
    assert max(shares) <= 1.2 * np.mean(shares)  # all read alike
