"""The engine: a task that hangs, crashes or fails costs itself alone; the others come through, each once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from goku_mega.curate.engine import Finished, Found, SetAside, run_local
from goku_mega.errors import ConfigError

WORKERS = "engine_workers:make"


def run(tasks, folder: Path, *, workers: int = 2, time_limit_s: float = 60.0) -> list:
    return list(run_local(tasks, WORKERS, (str(folder),), workers=workers, time_limit_s=time_limit_s))


def workers_alive() -> list:
    """The engine's; other tests of this process may keep children of their own."""
    return [child for child in multiprocessing.active_children() if child.name == "curate-worker"]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_finished_once_with_all_that_was_found(tmp_path, workers):
    events = run([("fine", number) for number in range(20)], tmp_path, workers=workers)
    assert sorted(event.task[1] for event in events if isinstance(event, Finished)) == list(range(20))
    assert not workers_alive()
    found = {(event.stage, event.key): event.score["value"] for event in events if isinstance(event, Found)}
    assert found == {("first", str(n)): n for n in range(20)} | {("second", str(n)): 2 * n for n in range(20)}
    assert not workers_alive()


def test_what_fails_is_set_aside_with_its_stage_and_reason_and_the_rest_goes_on(tmp_path):
    tasks = [("media", 0), ("fine", 1), ("error", 2), ("crash", 3), ("fine", 4), ("hang", 5), ("fine", 6)]
    events = run(tasks, tmp_path, time_limit_s=2.0)
    aside = {event.task[1]: event for event in events if isinstance(event, SetAside)}
    assert {number: event.kind for number, event in aside.items()} == {0: "media", 2: "error", 3: "death", 5: "time"}
    assert all(event.stage == "second" for event in aside.values())
    assert aside[0].reason == "clip.mp4: is damaged"
    assert aside[2].reason.startswith("ZeroDivisionError: by nothing (engine_workers.py:")
    assert "SIGSEGV" in aside[3].reason and "longer than 2 s" in aside[5].reason
    assert sorted(event.task[1] for event in events if isinstance(event, Finished)) == [1, 4, 6]


def test_a_task_whose_worker_died_is_tried_twice_in_all(tmp_path):
    events = run([("crash once", 0), ("crash", 1)], tmp_path, workers=1)
    assert [event.task[1] for event in events if isinstance(event, Finished)] == [0]
    assert [event.task[1] for event in events if isinstance(event, SetAside)] == [1]
    assert len(list(tmp_path.glob("0.*"))) == len(list(tmp_path.glob("1.*"))) == 2


def test_a_worker_that_cannot_be_made_ends_the_command_with_its_reason():
    with pytest.raises(ConfigError, match="motion.weights: no such file"):
        list(run_local([("fine", 0)], "engine_workers:make_nothing", (), workers=2, time_limit_s=60.0))
    assert not workers_alive()


def test_a_wrong_setting_that_shows_at_work_ends_the_command_too(tmp_path):
    with pytest.raises(ConfigError, match="no such model"):
        run([("fine", 0), ("config", 1), ("fine", 2)], tmp_path)


def test_no_worker_outlives_a_killed_command(tmp_path):
    """Not even one that hangs in the middle of a task."""
    folder = Path(__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "from goku_mega.curate.engine import run_local\n"
        f"list(run_local([('hang', 0), ('hang', 1)], {WORKERS!r}, ({str(tmp_path)!r},), workers=2, time_limit_s=600))\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(folder)})
    limit = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert command.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    children = psutil.Process(command.pid).children(recursive=True)
    assert len(children) >= 2
    command.send_signal(signal.SIGKILL)
    command.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
