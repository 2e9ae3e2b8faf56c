"""The processes of a node: who ends with whom, what comes back, and that nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import supervised
from supervised import Supervised, environment

from goku_infra.messages import read_address, supervisor_folder
from goku_infra.node import nursery
from goku_infra.node.scratch import scratch_folder
from goku_infra.node.standby import Standby
from goku_infra.settings import Settings, write_settings

LIMIT_S = 120.0
RANKS = 2
CONTROLLER = "goku_infra.control.controller"
STANDBY = "goku_infra.control.standby"
NURSERY = "goku_infra.node.nursery"
AGENT = "goku_infra.node.agent"
WORKER = "goku_infra.node.worker"
"""The fork server and its ranks."""


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {LIMIT_S} s")


def pids(run: Supervised, module: str) -> set[int]:
    found = set()
    for process in run.processes():
        try:
            if module in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def ends(gone: set[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in gone)


def left_in_memory(run_dir: Path) -> list[str]:
    name = scratch_folder(run_dir, os.uname().nodename).name
    return [path.name for path in Path("/dev/shm").glob(f"*{name}*")]


@pytest.fixture
def sleeping(tmp_path, monkeypatch) -> Supervised:
    """A run whose ranks do nothing; its nursery does not find the training code, whose imports take seconds."""
    monkeypatch.setattr(supervised, "IMPORTED_FROM", supervised.IMPORTED_FROM[1:])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(600)\n")
    return Supervised(tmp_path / "run", [str(script)], ranks=RANKS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_killed_on_a_node_comes_back_and_leaves_nothing(sleeping):
    with sleeping as run:
        run.until(lambda: len(pids(run, WORKER)) == RANKS + 1, "all ranks")
        (first_nursery,), (agent,) = pids(run, NURSERY), pids(run, AGENT)
        assert psutil.Process(agent).ppid() == first_nursery

        # The fork server: its ranks and its agent end with it, and the agent is forked again.
        old = pids(run, WORKER) | {agent}
        os.kill(next(pid for pid in old if psutil.Process(pid).ppid() == agent), signal.SIGKILL)
        run.until(lambda: ends(old), "end of the old ranks and agent")
        run.until(lambda: len(pids(run, WORKER)) == RANKS + 1, "all ranks again")
        assert pids(run, NURSERY) == {first_nursery} and pids(run, AGENT) != {agent}

        # The nursery: its agent ends with it, and another one is made.
        old = pids(run, WORKER) | pids(run, AGENT)
        os.kill(first_nursery, signal.SIGKILL)
        run.until(lambda: ends(old), "end of the old agent")
        run.until(lambda: len(pids(run, WORKER)) == RANKS + 1, "all ranks once more")
        assert pids(run, NURSERY) != {first_nursery}

        # The controller on standby takes over.
        (controller,), (standby,) = pids(run, CONTROLLER), run.until(lambda: pids(run, STANDBY), "standby")
        os.kill(controller, signal.SIGKILL)
        run.until(lambda: run.controller_pid() == standby, "the controller that was on standby")
        assert pids(run, CONTROLLER) == {standby}

        # All at once, as SLURM ends a job: nothing is left, not even in memory.
        for pid in (*pids(run, AGENT), *pids(run, NURSERY), run.process.pid, *pids(run, WORKER)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        run.finish(code=143)
    assert not left_in_memory(run.run_dir)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_keeper_takes_all_with_it(sleeping):
    with sleeping as run:
        run.until(lambda: len(pids(run, WORKER)) == RANKS + 1, "all ranks")
        all_of_node = pids(run, WORKER) | pids(run, AGENT) | pids(run, NURSERY)
        run.process.kill()
        until(lambda: ends(all_of_node), "end of the node's processes")


def test_imports_that_are_missing_are_no_error(tmp_path):
    """And what has been imported once is there in every agent."""
    program = (
        "import sys; from goku_infra.node import nursery\n"
        "nursery.PRELOAD = ('no_such_package', 'wave')\n"
        "nursery._become_agent = lambda parent, words: __import__('os')._exit(7 if 'wave' in sys.modules else 1)\n"
        "nursery.serve([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=b"\n\n", capture_output=True, env=environment(), timeout=LIMIT_S
    )
    assert done.stdout == b'{"exit_code": 7, "said": ""}\n' * 2, done.stderr


def test_everything_that_is_preloaded_can_be_imported():
    """A name that is wrong would show in slower starts alone."""
    assert [name for name in nursery.PRELOAD if find_spec(name) is None] == []


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "run"
    write_settings(
        Settings(run_dir=str(folder), command=("x.py",), job_id="local-1", nodes=1, min_nodes=1, ranks_per_node=1)
    )
    return folder


def waiting_pid(standby: Standby) -> int:
    standby.prepare()
    process = standby._waiting
    assert process is not None
    return process.pid


def test_a_controller_on_standby_becomes_one(run_dir):
    standby = Standby(run_dir, "127.0.0.1", run_dir / "log")
    pid = waiting_pid(standby)
    assert waiting_pid(standby) == pid
    standby.become_controller(1)
    address = until(lambda: read_address(supervisor_folder(run_dir)), "controller")
    assert (address["pid"], address["epoch"]) == (pid, 1)
    assert CONTROLLER in psutil.Process(pid).cmdline()
    psutil.Process(pid).kill()


def test_one_that_was_killed_on_standby_is_replaced(run_dir):
    standby = Standby(run_dir, "127.0.0.1", run_dir / "log")
    process = psutil.Process(waiting_pid(standby))
    process.kill()
    process.wait()
    standby.become_controller(1)
    address = until(lambda: read_address(supervisor_folder(run_dir)), "controller")
    assert address["pid"] != process.pid
    psutil.Process(address["pid"]).kill()


def test_an_unused_one_ends_with_its_agent(run_dir):
    program = (
        "import pathlib, sys; from goku_infra.node.standby import Standby\n"
        "folder = pathlib.Path(sys.argv[1]); standby = Standby(folder, '127.0.0.1', folder / 'log')\n"
        "standby.prepare(); print(standby._waiting.pid, flush=True); sys.stdin.read()"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", program, run_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert agent.stdout is not None
    pid = int(agent.stdout.readline())
    until(lambda: STANDBY in psutil.Process(pid).cmdline(), "standby")
    agent.kill()
    agent.communicate()
    until(lambda: ends({pid}), "end of the standby")
    assert read_address(supervisor_folder(run_dir)) is None
