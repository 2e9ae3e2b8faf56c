"""The nursery of a node: one process that imports torch and the training code, and forks agents from itself.

The imports take seconds, a fork some hundredths of one. The keeper writes a byte for every agent that it wants and
reads a line when that has ended. At SIGTERM the nursery ends its agent gently, and itself. It has one thread of our
own and touches no GPU.
"""

import gc
import importlib
import json
import logging
import os
import select
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from types import FrameType
from typing import NoReturn

from goku_infra.node.worker import die_with_the_parent

PRELOAD = (
    "torch", "torch.distributed", "goku_infra.node.agent", "goku_mega.train.loop", "goku_mega.cli",
    "goku_mega.config_load", "numpy.ma", "rich.progress", "runpy", "torch.utils.tensorboard",
)  # fmt: skip
"""What agents and ranks need; nothing in it may touch a GPU."""
GENTLE_S = 5.0
"""For an agent that is asked to end."""
SAID_BYTES = 4096
EXIT_BROKEN = 75
"""The agent itself has failed: its keeper wants another."""


def serve(words: list[str]) -> None:
    """Fork an agent for every byte on stdin; say on stdout with what exit code it has ended, and what it has said."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports may print is no answer
    signal.signal(signal.SIGTERM, _leave)
    gc.disable()  # modules are no garbage: looking for some takes a quarter of the imports' time
    for name in PRELOAD:
        if find_spec(name.split(".")[0]):
            with suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()  # collections in a fork then leave these pages shared
    gc.enable()
    while os.read(0, 1):
        output, end_of_agent = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # each side its own handler
        nursery = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.dup2(end_of_agent, 1)
            for handle in (output, end_of_agent, answers):
                os.close(handle)
            _become_agent(nursery, words)
        os.close(end_of_agent)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except SystemExit:
            _end(pid)
            raise
        said = _read_what_is_there(output)
        os.write(answers, json.dumps({"exit_code": code, "said": said}).encode() + b"\n")


def _become_agent(nursery: int, words: list[str]) -> NoReturn:
    """Be an agent in this fresh fork, to its end."""
    code = EXIT_BROKEN
    try:
        die_with_the_parent(nursery)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        from goku_infra.node import agent

        code = agent.main(*words)
    except Exception:
        logging.exception("the agent has failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(pid: int) -> None:
    """Let an agent clear up and end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(ProcessLookupError):  # it has ended just now
        handle = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        if not select.select([handle], [], [], GENTLE_S)[0]:
            os.kill(pid, signal.SIGKILL)


def _read_what_is_there(output: int) -> str:
    """Not up to the end: what the agent has started may still hold the pipe."""
    os.set_blocking(output, False)
    try:
        return os.read(output, SAID_BYTES).decode(errors="replace").strip()
    except BlockingIOError:
        return ""
    finally:
        os.close(output)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    serve(sys.argv[1:])
