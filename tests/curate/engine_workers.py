"""Workers for the engine's tests: a task says what befalls the one that takes it."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from goku_mega.curate.engine import Teller
from goku_mega.errors import ConfigError, MediaError

Task = tuple[str, int]


def make(folder: str) -> Callable[[Task, Teller], None]:
    """A worker that leaves a mark in the folder for every attempt."""

    def work(task: Task, teller: Teller) -> None:
        what, number = task
        teller.begins("first")
        teller.found("first", f"{number}", {"value": number}, 0.0)
        teller.begins("second")
        mark = Path(folder) / f"{number}"
        attempts = len(list(Path(folder).glob(f"{number}.*")))
        mark.with_suffix(f".{attempts}").touch()
        if what == "hang":
            time.sleep(3600)
        if what == "crash" or (what == "crash once" and attempts == 0):
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "media":
            raise MediaError("clip.mp4: is damaged")
        if what == "error":
            raise ZeroDivisionError("by nothing")
        if what == "config":
            raise ConfigError("no such model")
        teller.found("second", f"{number}", {"value": 2 * number}, 0.0)

    return work


def make_nothing() -> None:
    """A worker that cannot be made."""
    raise ConfigError("motion.weights: no such file")
