"""What the ranks read, each by the same plan: every block that one of them needs once, and each number to its place."""

import errno
import gc
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
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
from goku_mega.errors import DamagedCheckpoint
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


def save_kinds(rank: int, world: int, folder: Path) -> None:
    with small_blocks():
        for kind in KINDS:
            save_checkpoint(folder / f"{world}-{kind}", 1, {"model": boxes(kind, rank, world, weight())}, {}, keep=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of jobs of 2 and of 3 ranks that cut the tensors in every way."""
    folder = tmp_path_factory.mktemp("saved")
    for world in (2, 3):
        run_ranks(save_kinds, world, world, folder)
    return folder


@dataclass(frozen=True)
class Case:
    """A load."""

    checkpoint: str
    kind: str
    parts: tuple[str, ...]
    ranks_a_node: int


@dataclass(frozen=True)
class Read:
    """What one rank did."""

    reads: list[tuple[str, int, int]]
    needed: set[tuple[str, int]]
    """File and number of the blocks that hold something of its boxes."""
    wrong: list[str]
    from_kernel: int
    """Bytes that its read calls returned, as the kernel counts them."""


def read_all(rank: int, world: int, folder: Path, cases: list[Case]) -> list[Read]:
    with small_blocks():
        return [read_case(rank, world, folder, case) for case in cases]


def read_case(rank: int, world: int, folder: Path, case: Case) -> Read:
    stored = Stored.open(folder / case.checkpoint / "step_00000001")
    assert isinstance(stored.folder, LocalFolder)
    here, mine = Counting(stored.folder), boxes(case.kind, rank, world, None)
    shards = {f"model/{name}": shard for name, shard in mine.items() if name in case.parts}
    before = rchar()
    read_boxes(here, stored.index, shards, Ranks.of(None), node=f"node {rank // case.ranks_a_node}")  # type: ignore[arg-type]
    counted = rchar() - before
    wrong = [
        name
        for name, shard in mine.items()
        if not (torch.equal(shard.tensor, shard.take(weight())) if name in case.parts else shard.tensor.isnan().all())
    ]
    return Read(here.reads, blocks_of(stored, shards), wrong, counted)


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


@pytest.mark.parametrize("world", [2, 4])
def test_every_block_is_read_by_one_rank_that_needs_it_and_nothing_else_is(saved: Path, world: int) -> None:
    """On one node, and with each rank on a node of its own, where the blocks travel over the network."""
    cases = [
        Case(checkpoint.name, kind, parts, ranks_a_node)
        for checkpoint in sorted(saved.iterdir())
        for kind in KINDS
        for parts, ranks_a_node in ((("a", "b"), world), (("a", "b"), 1))
    ]
    cases += [Case("3-rows", "columns", parts, nodes) for parts in (("b",), ()) for nodes in (world, 1, 2)]
    found = run_ranks(read_all, world, world, saved, cases)
    for case, ranks in zip(cases, zip(*found, strict=True), strict=True):
        assert [rank.wrong for rank in ranks] == [[]] * world, case
        needed = set().union(*(rank.needed for rank in ranks))
        reads = [read for rank in ranks for read in rank.reads]
        blocks = [
            (file, block) for file, start, end in reads for block in range(start // SMALL_BLOCK, -(-end // SMALL_BLOCK))
        ]
        assert len(blocks) == len(set(blocks)), case
        assert set(blocks) == needed, case
        for rank in ranks:
            assert rank.needed >= {(file, start // SMALL_BLOCK) for file, start, _ in rank.reads}, case
        folder = saved / case.checkpoint / "step_00000001"
        wanted = sum(min(SMALL_BLOCK, (folder / file).stat().st_size - SMALL_BLOCK * block) for file, block in needed)
        assert sum(end - start for _, start, end in reads) == wanted, case
        if set(case.parts) == {"a", "b"}:
            assert wanted >= 2 * ROWS * COLUMNS * 4


def test_the_kernel_counts_every_byte_once(saved: Path) -> None:
    cases = [Case("2-rows", "columns", ("a", "b"), ranks_a_node) for ranks_a_node in (4, 4, 1)]
    found = run_ranks(read_all, 4, 4, saved, cases)
    stored = sum(path.stat().st_size for path in (saved / "2-rows" / "step_00000001").glob("*.distcp"))
    for number in (1, 2):  # the first read of a process takes in what Python had not loaded yet
        ranks = [rank[number] for rank in found]
        assert stored <= sum(rank.from_kernel for rank in ranks) <= 1.1 * stored
        shares = [sum(end - start for _, start, end in rank.reads) for rank in ranks]
        assert max(shares) <= 1.2 * np.mean(shares)


# --- Faults on one rank ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failing:
    """A folder that cannot be read on this rank."""

    folder: LocalFolder
    error: Exception

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        raise self.error

    def __str__(self) -> str:
        return str(self.folder)


def read_with_a_fault(rank: int, world: int, folder: Path, ranks_a_node: int) -> list[str]:
    said = []
    with small_blocks():
        stored = Stored.open(folder / "2-rows" / "step_00000001")
        assert isinstance(stored.folder, LocalFolder)
        for error in (OSError(errno.EIO, "Input/output error"), PermissionError("no"), EOFError("ends")):
            shards = {f"model/{name}": shard for name, shard in boxes("columns", rank, world, None).items()}
            here = Failing(stored.folder, error) if rank == 1 else stored.folder
            try:
                read_boxes(here, stored.index, shards, Ranks.of(None), node=f"node {rank // ranks_a_node}")  # type: ignore[arg-type]
            except (OSError, DamagedCheckpoint) as caught:
                said.append(f"{type(caught).__name__}: {caught}")
    return said


@pytest.mark.parametrize("ranks_a_node", [3, 1], ids=["one node", "a node each"])
def test_what_fails_on_one_rank_ends_the_load_on_all_alike(saved: Path, ranks_a_node: int) -> None:
    first, *others = run_ranks(read_with_a_fault, 3, 3, saved, ranks_a_node, timeout_s=60)
    assert others == [first, first]
    assert [line.split(":")[0] for line in first] == ["DamagedCheckpoint", "PermissionError", "DamagedCheckpoint"]


def test_nothing_is_left_of_a_load(tmp_path: Path) -> None:
    """No thread, no descriptor and no shared memory."""
    path = save_checkpoint(tmp_path, 1, state("rows"), {}, keep=1)
    mine = state("columns", step=None)
    load_into(path, mine)
    before = left_over()
    for _ in range(20):
        load_into(path, mine)
    assert left_over() == before
    assert differences(mine) == []


def left_over() -> tuple[list[str], int, int]:
    gc.collect()
    descriptors = sorted(
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    )
    shared = Path("/proc/self/maps").read_text().count("goku-checkpoint")
    return descriptors, shared, threading.active_count()
