"""`goku-ops status` and `watch`: each rank by its process, a fault by its culprit, and whether anyone still watches."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from journals import Story
from snapshots import node, quiet, rank, snapshot, story, write_run

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


def supervised(run_dir: Path, told: Story | None = None, **changes) -> list[str]:
    """The folder of a run whose controller has just written."""
    told = told or story()
    state = snapshot(told, **({"run_dir": str(run_dir), "time_s": time.time()} | changes))
    write_run(run_dir, told, state)
    return ["status", str(run_dir)]


def test_status_of_a_supervised_run_says_first_how_it_is_and_who_is_at_fault(tmp_path, capsys):
    assert main(supervised(tmp_path)) == 0
    headline, last_event = capsys.readouterr().out.splitlines()[:2]
    assert headline.startswith("recovering: step ") and headline.endswith(" on 2 nodes, 8 ranks")
    assert last_event.startswith("incident 3: rank 5 on n1 is stopped (SIGSTOP or a debugger): process state T")
    assert "found 3.1 s after the last sign of health" in last_event


def test_status_gives_odd_ranks_and_nodes_a_line_each_and_the_healthy_ones_one(tmp_path, capsys):
    main(supervised(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    (ranks,) = (line for line in lines if line.startswith("ranks"))
    assert ranks.split(None, 1)[1] == "7 of 8 healthy: 0-4, 6-7 in forward"
    (odd,) = (line for line in lines if line.strip().startswith("rank "))
    assert "rank 5 (on n1, pid 4005): at fault in incident 3" in odd and "stopped (SIGSTOP)" in odd
    assert "n2: lost: power-off" in " ".join(lines)
    assert "2 training (n0 n1), 1 lost (n2), 1 spare (n3)" in " ".join(lines)


def test_status_says_what_waits_for_approval_and_the_command_that_does_it(tmp_path, capsys):
    main(supervised(tmp_path))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("to approve"))
    assert line.endswith("drain n2 in SLURM: node is gone: goku-ops approve out/goku_8b 1")


def test_status_as_json_has_what_scripts_read_of_any_run(tmp_path, capsys):
    assert main([*supervised(tmp_path / "supervised"), "--json"]) == 0
    (tmp_path / "alone" / "heartbeats").mkdir(parents=True)
    assert main(["status", str(tmp_path / "alone"), "--json"]) == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [report["supervised"] for report in reports] == [True, False]
    for report in reports:
        assert {"run_dir", "status", "step", "world_size", "alive", "ranks"} <= set(report)
    with_supervisor = reports[0]
    assert (with_supervisor["status"], with_supervisor["step"]) == ("recovering", story().step)
    assert [row["alive"] for row in with_supervisor["ranks"]] == [True] * 8
    assert with_supervisor["ranks"][5]["pid"] == 4005
    assert with_supervisor["incidents"][-1]["sentence"] == with_supervisor["last_event"]


def test_a_dead_rank_is_not_alive_and_named(tmp_path, capsys):
    ranks = [rank(0), rank(1, exit_code=-9, process_state="-")]
    told = quiet()
    supervised(tmp_path, status="running", ranks=ranks, incidents=[], nodes=told["nodes"])
    assert main(["status", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["alive"] for row in report["ranks"]] == [True, False]
    assert report["last_event"] == "no incident is open, but rank 1 is odd: killed by signal 9"


def test_ranks_that_are_odd_alike_share_a_line_and_the_lines_are_bounded(tmp_path, capsys):
    killed = [rank(number, exit_code=-9, process_state="-") for number in range(1000)]
    behind = [rank(number, step=number) for number in range(1000, 1100)]
    supervised(tmp_path, ranks=killed + behind + [rank(1100, step=9999)], incidents=[])
    main(["status", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "ranks 0-999: killed by signal 9" in [line.strip() for line in lines]
    assert len(lines) < 40 and any("81 more such lines" in line for line in lines)


def test_status_says_when_nobody_watches_the_run_any_more(tmp_path, capsys):
    assert main(supervised(tmp_path, status="running", time_s=time.time() - 100)) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("no controller: it does not answer, its last word is 100 s old")
    assert "squeue --job 4711" in first
    main(["status", str(tmp_path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["controller"]["alive"] is False
    assert {row["alive"] for row in report["ranks"]} == {None}


@pytest.mark.parametrize("how,code", [("done", 0), ("failed", 93)])
def test_status_of_a_run_that_has_ended_says_how_and_why(tmp_path, capsys, how, code):
    told = story().write("finished", status=how, step=9, reason="3 restarts reached no new step", exit_code=code)
    main(supervised(tmp_path, told, status="finished", reason="3 restarts reached no new step", time_s=told.now))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"finished, {how} with exit code {code} (3 restarts reached no new step): step ")
    assert not any(line.startswith("ranks") for line in lines)


def test_a_run_that_waits_in_the_queue_is_not_called_lost(tmp_path, capsys):
    told = story().write("finished", status="requeued", step=9, reason="1 of 2 nodes is left", exit_code=0)
    main(supervised(tmp_path, told, status="waiting", time_s=time.time() - 100))
    assert capsys.readouterr().out.startswith("back in SLURM's queue (1 of 2 nodes is left); squeue --job 4711")


def test_ranks_that_train_without_a_supervisor_since_are_what_status_shows(tmp_path, capsys):
    supervised(tmp_path, status="finished", time_s=time.time() - 1)
    with pytest.raises(InterruptedError), Heartbeat(tmp_path / "heartbeats", 0, 1) as heartbeat:
        heartbeat.beat(77, "forward")
        raise InterruptedError
    main(["status", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["step"] == 77


def test_a_new_run_whose_controller_has_not_written_is_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "supervisor").mkdir()
    assert main(["status", str(tmp_path)]) == 2
    assert "has not written anything yet" in capsys.readouterr().err


def test_watch_says_only_what_is_new_and_ends_with_the_run(tmp_path, capsys):
    told = story()
    supervised(tmp_path, told)

    def end_it() -> None:
        time.sleep(0.8)
        told.write("finished", status="done", step=told.step, reason="all done", exit_code=0)
        supervised(tmp_path, told, status="finished", reason="all done", nodes=[node("n0")])

    ending = threading.Thread(target=end_it)
    ending.start()
    assert main(["watch", str(tmp_path), "--period", "0.1"]) == 0
    ending.join()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("recovering: step") for line in lines) == 1
    finished = [line for line in lines if "finished, done with exit code 0 (all done): step" in line]
    assert [line[2] == ":" for line in finished] == [True, False]  # the news, with the time of day; then the whole


def test_an_incident_that_is_over_says_how_long_ago_it_was(tmp_path, capsys):
    told = Story().run(nodes=2).start().train(50, save_s=1.0).fault("killed", rank=0, node="n0")
    told.act("restart").start(incident=1).close().train(120)
    main(supervised(tmp_path, told, status="running", ranks=[rank(0), rank(1)], time_s=told.now))
    assert "\n61 s ago, incident 1: rank 0 on n0 was killed" in capsys.readouterr().out


def test_who_may_not_read_the_token_is_told_so_in_one_line(tmp_path, capsys):
    supervised(tmp_path)
    (tmp_path / "supervisor/controller.json").write_text('{"host": "127.0.0.1", "port": 1}')
    (tmp_path / "supervisor/token").mkdir()
    assert main(["restart", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "supervisor/token" in error
