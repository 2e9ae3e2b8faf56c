"""What the ranks write, each by its own plan: together every number once, alike, and at places that can be used."""

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.checkpoint.commit import joined
from goku_mega.checkpoint.index import ITEM_BYTES, Index
from goku_mega.checkpoint.save_plan import ALIGNMENT, PAGE_BYTES, Box, Piece, SavePlan, plan_rank
from goku_mega.checkpoint.torch_file import torch_head
from goku_mega.parallel.shards import Copies

Grid = tuple[tuple[int, ...], ...]
"""For each axis of a tensor where it is cut, from 0 to its length."""


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """A tensor of up to three axes, and its boxes; some may be empty, as uneven sharding leaves them."""
    shape = draw(st.lists(st.integers(1, 40), max_size=3))
    return tuple((0, *sorted(draw(st.lists(st.integers(0, length), max_size=3))), length) for length in shape)


@st.composite
def jobs(draw: st.DrawFn) -> list[list[Box]]:
    """The boxes of every rank: each tensor is cut over one axis of the ranks and copied over the other."""
    holders, copies = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    dtypes = draw(st.lists(st.sampled_from(sorted(ITEM_BYTES)), min_size=1, max_size=8))
    ranks: list[list[Box]] = [[] for _ in range(holders * copies)]
    for number, dtype in enumerate(dtypes):
        cut = draw(grids())
        boxes = list(itertools.product(*(itertools.pairwise(at) for at in cut)))
        whole = draw(st.booleans())  # every rank has a copy of all of it
        for rank, own in enumerate(ranks):
            holder, copy = divmod(rank, copies)
            mine = boxes[holder] if holder < len(boxes) else None
            over = Copies(copy, copies, ("replicate",) if copies > 1 else ())
            if whole:
                mine, over = tuple((0, at[-1]) for at in cut), Copies(rank, len(ranks), ("shard", "replicate"))
            elif len(boxes) > holders:
                mine, over = tuple((0, at[-1]) for at in cut) if holder == 0 else None, over
            if mine is not None:
                own.append(
                    Box(f"t{number}", dtype, tuple(at[-1] for at in cut), tuple(a for a, _ in mine),
                        tuple(b - a for a, b in mine), over)
                )  # fmt: skip
    return ranks


def plans_of(ranks: list[list[Box]]) -> list[SavePlan]:
    return [plan_rank(boxes) for boxes in ranks]


def index_of(plans: list[SavePlan]) -> Index:
    return joined([plan.index(f"__{rank}_0.distcp") for rank, plan in enumerate(plans)])


@given(jobs())
@settings(max_examples=300, deadline=None)
def test_every_number_is_written_once(ranks: list[list[Box]]) -> None:
    plans = plans_of(ranks)
    index = index_of(plans)
    index.check_complete()
    assert {tensor.name for tensor in index.tensors} == {box.name for boxes in ranks for box in boxes}
    everything = sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in index.tensors)
    assert sum(piece.bytes for plan in plans for piece in plan.pieces) == everything


@given(jobs())
@settings(max_examples=100, deadline=None)
def test_a_rank_writes_nothing_that_it_does_not_hold(ranks: list[list[Box]]) -> None:
    for boxes, plan in zip(ranks, plans_of(ranks), strict=True):
        for piece in plan.pieces:
            assert piece.box in boxes
            for cut, size in zip(piece.slices, piece.box.sizes, strict=True):
                assert 0 <= cut.start < cut.stop <= size


@given(jobs())
@settings(max_examples=100, deadline=None)
def test_nothing_overlaps_in_a_file_and_numbers_are_aligned(ranks: list[list[Box]]) -> None:
    for plan in plans_of(ranks):
        places = sorted((piece.head, piece.data, piece.data + piece.bytes) for piece in plan.pieces)
        for _, data, end in places:
            assert data % ALIGNMENT == 0
            assert end <= plan.file_bytes
        assert all(end <= head for (_, _, end), (head, _, _) in itertools.pairwise(places))
        assert all(len(torch_head(p.box.dtype, p.sizes)) == p.data - p.head for p in plan.pieces)
        assert plan.file_bytes % PAGE_BYTES == 0
        assert plan.file_bytes - (places[-1][2] if places else 0) < PAGE_BYTES


@given(jobs())
@settings(max_examples=100, deadline=None)
def test_a_piece_lies_in_one_stretch_of_the_boxs_memory(ranks: list[list[Box]]) -> None:
    """So the copy off the device is one transfer a piece."""
    for boxes in ranks:
        for piece in plan_rank(boxes).pieces:
            numbers = np.arange(math.prod(piece.box.sizes)).reshape(piece.box.sizes)
            assert numbers[piece.slices].flags.c_contiguous
            assert numbers[piece.slices].size == math.prod(piece.sizes)


@given(st.integers(1, 300), st.lists(st.integers(200, 900), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_copies_write_alike(count: int, rows: list[int], ones: int) -> None:
    """No rank writes more than its equal share and a row at each end of it."""
    width = 64
    shapes = [(*(1,) * ones, length, width) for length in rows]

    def boxes(copy: int) -> list[Box]:
        copies = Copies(copy, count, ("replicate",))
        return [Box(f"t{n}", "float32", shape, (0,) * len(shape), shape, copies) for n, shape in enumerate(shapes)]

    plans = plans_of([boxes(copy) for copy in range(count)])
    index_of(plans).check_complete()
    written = [sum(piece.bytes for piece in plan.pieces) for plan in plans]
    share = sum(rows) * width * 4 / count
    assert max(written) <= share + width * 4
    assert min(written) >= share - width * 4


def test_large_boxes_spread_within_two_percent() -> None:
    """A block of the 8B model, with its moments, over every count of copies that a cluster may have."""
    shapes = {"qkv": (9216, 3072), "proj": (3072, 3072), "fc1": (12288, 3072), "fc2": (3072, 12288),
              "modulation": (18432, 3072), "bias": (12288,), "norm": (3072,)}  # fmt: skip
    for count in (2, 3, 7, 64, 128, 1000):
        plans = [
            plan_rank([
                Box(f"{part}/{name}", "float32", shape, (0,) * len(shape), shape, Copies(copy, count, ("replicate",)))
                for part in ("model", "ema", "exp_avg", "exp_avg_sq") for name, shape in shapes.items()
            ])
            for copy in range(count)
        ]  # fmt: skip
        index_of(plans).check_complete()
        assert max(plan.file_bytes for plan in plans) <= 1.02 * np.mean([plan.file_bytes for plan in plans])


def pieces_of(plan: SavePlan, name: str) -> list[Piece]:
    return [piece for piece in plan.pieces if piece.box.name == name]


def test_a_scalar_that_all_have_is_written_by_one() -> None:
    for count in (1, 2, 5, 64):
        plans = plans_of([[Box("step", "int64", (), (), (), Copies(c, count, ("shard",)))] for c in range(count)])
        assert sum(len(pieces_of(plan, "step")) for plan in plans) == 1
        index_of(plans).check_complete()


def test_a_rank_without_boxes_has_an_empty_file() -> None:
    for boxes in ([], [Box("w", "float32", (3, 4), (3, 0), (0, 4), Copies())]):
        plan = plan_rank(boxes)
        assert (plan.pieces, plan.file_bytes) == ((), 0)
        assert len(plan.index("__0_0.distcp").chunks) == 0
