"""`goku-ops incidents`, `incident` and `logs` show what a run's supervisor has written down."""

import json
import threading
import time
from pathlib import Path

import pytest
from snapshots import snapshot, story, write_run

from goku_infra.cli import main
from goku_infra.operating.show import last_lines_of


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run with three incidents, the last one open, and its files."""
    write_run(tmp_path, story(), snapshot())
    folder = tmp_path / "supervisor/incidents/0003"
    folder.mkdir(parents=True)
    frames = "".join(f"frame {number}\n" for number in range(100))
    (folder / "stacks_rank_00005.txt").write_text(f"== /proc/status ==\nVmPeak\n== py-spy ==\n{frames}")
    (folder / "stacks_rank_00004.txt").write_text("waits in all_reduce\n")
    (folder / "log_rank_00005.txt").write_text("".join(f"said {number}\n" for number in range(100)))
    return tmp_path


def write_log(run_dir: Path, generation: int, rank: int, text: str) -> Path:
    path = run_dir / f"supervisor/logs/g{generation:04d}/rank_{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_incidents_has_a_line_each_with_culprit_and_times(run_dir, capsys):
    assert main(["incidents", str(run_dir)]) == 0
    heading, first, second, third = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["number", "when", "cause", "who"]
    assert "killed" in first and "rank 0 on n0" in first and " 0.21 s " in first and first.endswith("recovered")
    assert "node_lost" in second and " n2 " in second
    assert "stopped_process" in third and "rank 5 on n1" in third and third.endswith("open")


def test_incidents_as_json_are_whole(run_dir, capsys):
    main(["incidents", str(run_dir), "--json"])
    found = json.loads(capsys.readouterr().out)["incidents"]
    assert [incident["number"] for incident in found] == [1, 2, 3]
    assert found[2]["ranks"] == [5] and found[2]["folder"] == str(run_dir / "supervisor/incidents/0003")
    main(["incident", str(run_dir), "2", "--json"])
    assert json.loads(capsys.readouterr().out) == found[1]


def test_a_run_that_has_met_nothing_says_so(tmp_path, capsys):
    quiet_story = story().__class__().run().start().train(5)
    write_run(tmp_path, quiet_story, snapshot(quiet_story))
    assert main(["incidents", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no incident so far\n"


def test_an_incident_shows_its_course_in_order_with_seconds_since_the_fault(run_dir, capsys):
    assert main(["incident", str(run_dir), "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("incident 2: node n2 is gone")
    course = [line.split(maxsplit=3) for line in lines[2 : lines.index("", 2)]]
    offsets = [float(seconds) for _, seconds, _, _ in course]
    assert offsets == sorted(offsets) and offsets[0] == 0.0 and offsets[1] == pytest.approx(1.8)
    assert [words.split(":")[0].split(",")[0] for *_, words in course] == [
        "last sign of health", "found", "exclude", "restart", "ranks started", "training again",
    ]  # fmt: skip


def test_an_incident_shows_the_files_of_the_ranks_at_fault_and_not_those_of_their_victims(run_dir, capsys):
    main(["incident", str(run_dir), "3"])
    text = capsys.readouterr().out
    assert f"3 files of evidence in {run_dir}/supervisor/incidents/0003" in text
    assert "VmPeak" not in text and "frame 0\n" in text and "frame 99\n" not in text
    assert "said 99\n" in text and "said 0\n" not in text
    assert "waits in all_reduce" not in text


def test_logs_shows_the_end_of_rank_0_of_the_newest_generation(run_dir, capsys):
    write_log(run_dir, 9, 0, "old\n")
    write_log(run_dir, 10, 0, "".join(f"line {number}\n" for number in range(100)))
    assert main(["logs", str(run_dir), "-n", "2"]) == 0
    assert capsys.readouterr().out == "line 98\nline 99\n"
    assert main(["logs", str(run_dir), "--generation", "9"]) == 0
    assert capsys.readouterr().out == "old\n"


def test_logs_follows_over_a_restart_until_the_run_has_finished(run_dir, capfd):
    first = write_log(run_dir, 1, 2, "before\n")

    def go_on() -> None:
        time.sleep(0.5)
        with first.open("a") as file:
            file.write("then\n")
        time.sleep(0.5)
        write_log(run_dir, 2, 2, "restarted\n")
        time.sleep(0.5)
        write_run(run_dir, story(), snapshot(status="finished"))

    going_on = threading.Thread(target=go_on)
    going_on.start()
    assert main(["logs", str(run_dir), "--rank", "2", "--follow"]) == 0
    going_on.join()
    assert capfd.readouterr().out == "before\nthen\nrestarted\n"


@pytest.mark.parametrize("count", [0, 1, 7, 20_000, 30_000])
def test_the_last_lines_of_a_long_file_are_those_that_reading_it_all_gives(tmp_path, count):
    lines = [f"{number} {'x' * (number % 50)}" for number in range(20_000)]
    (tmp_path / "log").write_text("\n".join(lines))
    assert last_lines_of(tmp_path / "log", count) == (lines[-count:] if count else [])


@pytest.mark.parametrize(
    "words,said",
    [
        (["incidents", "{empty}"], "has no journal"),
        (["incident", "{run}", "4"], "there is no incident 4; there are 3"),
        (["logs", "{empty}"], "has no logs"),
        (["logs", "{run}", "--rank", "7"], "there is no log of rank 7"),
        (["logs", "{run}", "--rank", "0", "--generation", "5"], "rank_00000.log is missing"),
        (["logs", "{run}", "-n", "-1"], "-n is a number of lines from 0, not -1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run_dir, tmp_path_factory, capsys, words, said):
    write_log(run_dir, 1, 0, "")
    empty = tmp_path_factory.mktemp("empty")
    assert main([word.format(run=run_dir, empty=empty) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
