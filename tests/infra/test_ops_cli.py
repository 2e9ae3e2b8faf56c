"""`goku-ops status` names the process of every rank and says which are alive."""

import json
import os
from pathlib import Path

import pytest

from goku_infra.cli import main
from goku_infra.heartbeat import Heartbeat


@pytest.fixture
def run_dir(tmp_path) -> Path:
    with pytest.raises(InterruptedError), Heartbeat(tmp_path / "heartbeats", 0, 3) as heartbeat:
        heartbeat.beat(41, "backward")
        raise InterruptedError
    return tmp_path


def test_status_as_json_is_one_object_with_the_pid_and_state_of_every_rank(run_dir, capsys):
    assert main(["status", str(run_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["alive"], report["world_size"], report["step"], report["silent_ranks"]) == (1, 3, 41, [1, 2])
    (rank,) = report["ranks"]
    assert (rank["rank"], rank["pid"], rank["alive"], rank["step"], rank["phase"]) == (
        0,
        os.getpid(),
        True,
        41,
        "backward",
    )


def test_status_for_people_has_a_line_a_rank_and_names_the_silent_ones(run_dir, capsys):
    assert main(["status", str(run_dir)]) == 0
    heading, rank, silent = capsys.readouterr().out.splitlines()
    assert heading.split() == ["rank", "host", "pid", "alive", "step", "phase", "age_s"]
    assert rank.split()[2:6] == [str(os.getpid()), "yes", "41", "backward"]
    assert silent == "no beat yet from rank 1, 2"


def test_a_run_without_ranks_is_said_to_have_none(tmp_path, capsys):
    (tmp_path / "heartbeats").mkdir()
    assert main(["status", str(tmp_path)]) == 0
    assert "no rank is running" in capsys.readouterr().out


@pytest.mark.parametrize("inner", ["", "nothing/here"])
def test_a_folder_that_is_no_run_is_one_line_and_exit_2(tmp_path, capsys, inner):
    assert main(["status", str(tmp_path / inner)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / inner) in error and "run_dir" in error


@pytest.mark.parametrize("words", [[], ["sttus"], ["status"], ["status", "x", "--jsn"]])
def test_a_wrong_command_line_is_one_line_and_exit_2(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
