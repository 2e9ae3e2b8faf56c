"""How far a command is: sources, and for every stage how much it did, how fast, and how long it will still take."""

import logging
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from goku_mega.curate.engine import Event, Finished, Found, SetAside

logger = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
"""Between two lines where there is no terminal."""
SHOWN_PER_SECOND = 4


@dataclass
class StageCount:
    """What a stage has done so far."""

    scores: int = 0
    busy_s: float = 0.0


class Progress:
    """A table on a terminal, else a line now and then; a context manager."""

    def __init__(self, what: str, total: int, workers: int) -> None:
        self.what, self.total, self.workers = what, total, workers
        self.done = 0
        self.set_aside = 0
        self.stages: dict[str, StageCount] = {}
        self._began_s = self._said_s = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> "Progress":
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        if console.is_terminal:
            self._live = Live(
                get_renderable=self._table, console=console, refresh_per_second=SHOWN_PER_SECOND, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        logger.info("%s", self.line())

    def hear(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, Found):
            count = self.stages.setdefault(event.stage, StageCount())
            count.scores += 1
            count.busy_s += event.seconds
        else:
            self.done += isinstance(event, Finished | SetAside)
            self.set_aside += isinstance(event, SetAside)
        now = time.monotonic()
        if self._live is None and now - self._said_s > LINE_EVERY_S:
            self._said_s = now
            logger.info("%s", self.line())

    def line(self) -> str:
        """The whole in one line."""
        elapsed = time.monotonic() - self._began_s
        rate = self.done / elapsed if elapsed else 0.0
        left = f", {_duration((self.total - self.done) / rate)} left" if 0 < self.done < self.total else ""
        aside = f", {self.set_aside} set aside" if self.set_aside else ""
        return f"{self.what}: {self.done} of {self.total} sources, {rate:.1f} a second{left}{aside}"

    def rows(self) -> list[tuple[str, int, float, float]]:
        """(stage, scores, scores a second of work, seconds still to go by that rate), the dearest stage last."""
        share = (self.total - self.done) / self.done if self.done else float("nan")
        return [
            (name, count.scores, count.scores / count.busy_s if count.busy_s else float("nan"),
             count.busy_s * share / self.workers)
            for name, count in sorted(self.stages.items(), key=lambda item: item[1].busy_s)
        ]  # fmt: skip

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(title=self.line(), title_justify="left", box=None)
        for heading in ("stage", "scores", "a second", "left"):
            table.add_column(heading, justify="left" if heading == "stage" else "right")
        for name, scores, rate, left_s in self.rows():
            table.add_row(name, str(scores), f"{rate:.1f}", _duration(left_s))
        return table


def _duration(seconds: float) -> str:
    if not seconds < float("inf"):
        return "-"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
