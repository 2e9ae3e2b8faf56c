"""A recipe either becomes exactly what it says, or one line that names the key, the file and what to do."""

import pytest

from goku_mega.config.curation import (
    AestheticConfig,
    BalanceConfig,
    CaptionConfig,
    CurateConfig,
    HookConfig,
    LengthConfig,
    MotionConfig,
)
from goku_mega.config.data import CorpusConfig
from goku_mega.config.sampling import EvaluateConfig, SampleConfig
from goku_mega.config.training import (
    CheckpointConfig,
    DataConfig,
    FlowRun,
    LayoutConfig,
    OptimizerConfig,
    VaeRun,
)
from goku_mega.config_load import load, read_yaml, settings, to_yaml
from goku_mega.errors import ConfigError

RECIPE = """
run_dir: out/run
steps: 10
data:
  path: ${run_dir}/data
layout:
  tp: 2
optimizer:
  learning_rate: 1e-3
"""


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and return its path."""

    def write(text: str = RECIPE):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refused(kind, *, file=None, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(kind, file=file, overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_recipe_fills_the_sections_and_leaves_the_rest_at_its_defaults(recipe):
    run = load(FlowRun, file=recipe())
    assert (run.steps, run.layout.tp, run.optimizer.learning_rate) == (10, 2, 1e-3)
    assert run.data == DataConfig(path="out/run/data")
    assert run.checkpoint == CheckpointConfig()


def test_overrides_win_over_the_recipe_and_the_last_one_wins(recipe):
    overrides = [("layout.tp", "4"), ("steps", "5"), ("layout.sequence_parallel", "false"), ("steps", "7")]
    run = load(FlowRun, file=recipe(), overrides=overrides)
    assert (run.layout.tp, run.steps, run.layout.sequence_parallel) == (4, 7, False)


def test_what_print_config_shows_loads_to_the_same_configuration(recipe, tmp_path):
    run = load(FlowRun, file=recipe(), overrides=[("size", "8b"), ("optimizer.eps", "1e-12")])
    vae = VaeRun(corpus="a", output="b: ${c}", steps=3, block_channels=(1, 2, 3, 4))
    for index, made in enumerate((run, vae)):
        path = tmp_path / f"{index}.yaml"
        path.write_text(to_yaml(made))
        assert load(type(made), file=path) == made


@pytest.mark.parametrize(
    "prompt",
    ["a red circle: moving left", "7", "true", "[1, 2]", "${not} {a} #mapping", "ein 'Kreis' \"rot\"", "赤い円", ""],
)
def test_text_settings_take_the_text_as_it_is(prompt):
    overrides = [("checkpoint", "c"), ("output", "o"), ("prompt", prompt)]
    assert load(SampleConfig, overrides=overrides).prompt == prompt


def test_other_settings_read_yaml():
    made = load(
        VaeRun, overrides=[("corpus", "a"), ("output", "b"), ("steps", "3"), ("block_channels", "[8, 8, 16, 16]")]
    )
    assert made.block_channels == (8, 8, 16, 16)
    shown = load(EvaluateConfig, overrides=[("checkpoint", "c"), ("prompts", "p"), ("untrained", "true")])
    assert shown.untrained is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stpes: 3", ["'stpes'", "'steps'"]),
        ("layout: {tpp: 3}", ["'layout.tpp'", "'layout.tp'"]),
        ("tp: 2", ["'tp'", "'layout.tp'"]),
        ("layout: {tensor: 3}", ["'layout.tensor'", "tp, cp, cp_ring, pp, pp_chunks, pp_layers, dp_replicate"]),
        ("layout: 3", ["layout is 3", "section"]),
        ("steps: many", ["steps is 'many'", "whole number"]),
        ("steps: 2.5", ["steps is 2.5", "whole number"]),
        ("steps: true", ["steps is True", "whole number"]),
        ("run_dir:", ["run_dir is empty", "text"]),
        ("precision: fp8", ["'fp8'", "auto, fp32, bf16, fp64"]),
        ("layout: {sequence_parallel: maybe}", ["sequence_parallel is 'maybe'", "true or false"]),
        ("steps: 1\nsteps: 2", ["duplicate key steps"]),
        ("steps: [1", ["not a YAML recipe"]),
        ("- steps", ["key: value"]),
        ("run_dir: ${nowhere}\nsteps: 1\ndata: {path: x}", ["run_dir", "nowhere"]),
    ],
)
def test_a_wrong_recipe_is_refused_by_key_and_file(recipe, text, said):
    path = recipe(text)
    message = refused(FlowRun, file=path)
    assert all(part in message for part in [str(path), *said]), message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("layout", "2"), ["layout is a section", "layout.tp"]),
        (("layout.tp.x", "2"), ["'layout.tp.x'", "layout.tp is a value"]),
        (("layout.tpp", "2"), ["'layout.tpp'", "'layout.tp'"]),
        (("steps", "["), ["steps is '['", "whole number"]),
        (("data.caption_dropout", "much"), ["data.caption_dropout is 'much'", "a number"]),
    ],
)
def test_a_wrong_override_is_refused_by_key(recipe, override, said):
    message = refused(FlowRun, file=recipe(), overrides=[override])
    assert all(part in message for part in ["command line", *said]), message


def test_a_list_of_the_wrong_things_is_refused_with_the_setting_s_name():
    message = refused(VaeRun, overrides=[("block_channels", "[1, wide, 3, 4]")])
    assert "block_channels is [1, 'wide', 3, 4]" in message and "whole number" in message


def test_what_is_missing_is_named_in_full_with_its_flag(recipe):
    assert "data.path is not set" in refused(FlowRun, overrides=[("run_dir", "x"), ("steps", "1")])
    message = refused(FlowRun, file=recipe("run_dir: x\ndata: {path: y}"))
    assert "steps is not set" in message and "--steps" in message and "recipe.yaml" in message


@pytest.mark.parametrize("make", ["missing", "folder", "binary"])
def test_a_file_that_cannot_be_read_as_a_recipe_is_named(tmp_path, make):
    path = tmp_path / "recipe.yaml"
    if make == "folder":
        path.mkdir()
    if make == "binary":
        path.write_bytes(b"\xff\xfe\x00\x9f")
    assert str(path) in refused(FlowRun, file=path)
    with pytest.raises(ConfigError):
        read_yaml(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LayoutConfig(tp=0), "layout.tp is 0"),
        (lambda: LayoutConfig(dp_shard=0), "layout.dp_shard is 0"),
        (lambda: DataConfig(path="x", caption_dropout=1.0), "data.caption_dropout is 1.0"),
        (lambda: OptimizerConfig(ema_decay=1.0), "optimizer.ema_decay is 1.0"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep is 0"),
        (lambda: SampleConfig(checkpoint="c", prompt="p", output="o", frames=8), "frames is 8"),
        (lambda: CurateConfig(videos="v", output="o", slice="2/2"), "slice is '2/2'"),
        (lambda: AestheticConfig(clip="c"), "aesthetic.clip and aesthetic.head need each other"),
        (lambda: MotionConfig(engine="raft"), "raft needs weights"),
        (lambda: HookConfig(scorer="mine"), "scorer is 'mine'"),
        (lambda: CaptionConfig(source="models"), "give caption.key_frame_model"),
        (lambda: LengthConfig(min_s=11), "length.min_s is 11"),
        (lambda: BalanceConfig(weights="human"), "balance.weights is 'human'"),
        (lambda: SampleConfig(checkpoint="c", prompt="p", output="o", width=72), "width is 72"),
        (lambda: VaeRun(corpus="c", output="o", steps=1, block_channels=(8, 8)), r"block_channels is \[8, 8\]"),
        (lambda: VaeRun(corpus="c", output="o", steps=1, frames=13), "frames is 13; use 8n"),
        (lambda: CorpusConfig(output="o", workers=0), "workers is 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_value(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_help_has_the_type_default_and_text_of_every_setting():
    by_name = {setting.name: setting for setting in settings(FlowRun)}
    assert by_name["layout.cp"].kind is int and by_name["layout.cp"].default == 1
    assert by_name["layout.cp"].text.startswith("Context parallel ranks")
    assert list(by_name)[:2] == ["task", "run_dir"]
