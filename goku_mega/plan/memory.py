"""Bytes that one rank holds in training, from the model's shape and the layout alone. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from math import ceil
from typing import Literal, NamedTuple

from goku_mega.config.training import RecomputeConfig
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.layout import Layout
from goku_mega.plan.activations import Numerics, Pack, block_bytes, outside_bytes, passing_bytes
from goku_mega.plan.flops import TIMESTEP_FREQUENCIES

Policy = Literal["off", "selective", "full"]
POLICIES: tuple[Policy, ...] = ("off", "selective", "full")
"""From most memory and least time to least memory and most time."""

MUON_BUCKET_NUMBERS = 2**26
"""Numbers that Muon lays together at a time, unless one matrix has more."""
MUON_COPIES = 6
"""The laid out matrices, them stacked, normalised, and Newton-Schulz's two products and result."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of a rank at the moment it holds the most."""

    parameters: float
    gradients: float
    optimizer: float
    average: float
    """The moving average of the weights."""
    activations: float
    """What the backward pass reads, of all micro-batches under way, and one block's passing results."""
    buffers: float
    """Gathered weights and whole gradients of the blocks at work; of Muon, the matrices at work."""
    process: float
    """What a process has without its model."""

    @property
    def peak(self) -> float:
        state = self.parameters + self.gradients + self.optimizer + self.average
        return state + self.activations + self.buffers + self.process


class Matrix(NamedTuple):
    """A parameter's shape (a vector has one column) and which axis tensor parallelism splits."""

    rows: int
    columns: int = 1
    split: Literal["rows", "columns"] | None = None

    def shard(self, tp: int, ranks: int) -> int:
        """Numbers of the first of `ranks` FSDP ranks: they share the rows, the first has the most."""
        rows = self.rows // tp if self.split == "rows" else self.rows
        columns = self.columns // tp if self.split == "columns" else self.columns
        return ceil(rows / ranks) * columns


def block_matrices(shape: ModelShape) -> tuple[Matrix, ...]:
    """The parameters of one block."""
    d, f = shape.hidden_size, shape.ffn_hidden_size
    modulation = (Matrix(6 * d, d, "rows"), Matrix(6 * d, split="rows"))
    inner_norms = (Matrix(d, split="rows"),) * 2
    self_attention = (Matrix(3 * d, d, "rows"), Matrix(d, d, "columns"), *inner_norms)
    cross_attention = (Matrix(d), Matrix(d, d, "rows"), Matrix(2 * d, d, "rows"), Matrix(d, d, "columns"), *inner_norms)
    ffn = (Matrix(d), Matrix(f, d, "rows"), Matrix(f, split="rows"), Matrix(d, f, "columns"), Matrix(d))
    return (*modulation, *self_attention, *(cross_attention if shape.text_width is not None else ()), *ffn)


def outside_matrices(shape: ModelShape) -> tuple[Matrix, ...]:
    """The parameters around the blocks that every part of the model has."""
    d = shape.hidden_size
    found = [Matrix(d, TIMESTEP_FREQUENCIES), Matrix(d), Matrix(d, d), Matrix(d)]
    if shape.text_width is not None:
        found += [Matrix(d, shape.text_width), Matrix(d), Matrix(d, d), Matrix(d)]
    if shape.classes is not None:
        found.append(Matrix(shape.classes + 1, d))
    return tuple(found)


def ends_matrices(shape: ModelShape, *, first: bool) -> tuple[Matrix, ...]:
    """The patch embedding, which goes with the first block, or the final layer, which goes with the last."""
    d, p = shape.hidden_size, shape.patch_dim
    if first:
        return Matrix(d, p), Matrix(d)
    return Matrix(2 * d, d, "rows"), Matrix(2 * d, split="rows"), Matrix(p, d), Matrix(p)


@cache
def block_numbers(shape: ModelShape, tp: int, ranks: int, *, matrices_only: bool = False) -> int:
    """Numbers of a block on one of `ranks` FSDP ranks that share a tensor-parallel part."""
    counted = (matrix for matrix in block_matrices(shape) if matrix.columns > 1 or not matrices_only)
    return sum(matrix.shard(tp, ranks) for matrix in counted)


@cache
def outside_numbers(shape: ModelShape, tp: int, ranks: int) -> int:
    """Numbers around the blocks, as `block_numbers`."""
    return sum(matrix.shard(tp, ranks) for matrix in outside_matrices(shape))


@cache
def ends_numbers(shape: ModelShape, tp: int, ranks: int, *, first: bool) -> int:
    """Numbers of the patch embedding or of the final layer, as `block_numbers`."""
    return sum(matrix.shard(tp, ranks) for matrix in ends_matrices(shape, first=first))


def model_numbers(shape: ModelShape, tp: int = 1, ranks: int = 1) -> int:
    """Numbers of the whole model, as `block_numbers`."""
    ends = sum(ends_numbers(shape, tp, ranks, first=first) for first in (True, False))
    return shape.layers * block_numbers(shape, tp, ranks) + outside_numbers(shape, tp, ranks) + ends


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a rank trains: all that decides its memory, but for the recomputation."""

    shape: ModelShape
    layout: Layout
    pack: Pack
    numerics: Numerics
    micro_batches: int = 1
    """Packs of a rank in one step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    process_bytes: float = 0.0
    """What the process has besides; 0 on a GPU, whose context the limit leaves out."""


def rank_memory(job: Job, recompute: RecomputeConfig) -> RankMemory:
    """The fullest rank at its fullest moment; the policy is off, selective or full."""
    # Of stages with equal parts, the first has the most passes under way.
    stages: dict[StageParts, int] = {}
    for stage, parts in enumerate(stage_parts(job, recompute)):
        stages.setdefault(parts, stage)
    moments = (moment for parts, stage in stages.items() for moment in _moments(job, stage, parts, recompute))
    return max(moments, key=lambda memory: memory.peak)


class StageParts(NamedTuple):
    """What a pipeline stage has of the model."""

    blocks: int
    recomputed: int
    """Of the blocks."""
    chunks: int
    is_first: bool
    """Whether it has the patch embedding."""
    is_last: bool
    """Whether it has the final layer."""


def stage_parts(job: Job, recompute: RecomputeConfig) -> list[StageParts]:
    """What is on each stage."""
    pp, layers = job.layout.pp, job.shape.layers
    edges = list(accumulate(job.layout.layers or (layers,), initial=0))
    before = list(accumulate((recompute.covers(block) for block in range(layers)), initial=0))
    chunks = [(stop - start, before[stop] - before[start]) for start, stop in pairwise(edges)]
    return [
        StageParts(
            blocks=sum(blocks for blocks, _ in chunks[stage::pp]),
            recomputed=sum(recomputed for _, recomputed in chunks[stage::pp]),
            chunks=job.layout.chunks,
            is_first=stage == 0,
            is_last=stage == pp - 1,
        )
        for stage in range(pp)
    ]


def passes_under_way(stage: int, layout: Layout, micro_batches: int) -> int:
    """Most forward passes of a chunk whose backward a stage still has before it.

    1F1B: one for each stage from here on (arXiv 2104.04473 section 2.2). Interleaved: megatron-core's warm-up of
    2 (stages after this one) + (chunks - 1) stages, and the one at work.
    """
    if layout.chunks == 1:
        return min(micro_batches, layout.pp - stage)
    warm_up = 2 * (layout.pp - stage - 1) + (layout.chunks - 1) * layout.pp
    return min(micro_batches * layout.chunks, warm_up + 1)


def _moments(job: Job, stage: int, parts: StageParts, recompute: RecomputeConfig) -> Iterator[RankMemory]:
    """A stage at the moments that can be its fullest."""
    case = (job.shape, job.layout, job.pack, job.numerics)
    state, block, passing = _state(job, parts), block_bytes(*case), passing_bytes(*case)
    kept = parts.recomputed * getattr(block, recompute.policy) + (parts.blocks - parts.recomputed) * block.off
    passes = passes_under_way(stage, job.layout, job.micro_batches) / job.layout.chunks
    at_work = block.at_work(recompute.policy) if parts.recomputed else 0.0

    weights = block_numbers(job.shape, job.layout.tp, 1)
    around = outside_numbers(job.shape, job.layout.tp, 1) + ends_numbers(job.shape, job.layout.tp, 1, first=True)
    gathered = 2 if job.layout.dp_shard * job.layout.cp > 1 else 1  # the block's at work, and the next one's
    computed, wide = job.numerics.computed, job.numerics.wide

    # The backward pass begins. The first pack's gradients come as its activations go.
    yield replace(
        state,
        gradients=state.gradients if job.micro_batches > 1 else 0.0,
        activations=passes * (kept + outside_bytes(*case)) + at_work + passing,
        buffers=computed * (gathered * weights + around),
    )
    # It ends: one block's gradients are to come, as its activations go; the last one's are being reduced.
    yield replace(
        state,
        gradients=state.gradients * (1 - (1 / parts.blocks if job.micro_batches == 1 else 0)),
        activations=block.off + outside_bytes(*case) + passing,
        buffers=computed * (weights + 2 * around) + wide * weights,
    )
    # The update.
    yield replace(state, buffers=_optimizer_buffers(job))


def _state(job: Job, parts: StageParts) -> RankMemory:
    """What is there between two steps, and the gradients."""
    layout, numerics = job.layout, job.numerics
    shards = layout.dp_shard * layout.cp
    blocks = parts.blocks * block_numbers(job.shape, layout.tp, shards)
    around = parts.chunks * outside_numbers(job.shape, layout.tp, shards)
    around += parts.is_first * ends_numbers(job.shape, layout.tp, shards, first=True)
    around += parts.is_last * ends_numbers(job.shape, layout.tp, shards, first=False)
    on_host = layout.cpu_offload and numerics.gpu
    each = 0 if on_host else numerics.stored
    moments = 2 * (blocks + around)
    if job.optimizer == "muon":
        moments -= parts.blocks * block_numbers(job.shape, layout.tp, shards, matrices_only=True)
    return RankMemory(
        parameters=each * (blocks + around),
        gradients=each * (blocks + around),
        optimizer=each * moments,
        average=each * (blocks + around),
        activations=0.0,
        buffers=0.0,
        process=job.process_bytes,
    )


def _optimizer_buffers(job: Job) -> float:
    """Muon's matrices at work; AdamW works in place."""
    if job.optimizer == "adamw":
        return 0.0
    largest = max(matrix.rows * matrix.columns for matrix in block_matrices(job.shape))
    bucket = max(largest, min(MUON_BUCKET_NUMBERS, job.shape.layers * largest))
    return job.numerics.stored * MUON_COPIES * bucket
