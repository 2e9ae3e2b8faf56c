"""An agent's controller on standby: raising a controller is then writing a line."""

import subprocess
import sys
import threading
from pathlib import Path


class Standby:
    """Not started at first; `prepare` and `become_controller` may be called from different threads."""

    def __init__(self, run_dir: Path, host: str, log: Path) -> None:
        """
        Args:
            host: this node, as the other nodes reach it.
        """
        self._words = [str(run_dir), host]
        self._log = log
        self._waiting: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Have one waiting from now on."""
        with self._lock:
            if self._waiting is None or self._waiting.poll() is not None:
                self._waiting = self._start()

    def become_controller(self, epoch: int) -> None:
        """Let the one that waits, or one that is started now, be the controller of an epoch. It outlives us."""
        with self._lock:
            process = self._waiting or self._start()
            self._waiting = None
            try:
                self._tell(process, epoch)
            except BrokenPipeError:  # it was killed while it waited
                self._tell(self._start(), epoch)

    def _tell(self, process: "subprocess.Popen[bytes]", epoch: int) -> None:
        assert process.stdin is not None
        process.stdin.write(b"%d\n" % epoch)
        process.stdin.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "goku_infra.control.standby", *self._words], bufsize=0,
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
