"""What is written down of a process before it is killed, whatever state it is in."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from goku_infra.diagnosis import culprit, stacks

READY = "import sys, time, threading; print('ready', flush=True);"
REGISTERED = (
    "from pathlib import Path; from goku_infra.heartbeat import dump_stacks_on_signal as d; d(Path(sys.argv[1]));"
)


@pytest.fixture
def start(tmp_path):
    """Starts a Python process that says when it is ready; all are killed in the end."""
    processes = []

    def run(code: str) -> int:
        path = str(tmp_path / "rank_00000.stacks")
        process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout and process.stdout.readline() == b"ready\n"
        while stacks.process_state(process.pid) != "S":
            time.sleep(0.01)
        return process.pid

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def no_py_spy(monkeypatch):
    monkeypatch.setattr(stacks, "_py_spy", lambda: None)


@pytest.fixture
def py_spy():
    if stacks._py_spy() is None:
        pytest.skip("py-spy is not installed: `pip install py-spy`")


def sleeping(code: str = "") -> str:
    return f"import sys; {code} {READY}\ndef here(): time.sleep(600)\nhere()"


def functions(text: str) -> list[str]:
    return [frame.function for frame in culprit.main_thread(text)]


def test_py_spy_sees_the_main_thread(start, tmp_path, py_spy) -> None:
    text = stacks.dump(start(sleeping()), tmp_path, 3, timeout_s=60)
    assert text == (tmp_path / "stacks_rank_00003.txt").read_text()
    assert "here" in functions(text)
    assert "SigCgt" in text


def test_a_stopped_process_is_seen_and_stays_stopped(start, tmp_path, py_spy) -> None:
    pid = start(sleeping())
    os.kill(pid, signal.SIGSTOP)
    assert "here" in functions(stacks.dump(pid, tmp_path, 0, timeout_s=60))  # it may be about to stop
    while stacks.process_state(pid) != "T":
        time.sleep(0.01)
    text = stacks.dump(pid, tmp_path, 0, timeout_s=60)
    assert "here" in functions(text)
    assert text.startswith(f"== process ==\nrank 0 pid {pid} state T\n")
    assert stacks.process_state(pid) == "T"


def test_a_process_writes_its_stacks_itself_with_its_lines_of_code(start, tmp_path, no_py_spy) -> None:
    pid = start(sleeping(REGISTERED))
    for _ in range(2):  # each dump shows the present stacks only
        text = stacks.dump(pid, tmp_path, 0, timeout_s=60)
        assert functions(text) == ["here", "<module>"]
        assert "gdb" not in text
    assert stacks.process_state(pid) not in stacks.ENDED


def test_a_process_that_holds_the_lock_writes_its_stacks(start, tmp_path, no_py_spy) -> None:
    code = f"import sys, ctypes; {REGISTERED} {READY}\ndef locked(): ctypes.PyDLL(None).sleep(600)\nlocked()"
    pid = start(code)
    assert functions(stacks.dump(pid, tmp_path, 0, timeout_s=60)) == ["locked", "<module>"]


def test_a_process_that_would_die_of_the_request_is_not_asked(start, tmp_path, no_py_spy) -> None:
    pid = start(sleeping())
    text = stacks.dump(pid, tmp_path, 0, timeout_s=0.5)
    assert "takes no request" in text
    assert stacks.process_state(pid) not in stacks.ENDED


def test_a_frame_is_shown_with_its_line_of_code(start, tmp_path, py_spy) -> None:
    module = tmp_path / "asleep.py"
    module.write_text("import time\ndef rest():\n    time.sleep(600)\n")
    pid = start(f"import sys; sys.path.insert(0, '{tmp_path}'); import asleep; {READY} asleep.rest()")
    frame = culprit.main_thread(stacks.dump(pid, tmp_path, 0, timeout_s=60))[0]
    assert frame == culprit.Frame("rest", str(module), 3, "time.sleep(600)")


def test_native_frames_are_a_second_step(start, tmp_path, py_spy) -> None:
    pid = start(sleeping())
    texts = stacks.dump_native({3: pid}, tmp_path, timeout_s=60)
    assert "nanosleep" in texts[3] and (tmp_path / "native_rank_00003.txt").read_text() == texts[3]


def test_a_tool_that_hangs_takes_half_of_the_time(start, tmp_path, monkeypatch) -> None:
    slow = tmp_path / "py-spy"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(stacks, "_py_spy", lambda: str(slow))
    pid = start(sleeping(REGISTERED))
    started = time.monotonic()
    text = stacks.dump(pid, tmp_path, 0, timeout_s=8)
    assert time.monotonic() - started < 40
    assert "timed out" in text and functions(text) == ["here", "<module>"]


def test_a_process_that_is_gone_leaves_a_word(tmp_path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert f"pid {process.pid} state -" in stacks.dump(process.pid, tmp_path, 0, timeout_s=1)


def test_many_are_written_at_the_same_time(start, tmp_path) -> None:
    pids = {rank: start(sleeping()) for rank in range(3)}
    started = time.monotonic()
    texts = stacks.dump_texts(pids, tmp_path, timeout_s=40)
    assert time.monotonic() - started < 100
    assert sorted(texts) == [0, 1, 2]
    assert all(stacks.file_of(tmp_path, rank).read_text() == text for rank, text in texts.items())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_does_not_cost_the_stacks(tmp_path, monkeypatch) -> None:
    def full(*arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stacks.Path, "write_text", full)
    assert "state -" in stacks.dump(2**22 + 1, tmp_path / "incident", 0, timeout_s=1)
    assert list((tmp_path / "incident").iterdir()) == []
    (tmp_path / "file").touch()
    assert sorted(stacks.dump_texts({3: 2**22 + 1}, tmp_path / "file", timeout_s=1)) == [3]
