"""The keeper of a node's agent: a small process that outlives it, starts another one when it dies, and answers the
controller that asks whether the node lives.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from goku_infra.messages import supervisor_folder
from goku_infra.node.nursery import EXIT_BROKEN, GENTLE_S
from goku_infra.node.scratch import remove_scratch_folder
from goku_infra.node.worker import die_with_the_parent

AGENT_RESTARTS = 20
"""In a row; an agent that dies more often cannot live on this node."""
SOUND_S = 30.0
"""An agent that has lived for so long is none of those."""
AGENT_BACKOFF_S = 0.1


class _End(NamedTuple):
    """Of an agent."""

    exit_code: int
    """Below zero: the number of the signal."""
    said: str


class Keeper:
    """A context manager: while it is open the node answers; at its end nothing of the agent is left."""

    def __init__(self, run_dir: Path, node: str, place: int, address: str) -> None:
        """
        Args:
            place: in the allocation.
            address: where the other nodes reach this one.
        """
        self._run_dir = run_dir
        self._node = node
        self._log = supervisor_folder(run_dir) / "logs" / f"agent_{node}.log"
        self._answering = socket.create_server((address, 0))
        threading.Thread(target=self._answer, daemon=True).start()
        port = self._answering.getsockname()[1]
        self._words = [str(run_dir), node, str(place), address, str(port)]
        self._nursery = self._start_nursery()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the agent as gently as it lets us."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # said twice, it must not keep us from clearing up
        self._answering.close()
        self._nursery.terminate()
        try:
            self._nursery.wait(2 * GENTLE_S)
        except subprocess.TimeoutExpired:
            self._nursery.kill()  # which ends the agent and its ranks
            self._nursery.wait()
        remove_scratch_folder(self._run_dir, self._node)

    def keep(self) -> int:
        """Have agents started, one after the other, until one ends as it was told to; the exit code for this node."""
        deaths = 0
        while deaths < AGENT_RESTARTS:
            began = time.monotonic()
            end = self._one_agent()
            if end.said:
                print(f"goku-ops: error: {end.said}", file=sys.stderr)
            if end.exit_code >= 0 and end.exit_code != EXIT_BROKEN:
                return end.exit_code
            print(
                f"goku-ops: the agent of {self._node} has ended ({end.exit_code}); see {self._log}; starting another",
                file=sys.stderr,
            )
            deaths = 1 if time.monotonic() - began > SOUND_S else deaths + 1
            time.sleep(AGENT_BACKOFF_S * deaths)
        print(f"goku-ops: error: the agent of {self._node} has ended {AGENT_RESTARTS} times", file=sys.stderr)
        return EXIT_BROKEN

    def _one_agent(self) -> _End:
        """Have an agent started and wait for its end; that of the nursery, of which another is made, is its end too."""
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        try:
            self._nursery.stdin.write(b"\n")
            answer = self._nursery.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer.endswith(b"\n"):
            return _End(**json.loads(answer))
        code = self._nursery.wait()
        self._nursery = self._start_nursery()
        return _End(code if code < 0 else EXIT_BROKEN, "")

    def _start_nursery(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "goku_infra.node.nursery", *self._words], bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                preexec_fn=partial(die_with_the_parent, os.getpid()),
                process_group=0,  # Ctrl-C is for us, who stop the run properly
            )  # fmt: skip

    def _answer(self) -> None:
        """Let the controller see that this node lives."""
        while self._answering.fileno() >= 0:
            try:
                self._answering.accept()[0].close()
            except OSError:  # too many files are open, or it has been closed
                time.sleep(AGENT_BACKOFF_S)
