"""A run starts from another's weights: all that fits is taken bit for bit, and the rest is told, never guessed."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SHAPES, differences, state

from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.config.training import DataConfig, FlowRun, InitConfig, OptimizerConfig
from goku_mega.errors import CheckpointError, ConfigError
from goku_mega.interchange.initial import Loaded, initialise_from
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.groups import single_process_groups
from goku_mega.parallel.parallelize import build_model
from goku_mega.parallel.shards import Shard
from goku_mega.train import loop
from goku_mega.train.loop import Trainer
from launch import run_ranks


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "run" / "checkpoints", 5, state("rows"), {"model": {}}, keep=1)
    return tmp_path / "run"


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_weights_are_those_asked_for_and_nothing_else_is_needed(run_dir: Path, weights: str):
    shards = state("rows", step=None)["model"]
    loaded = initialise_from(run_dir, shards, weights=weights)
    assert differences({"model": shards}, stored=weights) == []
    assert (loaded.loaded, loaded.fresh, loaded.unused) == (tuple(sorted(SHAPES)), (), ())


def test_what_the_checkpoint_lacks_keeps_its_value_and_what_it_has_more_is_listed(run_dir: Path):
    shards = dict(state("rows", step=None)["model"])
    del shards["scale"]
    shards["image_projection.weight"] = Shard(torch.full((4,), 2.0), (4,), (0,))
    loaded = initialise_from(run_dir, shards, weights="model", fresh=("image_projection.*",))
    assert shards.pop("image_projection.weight").tensor.tolist() == [2.0] * 4
    assert differences({"model": shards}) == []
    assert (loaded.fresh, loaded.unused) == (("image_projection.weight",), ("scale",))
    assert "1 kept fresh (image_projection.weight), 1 of the checkpoint left unused (scale)" in str(loaded)


def test_a_fresh_parameter_stays_fresh_though_the_checkpoint_has_it(run_dir: Path):
    shards = state("rows", step=None)["model"]
    shards["final.weight"].tensor.fill_(3.0)
    loaded = initialise_from(run_dir, shards, weights="model", fresh=("final.*",))
    assert shards["final.weight"].tensor.tolist() == [[3.0] * 7]
    assert (loaded.fresh, loaded.unused) == (("final.weight",), ("final.weight",))


def refused(run_dir: Path, shards: dict[str, Shard], **chosen: object) -> str:
    before = {name: shard.tensor.clone() for name, shard in shards.items()}
    with pytest.raises(CheckpointError) as error:
        initialise_from(run_dir, shards, **{"weights": "model", **chosen})
    assert all(
        torch.equal(
            shard.tensor,
            before[name],
        )
        for name, shard in shards.items()
    )
    return str(error.value)


def zeros(**more: tuple[int, ...]) -> dict[str, Shard]:
    shapes = {name: shape for name, (shape, _) in SHAPES.items()} | more
    return {name: Shard(torch.zeros(shape), shape, (0,) * len(shape)) for name, shape in shapes.items()}


def test_what_differs_without_leave_is_refused_before_anything_is_changed(run_dir: Path):
    assert "new.weight is not in it" in refused(run_dir, zeros(**{"new.weight": (2,)}))
    assert "final.weight is (1, 7) in it and (2, 7) here" in refused(run_dir, zeros(**{"final.weight": (2, 7)}))
    assert "init.fresh names 'imgae.*'" in refused(run_dir, zeros(), fresh=("imgae.*",))
    several = refused(run_dir, zeros(**{f"new.{number}": (2,) for number in range(5)}), fresh=("new.0",))
    assert "new.1 is not in it; new.2 is not in it; new.3 is not in it, and 1 more" in several
    assert "no checkpoint in" in refused(run_dir / "nowhere", zeros())


def test_a_checkpoint_without_such_weights_is_told_apart_from_another_model(tmp_path: Path):
    save_checkpoint(tmp_path, 5, state("rows", parts=("model",)), {"model": {}}, keep=1)
    assert "has no ema weights of this model; try init.weights=model" in refused(tmp_path, zeros(), weights="ema")


def initialise_stage(rank: int, path: Path) -> tuple[Loaded, list[str]]:
    """Two stages of a pipeline: each has parameters of its own; both have `scale`; the last has a new one, too."""
    names = [name for number, name in enumerate(SHAPES) if number % 2 == rank or name == "scale"]
    shards = {name: state("rows", step=None)["model"][name] for name in names}
    if rank == 1:
        shards["new.weight"] = Shard(torch.zeros(2), (2,), (0,))
    loaded = initialise_from(path, shards, weights="ema", fresh=("new.*",))
    shards.pop("new.weight", None)
    return loaded, differences({"model": shards}, stored="ema")


def test_ranks_with_different_parameters_agree_on_one_report(run_dir: Path):
    (first, wrong), (second, also_wrong) = run_ranks(initialise_stage, 2, run_dir)
    assert first == second
    assert (wrong, also_wrong) == ([], [])
    assert (first.loaded, first.fresh, first.unused) == (tuple(sorted(SHAPES)), ("new.weight",), ())


def initialise_boxes(rank: int, world: int, path: Path) -> list[str]:
    wrong = []
    for kind in ("rows", "columns", "replicas"):
        shards = state(kind, rank, world, step=None)["model"]
        initialise_from(path, shards, weights="ema")
        wrong += differences({"model": shards}, stored="ema")
    return wrong


def test_every_layout_starts_from_the_same_weights(run_dir: Path):
    assert run_ranks(initialise_boxes, 3, 3, run_dir) == [[]] * 3


SHAPE = ModelShape(layers=2, hidden_size=32, ffn_hidden_size=64, heads=2, latent_channels=4, text_width=8)


def trainer(run: FlowRun, shape: ModelShape = SHAPE) -> Trainer:
    """As `train` makes it, before it looks for a checkpoint of its own."""
    groups = single_process_groups()
    return Trainer(build_model(shape, groups, seed=run.seed), groups, run, torch.float32)


def flow_run(folder: Path, **changes: object) -> FlowRun:
    data = DataConfig(path="unused")
    return FlowRun(run_dir=str(folder), steps=9, data=data, **{"optimizer": OptimizerConfig(name="muon"), **changes})


def equal(found: dict[str, Shard], expected: dict[str, Shard]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].tensor, expected[name].tensor) for name in expected
    )


@pytest.fixture
def first_stage(tmp_path: Path) -> Trainer:
    """A trainer that has taken steps: no part of its state is what it began with."""
    run = flow_run(tmp_path / "first", optimizer=OptimizerConfig(name="adamw"), seed=1)
    stage = trainer(run)
    generator = torch.Generator().manual_seed(0)
    for shards in stage.state.values():
        for shard in shards.values():
            shard.tensor.add_(torch.randn(shard.tensor.shape, generator=generator).abs())
    save_checkpoint(loop.checkpoints(run), 5, stage.state, loop_info(run), keep=1)
    return stage


def loop_info(run: FlowRun) -> dict[str, object]:
    return {"run": asdict(run), "model": loop.describe_model(run.size, SHAPE), "layout": "tp=1"}


def test_the_next_stage_takes_the_average_and_starts_a_new_optimizer(first_stage: Trainer, tmp_path: Path):
    run = flow_run(tmp_path / "second", init=InitConfig(checkpoint=str(tmp_path / "first")))
    second, untouched = trainer(run), trainer(run)
    assert not equal(second.model.shards, first_stage.ema.shards)
    assert loop.resume(second, run, SHAPE) == 0
    assert equal(second.model.shards, first_stage.ema.shards)
    assert equal(second.ema.shards, first_stage.ema.shards)
    for part, moments in untouched.optimizer.moments().items():
        assert equal(second.optimizer.moments()[part], moments)


def test_a_run_that_has_begun_goes_on_with_its_own_checkpoint(first_stage: Trainer, tmp_path: Path):
    run = flow_run(tmp_path / "second", init=InitConfig(checkpoint=str(tmp_path / "first"), fresh=("final_layer.*",)))
    second = trainer(run)
    loop.resume(second, run, SHAPE)
    for shard in second.model.shards.values():
        shard.tensor.add_(1)
    save_checkpoint(loop.checkpoints(run), 2, second.state, loop_info(run), keep=1)
    again = trainer(run)
    assert loop.resume(again, run, SHAPE) == 2
    assert equal(again.model.shards, second.model.shards)
    other = replace(run, init=InitConfig(checkpoint=str(tmp_path / "first"), weights="model"))
    with pytest.raises(ConfigError, match="init is .* but .* was trained with"):
        loop.resume(again, other, SHAPE)


def test_text_to_video_becomes_image_to_video_with_a_new_projection(first_stage: Trainer, tmp_path: Path, caplog):
    """Twice the channels at the door, through a projection that the first stage had not."""
    run = flow_run(tmp_path / "i2v", init=InitConfig(checkpoint=str(tmp_path / "first"), fresh=("image_projection.*",)))
    second = trainer(run)
    new = torch.full((4, 8), 0.5)
    taken = second.model.shards
    shards = {**taken, "image_projection.weight": Shard(new, (4, 8), (0, 0))}
    second.model = replace(second.model, shards=shards)
    with caplog.at_level(logging.INFO):
        loop.begin(second, run)
    assert torch.equal(new, torch.full((4, 8), 0.5))
    assert equal(taken, first_stage.ema.shards)
    assert "1 kept fresh (image_projection.weight)" in caplog.text


def test_a_deeper_model_is_refused_with_the_names_it_would_lack(first_stage: Trainer, tmp_path: Path):
    run = flow_run(tmp_path / "deep", init=InitConfig(checkpoint=str(tmp_path / "first")))
    with pytest.raises(CheckpointError, match=r"blocks\.2\..* is not in it"):
        loop.resume(trainer(run, replace(SHAPE, layers=3)), run, replace(SHAPE, layers=3))


def test_patterns_without_a_checkpoint_are_a_mistake_in_the_recipe():
    with pytest.raises(ConfigError, match=r"init\.fresh is set"):
        InitConfig(fresh=("image_projection.*",))
