"""A step that is not finite changes nothing, ends the run on all ranks, and its data can be left out."""

import os
import subprocess
import sys

import numpy as np
import pytest
from faults import STEPS, committed, make_run, rows, skipping, spoil, train_with

from goku_mega.config.training import LayoutConfig
from launch import run_ranks

NAN = float("nan")


@pytest.mark.parametrize("value", [NAN, 3e38])  # a square of the second is infinite
def test_every_rank_ends_by_the_step_that_one_cannot_use_and_before_it_changes_anything(small_dataset, tmp_path, value):
    run = make_run(small_dataset, tmp_path / "run", save_every=2)
    for code, report, message in run_ranks(train_with, 2, run, spoil, 1, 4, value):
        assert code == 70 and report == {"fault": "nan_loss", "step": 4, "data_step": 4, "ranks": [1]}
        assert "step 4" in message and "data.skip_steps" in message
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    assert committed(tmp_path / "run") == ["step_00000002", "step_00000004"]
    # What was saved is from before; with that data left out, the run is the one that never had it.
    goes_on = skipping(run, 4)
    (outcome, _) = run_ranks(train_with, 2, goes_on, spoil, 1, 4, value)
    assert outcome["step"] == STEPS and outcome["resumed_from"] == 4
    assert [row["data_step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [LayoutConfig(dp_replicate=2, dp_shard=2), LayoutConfig(pp=2, tp=2), LayoutConfig(tp=2, dp_replicate=2)],
)
def test_the_ranks_of_any_layout_agree(small_dataset, tmp_path, layout):
    run = make_run(small_dataset, tmp_path / "run", layout=layout)
    for victim in (0, 3):
        outcomes = run_ranks(train_with, 4, run, spoil, victim, 1, NAN)
        assert [outcome[0] for outcome in outcomes] == [70] * 4


def test_a_resumed_run_that_leaves_data_out_is_bitwise_the_uninterrupted_one(small_dataset, tmp_path):
    whole = skipping(make_run(small_dataset, tmp_path / "whole"), 1, 4)
    run_ranks(train_with, 1, whole, None)
    parts = make_run(small_dataset, tmp_path / "parts")
    run_ranks(train_with, 1, skipping(parts, 1), spoil, 0, 4, NAN)  # ends at position 4, after the save of step 3
    run_ranks(train_with, 2, skipping(parts, 1, 4), None)  # another layout
    found, expected = rows(tmp_path / "parts"), rows(tmp_path / "whole")
    assert [row["data_step"] for row in found] == [0, 2, 3, 5, 6, 7]
    np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-5)
    assert [row["loss"] for row in found[:3]] == [row["loss"] for row in expected[:3]]


def test_the_command_ends_with_its_own_code_and_a_line_for_its_supervisor(small_dataset, tmp_path):
    words = ["train", f"run_dir={tmp_path}/run", f"data.path={small_dataset}", "steps=3", "data.samples_per_step=6"]
    fault = (
        "import sys, goku_mega.train.loop as loop\n"
        "step = loop.Trainer.step\n"
        "def spoilt(self, batch):\n"
        "    batch.micro_batches[0].velocity.fill_(float('nan'))\n"
        "    return step(self, batch)\n"
        "loop.Trainer.step = spoilt\n"
        "from goku_mega.cli import run_and_leave\n"
        "run_and_leave()\n"
    )
    result = subprocess.run([sys.executable, "-c", fault, *words], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 70
    assert result.stderr.splitlines()[-1] == '{"fault": "nan_loss", "step": 0, "data_step": 0, "ranks": [0]}'
    assert "Traceback" not in result.stderr


def parts(rank: int, losses: list[float]) -> list[int]:
    import torch

    from goku_mega.train.agreement import origins_of_unusable

    return origins_of_unusable(torch.tensor(losses[rank], dtype=torch.float64))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([1.0, NAN, 2.0], [1]), ([float("inf"), 1.0, NAN], [0, 2]), ([1.0, 2.0, 3.0], []), ([NAN] * 3, []), ([NAN], [0])],
)
def test_a_loss_that_is_not_finite_is_told_to_be_of_the_ranks_that_had_it_by_themselves(losses, expected):
    assert run_ranks(parts, len(losses), losses) == [expected] * len(losses)
