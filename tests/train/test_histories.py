"""Which checkpoints a run goes on from when positions of its data are left out."""

import shutil
from pathlib import Path

import pytest
from faults import STEPS, make_run, rows, skipping, train_with

from goku_mega.errors import ConfigError, OtherHistory


@pytest.fixture(scope="module")
def trained(small_dataset, tmp_path_factory):
    """Six steps with position 1 left out; checkpoints after steps 2, 4 and 6: positions up to 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("history")
    train_with(0, skipping(make_run(small_dataset, run_dir, save_every=2), 1), None)
    return run_dir


def run_dir_of(run) -> Path:
    return Path(run.run_dir)


@pytest.fixture
def run(trained, small_dataset, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return make_run(small_dataset, tmp_path / "run", save_every=2, steps=STEPS + 1)


@pytest.mark.parametrize(("skipped", "resumed_from"), [((1,), 6), ((1, 7, 90), 6), ((1, 5), 4), ((1, 4, 6), 2)])
def test_the_newest_checkpoint_from_before_the_data_left_out_is_taken(run, caplog, skipped, resumed_from):
    assert train_with(0, skipping(run, *skipped), None)["resumed_from"] == resumed_from
    assert ("passed over" in caplog.text) == (resumed_from < STEPS)
    taken = [row["data_step"] for row in rows(run_dir_of(run))]
    assert taken == [position for position in range(20) if position not in skipped][: STEPS + 1]


def test_a_run_as_young_as_its_first_checkpoint_begins_anew(run):
    assert train_with(0, skipping(run, 0, 1), None)["resumed_from"] == 0
    assert [row["data_step"] for row in rows(run_dir_of(run))] == [2, 3, 4, 5, 6, 7, 8]


def test_a_run_whose_older_checkpoints_are_gone_does_not_begin_anew(run):
    shutil.rmtree(run_dir_of(run) / "checkpoints/step_00000002")
    with pytest.raises(OtherHistory, match="no older checkpoint"):
        train_with(0, skipping(run, 0, 1), None)
    assert len(rows(run_dir_of(run))) == STEPS


def test_what_was_left_out_must_be_said_again(run):
    with pytest.raises(ConfigError, match=r"add \[1\]"):
        train_with(0, run, None)
