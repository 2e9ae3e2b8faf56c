"""A rank's record tells the truth while it runs, when it is killed and when another process has its pid."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from goku_infra.heartbeat import (
    FILE_BYTES,
    PHASES,
    STACKS_SIGNAL,
    Control,
    Heartbeat,
    is_alive,
    process_started_ticks,
    read_beats,
    to_json,
)

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
    (tmp_path / "rank_00004").write_bytes(os.urandom(FILE_BYTES))
    assert read_beats(tmp_path) == []


def test_of_two_starts_the_ranks_of_the_newer_are_shown(tmp_path):
    for rank in range(2):
        Heartbeat(tmp_path, rank, 2, generation=3).beat(5, "data")
    Heartbeat(tmp_path, 1, 2, generation=4).beat(4, "load")
    assert [(beat.rank, beat.generation, beat.phase) for beat in read_beats(tmp_path)] == [(1, 4, "load")]


def test_figures_stay_until_they_are_said_anew(tmp_path):
    heartbeat = Heartbeat(tmp_path, 0, 1)
    heartbeat.beat(0, "start")
    (beat,) = read_beats(tmp_path)
    assert (beat.loss, beat.gradient_norm, beat.committed_step) == (None, None, -1)
    heartbeat.beat(3, "data", loss=0.5, gradient_norm=2.0, committed_step=2)
    heartbeat.beat(3, "forward")
    (beat,) = read_beats(tmp_path)
    assert (beat.loss, beat.gradient_norm, beat.committed_step) == (0.5, 2.0, 2)


def test_a_beat_costs_a_few_microseconds(tmp_path):
    heartbeat = Heartbeat(tmp_path, 0, 1)
    costs = []
    for _ in range(20):
        began = time.perf_counter()
        for step in range(100):
            heartbeat.beat(step, "forward")
        costs.append((time.perf_counter() - began) / 100)
    assert min(costs) < 50e-6


def watched(folder: Path, seconds: float, work) -> tuple[float, float]:
    """Seconds of a main thread that its record says it was busy, and waiting: how many is the samples' affair."""
    with Heartbeat(folder, 0, 1) as heartbeat:
        heartbeat.beat(0, "forward")
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            work()
        (beat,) = read_beats(folder)
    return beat.busy_s, beat.waiting_s


class Handle:
    """Of a collective under way: as torch's, its wait has no Python frames of its own."""

    wait = staticmethod(time.sleep)


def test_work_is_told_from_waiting_for_other_ranks(tmp_path):
    for at_work in (lambda: sum(range(1000)), lambda: time.sleep(0.5)):  # 0.5 s as of a slow disk
        busy, waiting = watched(tmp_path, 1.0, at_work)
        assert busy > 0.2 and waiting == 0
    busy, waiting = watched(tmp_path, 1.0, lambda: Handle.wait(0.5))
    assert waiting > 0.2 and waiting > 3 * busy


def test_a_stopped_process_is_known_by_its_silent_thread(tmp_path):
    words = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
        "from goku_infra.heartbeat import Heartbeat\n"
        "with Heartbeat(Path(sys.argv[2]), 0, 1) as heartbeat:\n    heartbeat.beat(0, 'forward')\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", words, str(INFRA), str(tmp_path)])
    try:
        first_beats(tmp_path, 1)
        ends = time.monotonic() + 60
        while (beat := read_beats(tmp_path)[0]).alive_monotonic_s < beat.monotonic_s + 0.3:
            assert time.monotonic() < ends
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        while "T (" not in Path(f"/proc/{process.pid}/status").read_text():
            time.sleep(0.01)
        time.sleep(0.6)
        (beat,) = read_beats(tmp_path)
        assert time.monotonic() - beat.alive_monotonic_s > 0.5
    finally:
        process.kill()
        process.wait()


def test_what_the_agent_asks_for_is_read_by_the_ranks(tmp_path):
    agent, rank = Control(tmp_path), Control(tmp_path)
    assert rank.stop_requested == ""
    for kind in ("save", "now", ""):
        agent.request_stop(kind)
        assert rank.stop_requested == kind
    agent.request_stop("save")
    assert Control(tmp_path).stop_requested == "save"  # a rank that comes later, too
    assert read_beats(tmp_path) == []


def test_a_signal_writes_the_stacks_even_while_the_lock_is_held(tmp_path):
    words = (
        "import ctypes, sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
        "from goku_infra.heartbeat import dump_stacks_on_signal\n"
        "dump_stacks_on_signal(Path(sys.argv[2]))\n"
        "def holds_the_lock():\n    print('ready', flush=True)\n    ctypes.PyDLL(None).sleep(60)\n"
        "holds_the_lock()\n"
    )
    stacks = tmp_path / "logs/rank.stacks"
    process = subprocess.Popen([sys.executable, "-c", words, str(INFRA), str(stacks)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        process.send_signal(STACKS_SIGNAL)
        ends = time.monotonic() + 60
        while "holds_the_lock" not in stacks.read_text() and time.monotonic() < ends:
            time.sleep(0.01)
        assert "holds_the_lock" in stacks.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
