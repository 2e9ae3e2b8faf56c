"""One rank: what the agent's fork server runs in a process of its own, with torch imported already.

The user's command runs in this very process, so that a restart pays for no interpreter and no imports.
"""

import atexit
import ctypes
import importlib.metadata
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from goku_infra import environment
from goku_infra.diagnosis import flight_record
from goku_infra.errors import OpsError

PR_SET_PDEATHSIG = 1


class Place(NamedTuple):
    """What a rank is told beside torch's own variables."""

    log: str
    """File for its output."""
    environment: dict[str, str]
    fork_server: int
    """The process that has forked it."""


def run_rank(command: Sequence[str], places: dict[str, Place]) -> None:
    """Run `command` as one rank; `places` are those of this node's ranks, by RANK. Ends the process."""
    place = places[environment.rank()]
    die_with_the_parent(place.fork_server)  # which itself dies with the agent
    environment.add(place.environment)
    _write_output_to(place.log)
    from torch._C import _distributed_c10d

    flight_record.offer(Path(place.environment["GOKU_STACKS"]), *flight_record.recorders(_distributed_c10d))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business, which stops the run properly
    sys.argv = list(command)
    code = _run(command)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # No way back through that wrapper: it waits for the other ranks of the node before it lets one end well.
    os._exit(code)


def check_command(command: Sequence[str]) -> None:
    """
    Raises:
        OpsError: it is none that can run inside a warm process.
    """
    if not command:
        raise OpsError("no command; give one after --, such as: -- goku-mega train --config RECIPE.yaml")
    if not _is_python(command[0]) and not command[0].endswith(".py") and _entry_point(command[0]) is None:
        raise OpsError(
            f"{command[0]} is no command of an installed Python package; give one, a script.py, or python -m MODULE"
        )


def runnable(command: Sequence[str]) -> list[str]:
    """The command as a process of its own, whatever PATH says."""
    if _is_python(command[0]):
        return [sys.executable, *command[1:]]
    if command[0].endswith(".py"):
        return [sys.executable, *command]
    point = _entry_point(command[0])
    assert point is not None, command
    code = f"import sys; from {point.module} import {point.attr} as f; sys.argv[0] = {command[0]!r}; sys.exit(f())"
    return [sys.executable, "-c", code, *command[1:]]


def _run(command: Sequence[str]) -> int:
    """The command's exit code."""
    words = list(command)
    if _is_python(words[0]):
        words = words[1:]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            return 0
        if words[0].endswith(".py"):
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
            return 0
        function = _entry_point(words[0])
        assert function is not None, words
        return int(function.load()() or 0)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except Exception:  # torch's wrapper would keep it to itself
        traceback.print_exc()
        return 1


def _entry_point(name: str) -> importlib.metadata.EntryPoint | None:
    found = importlib.metadata.entry_points(group="console_scripts", name=os.path.basename(name))
    return next(iter(found), None)


def _is_python(word: str) -> bool:
    return os.path.basename(word).startswith("python")


def die_with_the_parent(parent: int) -> None:
    """From now on this process gets SIGKILL when the one that started it ends, whatever it is doing then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it has ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def _write_output_to(path: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
