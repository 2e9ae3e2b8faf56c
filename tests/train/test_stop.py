"""A run that one node's agent asks to stop saves on all ranks at the same step, and ends well."""

import pytest
from faults import STEPS, committed, losses, make_run, train_with, with_own_control

from goku_mega.config.training import LayoutConfig
from launch import run_ranks

LAYOUTS = [
    (4, LayoutConfig(dp_replicate=2, dp_shard=2)),
    (4, LayoutConfig(pp=2, tp=2)),
    (4, LayoutConfig(cp=2, dp_replicate=2)),
    (4, LayoutConfig(pp=2, pp_chunks=2, dp_shard=2)),
]


def stopped_steps(outcomes: list) -> list[int]:
    return [outcome["step"] for outcome in outcomes]


def test_a_run_saves_where_it_is_asked_to_stop_and_goes_on_bitwise(small_dataset, tmp_path):
    whole, stopped = make_run(small_dataset, tmp_path / "whole"), make_run(small_dataset, tmp_path / "stopped")
    run_ranks(train_with, 2, whole, None)
    assert stopped_steps(run_ranks(with_own_control, 2, stopped, str(tmp_path / "nodes"), 1, 3, "save")) == [4, 4]
    assert committed(tmp_path / "stopped") == ["step_00000003", "step_00000004"]
    (first, second) = run_ranks(train_with, 2, stopped, None)
    assert first["resumed_from"] == second["resumed_from"] == 4 and first["step"] == STEPS
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_asked_to_leave_now_it_saves_nothing(small_dataset, tmp_path):
    run = make_run(small_dataset, tmp_path / "run", save_every=100)
    assert stopped_steps(run_ranks(with_own_control, 2, run, str(tmp_path / "nodes"), 0, 1, "now")) == [2, 2]
    assert committed(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 3])
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_all_ranks_of_any_layout_stop_at_the_step_at_which_one_was_asked(small_dataset, tmp_path, ranks, layout, asked):
    run = make_run(small_dataset, tmp_path / "run", save_every=100, layout=layout)
    outcomes = run_ranks(with_own_control, ranks, run, str(tmp_path / "nodes"), asked, 2, "save")
    assert stopped_steps(outcomes) == [3] * ranks
    assert committed(tmp_path / "run") == ["step_00000003"]
