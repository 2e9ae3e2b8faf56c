"""The layout never changes the run: losses and gradient norms agree in every layout, to rounding."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from parity import write_dataset

from goku_mega.config.training import DataConfig, FlowRun, LayoutConfig, OptimizerConfig
from launch import run_ranks

pytestmark = pytest.mark.slow

STEPS = 10
LAYOUTS = {
    "tp2": (2, LayoutConfig(tp=2)),
    "tp2 without sp": (2, LayoutConfig(tp=2, sequence_parallel=False)),
    "cp2": (2, LayoutConfig(cp=2)),
    "shard2": (2, LayoutConfig(dp_shard=2)),
    "replicate2 x shard2": (4, LayoutConfig(dp_replicate=2, dp_shard=2)),
    "tp2 x cp2": (4, LayoutConfig(tp=2, cp=2)),
    "tp2 x shard2": (4, LayoutConfig(tp=2, dp_shard=2)),
    "pp2": (2, LayoutConfig(pp=2)),
    "pp2 of 2 chunks": (2, LayoutConfig(pp=2, pp_chunks=2)),
    "pp2 uneven": (2, LayoutConfig(pp=2, pp_layers=(3, 1))),
    "pp2 x tp2": (4, LayoutConfig(pp=2, tp=2)),
    "pp2 x shard2": (4, LayoutConfig(pp=2, dp_shard=2)),
    "pp2 x cp2": (4, LayoutConfig(pp=2, cp=2)),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    return folder


def make_run(dataset: Path, layout: LayoutConfig, optimizer: str = "adamw") -> FlowRun:
    return FlowRun(
        run_dir="unused",
        steps=STEPS,
        seed=5,
        precision="fp64",
        layout=layout,
        # Pipelines get several micro-batches, of unequal lengths.
        data=DataConfig(
            path=str(dataset), samples_per_step=9, max_tokens_per_rank=64 if layout.pp > 1 else 400, prefetch_steps=1
        ),
        # A rate that moves the weights away from their initial zeros within the ten steps.
        optimizer=OptimizerConfig(name=optimizer, learning_rate=3e-3, warmup_steps=2, clip_grad_norm=0.5),
    )


def train_ten_steps(rank: int, run: FlowRun) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    import torch
    import torch.distributed as dist

    from goku_mega.data.loader import Loader
    from goku_mega.data.shards import load_index
    from goku_mega.model.sizes import model_shape
    from goku_mega.parallel.groups import build_groups, initialise_distributed
    from goku_mega.parallel.layout import resolve
    from goku_mega.parallel.parallelize import build_model
    from goku_mega.train.loop import Trainer

    device = initialise_distributed(1)
    shape = model_shape("tiny")
    groups = build_groups(resolve(run.layout, dist.get_world_size(), shape), device)
    model = build_model(shape, groups, seed=run.seed, dtype=torch.float64)
    trainer = Trainer(model, groups, run, torch.float64)
    index = load_index(Path(run.data.path))
    with Loader(index, run, shape, groups=groups, start_step=0, dtype=torch.float64) as loader:
        return [trainer.step(batch)[:2] for batch in loader]


@pytest.fixture(scope="module")
def one_process(dataset) -> np.ndarray:
    return np.array(run_ranks(train_ten_steps, 1, make_run(dataset, LayoutConfig()))[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_process(name, dataset, one_process):
    world_size, layout = LAYOUTS[name]
    for figures in run_ranks(train_ten_steps, world_size, make_run(dataset, layout)):
        np.testing.assert_allclose(np.array(figures), one_process, rtol=1e-9)


def test_muon_orthogonalises_whole_matrices_where_ranks_hold_parts(dataset):
    one = np.array(run_ranks(train_ten_steps, 1, make_run(dataset, LayoutConfig(), "muon"))[0])
    for name in ("tp2 without sp", "replicate2 x shard2", "tp2 x shard2", "tp2 x cp2", "pp2 x tp2"):
        world_size, layout = LAYOUTS[name]
        for figures in run_ranks(train_ten_steps, world_size, make_run(dataset, layout, "muon")):
            np.testing.assert_allclose(np.array(figures), one, rtol=1e-9, err_msg=name)


def test_the_same_layout_gives_the_same_bits(dataset):
    run = make_run(dataset, LayoutConfig(tp=2))
    assert run_ranks(train_ten_steps, 2, run) == run_ranks(train_ten_steps, 2, run)


def test_micro_batches_do_not_change_the_step(dataset, one_process):
    """A cap of few tokens splits the batch; the gradients accumulate to the same."""
    run = make_run(dataset, LayoutConfig())
    capped = replace(run, data=replace(run.data, max_tokens_per_rank=64))
    np.testing.assert_allclose(np.array(run_ranks(train_ten_steps, 1, capped)[0]), one_process, rtol=1e-9)


@pytest.mark.parametrize("layout", [LayoutConfig(tp=2), LayoutConfig(pp=2)])
def test_the_comparison_would_see_a_wrong_gradient(dataset, one_process, layout):
    """Leaving out the sum over tensor-parallel ranks or stages shows at once: the test above can fail."""
    wrong = np.array(run_ranks(train_without_partial_sums, 2, make_run(dataset, layout))[0])
    assert np.abs(wrong / one_process - 1).max() > 1e-4


def train_without_partial_sums(rank: int, run: FlowRun) -> list[tuple[float, float]]:
    from goku_mega.train import loop

    loop.sum_partial_gradients = lambda model, groups: None
    return train_ten_steps(rank, run)
