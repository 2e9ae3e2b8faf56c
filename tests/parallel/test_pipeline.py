"""Stages of a pipeline together are the one model: its blocks, its values, its gradients, its checkpoints."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import find_latest
from torch import Tensor

from goku_mega.checkpoint.load import load_into
from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.config.training import LayoutConfig
from goku_mega.data.packing import pack_prompts
from goku_mega.data.planner import Planner
from goku_mega.flow.path import velocity_loss
from goku_mega.model.packed import PackedBatch
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.groups import Groups, build_groups, initialise_distributed
from goku_mega.parallel.layout import Layout, resolve
from goku_mega.parallel.parallelize import ParallelModel, build_model, sum_partial_gradients
from goku_mega.parallel.pipeline import chunk_layers, forward_backward
from goku_mega.seeding import derive_seed
from launch import run_ranks

pytestmark = pytest.mark.slow

SHAPE = ModelShape(layers=6, hidden_size=24, ffn_hidden_size=48, heads=2, latent_channels=4, text_width=8)
PACKS = (
    ((1, 4, 4), (2, 2, 4)),
    ((1, 2, 2),),
    ((3, 4, 2), (1, 6, 4), (1, 2, 2)),
    ((1, 2, 6),),
    ((2, 6, 6),),
    ((1, 8, 2),),
)
"""Latent (t, h, w) of the samples of each micro-batch: no two micro-batches have equally many tokens."""
PIPELINES = {
    "1 stage": LayoutConfig(),
    "2 stages": LayoutConfig(pp=2),
    "2 uneven stages": LayoutConfig(pp=2, pp_layers=(4, 2)),
    "2 stages of 2 chunks": LayoutConfig(pp=2, pp_chunks=2),
    "3 stages": LayoutConfig(pp=3),
    "3 stages of 2 chunks": LayoutConfig(pp=3, pp_chunks=2),
    "2 stages of 2 uneven chunks": LayoutConfig(pp=2, pp_chunks=2, pp_layers=(1, 2, 1, 2)),
}


@pytest.mark.parametrize(("pp", "chunks"), [(1, 1), (2, 1), (3, 1), (2, 2), (2, 3), (3, 2)])
def test_chunks_go_round_the_stages_and_hold_every_block_once(pp, chunks):
    layout = resolve(LayoutConfig(pp=pp, pp_chunks=chunks), pp, SHAPE)
    stages = [chunk_layers(layout, rank, SHAPE.layers) for rank in range(pp)]
    in_order = [stages[rank][chunk] for chunk in range(chunks) for rank in range(pp)]
    assert list(itertools.chain(*in_order)) == list(range(SHAPE.layers))


def test_a_layout_without_stages_holds_all_blocks_in_one_chunk():
    assert chunk_layers(Layout(dp_shard=4), 0, 28) == [range(28)]


@pytest.mark.parametrize(("dp_ranks", "multiple"), [(1, 2), (2, 2), (3, 4)])
def test_micro_batches_come_in_the_multiple_that_interleaved_stages_take(dp_ranks, multiple):
    tokens = np.random.default_rng(0).integers(1, 60, size=200)
    planner = Planner(tokens**2, tokens, seed=1, samples_per_step=10)
    for step in range(planner.batches_per_epoch):
        plan = planner.plan(step, dp_ranks=dp_ranks, max_tokens_per_rank=64, micro_batch_multiple=multiple)
        assert {len(of_rank) % multiple for of_rank in plan.micro_batches} == {0}
        planned = [number for of_rank in plan.micro_batches for pack in of_rank for number in pack]
        assert sorted(planned) == sorted(plan.batch)


def build(config: LayoutConfig, compute_dtype: torch.dtype | None = None) -> tuple[ParallelModel, Groups]:
    """A model in a layout, its weights drawn at random: the initial zeros would hide most gradients."""
    device = initialise_distributed(1)
    groups = build_groups(resolve(config, torch.distributed.get_world_size(), SHAPE), device)
    stored = torch.float64 if compute_dtype is None else torch.float32
    model = build_model(SHAPE, groups, seed=0, dtype=stored, compute_dtype=compute_dtype)
    for name, shard in model.shards.items():
        shard.tensor.copy_(shard.take(value(name, shard.global_shape)))
    return model, groups


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed("value", name))
    return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])


def micro_batches(dtype: torch.dtype) -> list[tuple[PackedBatch, Tensor]]:
    """Packs and the velocities they should give."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    packs = [
        pack_prompts(
            [draw(4, *grid) for grid in grids], [draw(2 + len(grids), 8) for _ in grids],
            [0.1 + 0.2 * number for number in range(len(grids))], SHAPE,
        )
        for grids in PACKS
    ]  # fmt: skip
    assert len({len(pack.patches) for pack in packs}) == len(packs)
    return [(pack, draw(*pack.patches.shape)) for pack in packs]


def loss_of(velocity: Tensor, target: Tensor) -> Tensor:
    return velocity_loss(velocity, target, torch.ones(len(target)), 100.0)


def by_the_schedule(model: ParallelModel, groups: Groups, dtype: torch.dtype) -> float:
    """Forward and backward of all packs by megatron-core's schedule; the global loss."""
    packs = micro_batches(dtype)

    def forward(call, micro):
        pack, target = micro
        return call(pack), lambda velocity: loss_of(velocity, target)

    model.start_step()
    loss = forward_backward(model.chunks, groups, packs, [len(pack.patches) for pack, _ in packs], forward, dtype)
    sum_partial_gradients(model, groups)
    torch.distributed.all_reduce(loss, group=groups.pp)
    return loss.item()


def one_after_the_other(model: ParallelModel, groups: Groups, dtype: torch.dtype) -> float:
    """The same without a schedule."""
    model.start_step()
    total = 0.0
    for pack, target in micro_batches(dtype):
        loss = loss_of(model.module(pack), target)
        loss.backward()
        total += loss.item()
    return total


def gradients_of_two_steps(
    rank: int, config: LayoutConfig, run_step=by_the_schedule
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and gradients after an update by their own direction: copies that went apart would show."""
    model, groups = build(config)
    losses = []
    for _ in range(2):
        losses.append(run_step(model, groups, torch.float64))
        gradients = {name: gradient.clone() for name, gradient in model.gradients().items()}
        for name, shard in model.shards.items():
            shard.tensor.sub_(gradients[name].sign(), alpha=0.01)
    return losses, gradients


@pytest.fixture(scope="module")
def plainly() -> tuple[list[float], dict[str, Tensor]]:
    return run_ranks(gradients_of_two_steps, 1, LayoutConfig(), one_after_the_other)[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_gradient_is_that_of_a_plain_loop(name, plainly):
    losses, expected = plainly
    config = PIPELINES[name]
    seen = set()
    for of_rank, gradients in run_ranks(gradients_of_two_steps, config.pp, config):
        np.testing.assert_allclose(of_rank, losses, rtol=1e-12)
        for parameter, gradient in gradients.items():
            scale = expected[parameter].abs().max().item()
            assert scale > 0, parameter
            torch.testing.assert_close(gradient, expected[parameter], rtol=0, atol=1e-11 * scale, msg=parameter)
        seen |= set(gradients)
    assert seen == set(expected)


def loss_in_bf16(rank: int, config: LayoutConfig) -> float:
    model, groups = build(config, torch.bfloat16)
    return by_the_schedule(model, groups, torch.bfloat16)


def test_hidden_states_travel_in_the_type_of_the_matrix_products():
    whole = run_ranks(loss_in_bf16, 1, LayoutConfig())[0]
    for config in (LayoutConfig(pp=2), LayoutConfig(pp=2, pp_chunks=2)):
        assert run_ranks(loss_in_bf16, 2, config) == [whole, whole]


def save(rank: int, config: LayoutConfig, folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Save the values; the boxes that this rank writes."""
    model, _ = build(config)
    save_checkpoint(folder, 1, {"model": model.shards}, {}, keep=1)
    return [(name, shard.offsets) for name, shard in model.shards.items() if shard.owner and not shard.empty]


def load(rank: int, config: LayoutConfig, folder: Path) -> list[str]:
    """Load over other values; the parameters that are not what was saved, on any of this rank's chunks."""
    model, _ = build(config)
    for shard in model.shards.values():
        shard.tensor.fill_(math.nan)
    path = find_latest(folder)
    assert path is not None
    load_into(path, {"model": model.shards})
    model.start_step()
    wrong = []
    for name, copies in model.parameters.items():
        for copy in copies:
            box = model.shards[name].take(value(name, model.shards[name].global_shape)).to(torch.float64)
            if not torch.equal(copy.detach().to_local(), box):
                wrong.append(name)
    return wrong


def test_a_checkpoint_goes_from_stages_to_one_process_and_back(tmp_path):
    interleaved = LayoutConfig(pp=2, pp_chunks=2, dp_shard=2)
    written = Counter(itertools.chain(*run_ranks(save, 4, interleaved, tmp_path / "stages")))
    assert set(written.values()) == {1}
    assert run_ranks(load, 1, LayoutConfig(), tmp_path / "stages") == [[]]
    run_ranks(save, 1, LayoutConfig(), tmp_path / "whole")
    assert run_ranks(load, 4, interleaved, tmp_path / "whole") == [[]] * 4
