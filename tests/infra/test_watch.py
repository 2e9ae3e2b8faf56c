"""`goku-ops watch` in a real terminal: the newest state fills the screen, the culprit is red, the end stays behind."""

import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from snapshots import quiet, snapshot, story, write_run
from terminal import Terminal

from goku_infra.operating.status import status, text

pytest.importorskip("rich")

BOLD_RED, BOLD_GREEN, RED, BOLD = "1;31", "1;32", "31", "1"


class Written:
    """A run whose controller writes its state every tenth of a second."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.state: dict[str, Any] = snapshot()
        self._ending = threading.Event()
        write_run(run_dir, story(), self.state)
        self._write()

    def _write(self) -> None:
        path = self.run_dir / "supervisor/state.json"
        path.with_suffix(".new").write_text(json.dumps(self.state | {"time_s": time.time()}))
        path.with_suffix(".new").replace(path)

    @contextmanager
    def going_on(self) -> Iterator["Written"]:
        def write_on() -> None:
            while not self._ending.wait(0.1):
                self._write()

        thread = threading.Thread(target=write_on)
        thread.start()
        try:
            yield self
        finally:
            self._ending.set()
            thread.join()


@pytest.fixture
def run(tmp_path) -> Iterator[Written]:
    with Written(tmp_path).going_on() as written:
        yield written


def watch(run: Written, **size: int) -> Terminal:
    return Terminal([sys.executable, "-m", "goku_infra.cli", "watch", str(run.run_dir), "--period", "0.2"], **size)


def test_the_screen_shows_what_status_says_and_the_culprit_in_red(run):
    with watch(run) as terminal:
        screen = terminal.until(lambda screen: "evidence" in "".join(screen.lines))
        assert screen.whole_screen and not screen.cursor_shown
        said = text(status(run.run_dir)).splitlines()
        assert screen.lines[0] == said[0] == "recovering: step 1,263 on 2 nodes, 8 ranks"
        assert screen.styled(BOLD_RED) == [said[0]]
        red = " ".join(screen.styled(RED))
        assert "lost: power-off" in red and "at fault in incident 3 (stopped_process); stopped (SIGSTOP)" in red
        shown = " ".join(" ".join(screen.lines).split())
        for line in said:  # whole, however they are broken
            if "goodput" not in line:
                assert " ".join(line.split()) in shown


def test_the_screen_follows_the_run_and_nothing_of_before_is_left(run):
    with watch(run) as terminal:
        terminal.until(lambda screen: "evidence" in "".join(screen.lines))
        run.state = quiet(step=1264)
        screen = terminal.until(lambda screen: "running: step 1,264" in screen.lines[0])
        screen = terminal.until(  # a screen may come in parts
            lambda screen: screen.styled(BOLD_GREEN) == [screen.lines[0]]
            and not screen.styled(RED) and not screen.styled(BOLD_RED)
        )  # fmt: skip
        assert "no incident so far" in screen.lines[1]
        assert not any("incident 3" in line or "power-off" in line for line in screen.lines)


def test_on_a_small_screen_the_first_lines_stay(run):
    with watch(run, height=6, width=44) as terminal:
        screen = terminal.until(lambda screen: screen.lines[0].startswith("recovering"))
        words = text(status(run.run_dir)).splitlines()[1]
        assert screen.lines[1] == textwrap.wrap(words, 44)[0]
        for _ in range(3):
            terminal._read_on()
        assert screen.lines[0].startswith("recovering")


def test_at_the_end_the_terminal_is_as_before_and_says_how_the_run_ended(run):
    with watch(run) as terminal:
        terminal.until(lambda screen: "evidence" in "".join(screen.lines))
        run.state = snapshot(status="finished", reason="stopped by the operator")
        assert terminal.finish() == 0
    assert not terminal.screen.whole_screen and terminal.screen.cursor_shown
    assert terminal.screen.lines[0].startswith("finished (stopped by the operator): step 1,263")


def test_an_operator_who_leaves_gets_the_terminal_back_without_a_word_of_python(run):
    with watch(run) as terminal:
        terminal.until(lambda screen: "evidence" in "".join(screen.lines))
        os.kill(terminal.pid, signal.SIGINT)
        assert terminal.finish() in (0, 130)
    assert not terminal.screen.whole_screen and terminal.screen.cursor_shown
    assert not any(word in line for line in terminal.screen.lines for word in ("Traceback", "KeyboardInterrupt"))
