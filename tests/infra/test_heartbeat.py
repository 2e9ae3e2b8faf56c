"""A rank's record tells the truth while it runs, when it is killed and when another process has its pid."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from goku_infra.heartbeat import PHASES, Heartbeat, is_alive, process_started_ticks, read_beats, to_json

INFRA = Path(__file__).parents[2] / "infra"
BEAT_FOREVER = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "from pathlib import Path\n"
    "from goku_infra.heartbeat import PHASES, Heartbeat\n"
    "heartbeat = Heartbeat(Path(sys.argv[2]), int(sys.argv[3]), 2)\n"
    "print('ready', flush=True)\n"
    "step = 0\n"
    "while True:\n"
    "    for phase in PHASES:\n"
    "        heartbeat.beat(step, phase)\n"
    "    step += 1\n"
)


@pytest.fixture
def start_rank(tmp_path):
    """Start processes that beat as fast as they can; those still running are killed at the end."""
    started = []

    def start(rank: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", BEAT_FOREVER, str(INFRA), str(tmp_path), str(rank)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def first_beats(folder: Path, ranks: int) -> list:
    while len(beats := read_beats(folder)) < ranks:
        pass
    return beats


def test_the_last_beat_of_every_rank_is_read_in_the_order_of_ranks(tmp_path):
    with Heartbeat(tmp_path, 1, 2) as second, Heartbeat(tmp_path, 0, 2) as first:
        for step in range(3):
            first.beat(step, "forward")
            second.beat(step, "checkpoint")
        beats = read_beats(tmp_path)
    assert [(beat.rank, beat.step, beat.phase) for beat in beats] == [(0, 2, "forward"), (1, 2, "checkpoint")]
    assert all(beat.pid == os.getpid() and beat.world_size == 2 and beat.number == 3 for beat in beats)


def test_a_rank_that_has_not_beaten_yet_is_not_shown(tmp_path):
    with Heartbeat(tmp_path, 0, 1):
        assert read_beats(tmp_path) == []


def test_a_run_that_ends_well_leaves_no_rank_and_one_that_fails_does(tmp_path):
    with Heartbeat(tmp_path, 0, 1) as heartbeat:
        heartbeat.beat(0, "data")
    assert read_beats(tmp_path) == []
    with pytest.raises(RuntimeError, match="loss"), Heartbeat(tmp_path, 0, 1) as heartbeat:
        heartbeat.beat(7, "backward")
        raise RuntimeError("loss")
    assert [beat.step for beat in read_beats(tmp_path)] == [7]


def test_beats_read_while_they_are_written_are_whole_and_never_go_back(tmp_path, start_rank):
    start_rank(0)
    first_beats(tmp_path, 1)
    seen = [read_beats(tmp_path)[0] for _ in range(2000)]
    assert all(beat.number == beat.step * len(PHASES) + PHASES.index(beat.phase) + 1 for beat in seen)
    assert [beat.number for beat in seen] == sorted(beat.number for beat in seen)


def test_a_rank_killed_at_any_moment_leaves_its_last_beat_and_is_not_alive(tmp_path, start_rank):
    for _ in range(8):
        process = start_rank(1)
        (alive,) = first_beats(tmp_path, 1)
        assert alive.pid == process.pid and is_alive(alive) is True
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped
        (dead,) = read_beats(tmp_path)
        assert dead.number >= alive.number
        assert is_alive(dead) is False
        process.wait()
        assert is_alive(dead) is False


def test_another_process_with_the_same_pid_is_not_the_rank(tmp_path):
    with Heartbeat(tmp_path, 0, 1) as heartbeat:
        heartbeat.beat(0, "data")
        (beat,) = read_beats(tmp_path)
    assert is_alive(beat) is True
    assert is_alive(replace(beat, started_ticks=beat.started_ticks - 1)) is False
    assert process_started_ticks(2**22 + 1) is None


def test_of_a_rank_on_another_host_nothing_is_claimed(tmp_path):
    with Heartbeat(tmp_path, 0, 1) as heartbeat:
        heartbeat.beat(0, "data")
        (beat,) = read_beats(tmp_path)
    shown = to_json(replace(beat, host="elsewhere"))
    assert shown["alive"] is None
    assert shown["age_s"] >= 0


def test_a_start_with_fewer_ranks_forgets_the_ranks_that_are_gone(tmp_path):
    for rank in range(4):
        Heartbeat(tmp_path, rank, 4).beat(5, "data")
    for rank in range(2):
        Heartbeat(tmp_path, rank, 2).beat(6, "data")
    assert [(beat.rank, beat.world_size) for beat in read_beats(tmp_path)] == [(0, 2), (1, 2)]


def test_a_file_that_is_no_record_is_passed_over(tmp_path):
    (tmp_path / "rank_00003").write_bytes(b"\x01")
    (tmp_path / "rank_00004").write_bytes(os.urandom(2000))
    assert read_beats(tmp_path) == []
