"""The run's metrics file for the charts: read as it grows, thinned to what a screen can show.

The newest rows are kept whole. Of those before them fewer and fewer are kept as the run goes on, everywhere as densely
and always with the extremes, so that a run of a million steps takes no more memory than one of ten thousand and still
shows every spike.
"""

import json
import os
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FIGURES = ("step", "loss", "gradient_norm", "tokens_per_s", "samples_per_s")
EXTREMES = (("loss", max), ("loss", min), ("gradient_norm", max), ("tokens_per_s", min))
"""Of rows in a row, those that are kept: a spike, a fall, and a moment at which the run was slow are what is looked
for."""
WHOLE = 2048
"""Newest rows that are kept as they are; at times twice as many."""
THINNED = 4096
"""Rows that are kept of all before them, at most."""
CHUNK_BYTES = 1 << 20
"""Read at a time, while nobody else can ask."""


class _Row(NamedTuple):
    figures: dict[str, Any]
    start: int
    """Where its line begins in the file."""
    bytes: int
    checksum: int
    """Of the line: whether a file that has replaced this one has it, too."""


class MetricsHistory:
    """Rows of a growing `metrics.jsonl`; may be asked by several threads.

    A restarted run replaces the file by the rows up to its checkpoint and goes on from there: of a new file, or one
    that has shrunk, only what comes after the last row that both have is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._older: list[_Row] = []
        self._newest: list[_Row] = []
        self._halvings = 0
        """How often `_older` has been thinned to half."""
        self._inode = self._offset = 0
        self._lock = threading.Lock()
        self._catching_up = threading.Lock()

    def rows(self, *, since: int = -1, points: int = 600) -> list[dict[str, Any]]:
        """Rows of steps after `since`, thinned to at most `points`; the extremes and the newest are among them.

        Of a long file that was not read as it grew the oldest rows come at first: a thread reads the others meanwhile.
        """
        if self._read_on() and not self._catching_up.locked():
            threading.Thread(target=self.catch_up, name="metrics", daemon=True).start()
        with self._lock:
            kept = [row for row in (*self._older, *self._newest) if row.figures["step"] > since]
        points = max(points, 1)
        if len(kept) > points:
            places = (points - 1) // len(EXTREMES)
            before = _extremes(kept[:-1], -(-(len(kept) - 1) // places)) if places else []
            kept = [*before, kept[-1]]
        return [row.figures for row in kept]

    def catch_up(self) -> None:
        """Read to the end of the file, however long it is; others may ask meanwhile."""
        with self._catching_up:
            while self._read_on():
                pass

    def _read_on(self) -> bool:
        """Read at most one chunk; whether there is more."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    status = os.fstat(file.fileno())
                    if status.st_ino != self._inode or status.st_size < self._offset:
                        self._inode = status.st_ino
                        self._go_back(file.fileno())
                    data = os.pread(file.fileno(), CHUNK_BYTES, self._offset)
            except OSError:
                return False
            whole = data[: data.rfind(b"\n") + 1]
            for line in whole.splitlines(keepends=True):
                self._take(line)
            return bool(whole) and self._offset < status.st_size

    def _take(self, line: bytes) -> None:
        start, self._offset = self._offset, self._offset + len(line)
        try:
            read = json.loads(line)
            figures = {"step": read["step"]} | {name: read.get(name) for name in FIGURES if name != "step"}
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        self._newest.append(_Row(figures, start, len(line), zlib.crc32(line)))
        if len(self._newest) < 2 * WHOLE:
            return
        leaving, self._newest = self._newest[:WHOLE], self._newest[WHOLE:]
        for _ in range(self._halvings):
            leaving = _halved(leaving)
        self._older += leaving
        if len(self._older) > THINNED:
            self._older = _halved(self._older)
            self._halvings += 1

    def _go_back(self, file: int) -> None:
        """To the last row that another file has in the same place; all before it are there, too."""
        known = [*self._older, *self._newest]
        alike, end = 0, len(known)
        while alike < end:
            middle = (alike + end) // 2
            row = known[middle]
            if zlib.crc32(os.pread(file, row.bytes, row.start)) == row.checksum:
                alike = middle + 1
            else:
                end = middle
        self._newest = self._newest[: max(0, alike - len(self._older))]
        self._older = self._older[:alike]
        self._offset = known[alike - 1].start + known[alike - 1].bytes if alike else 0
        if not alike:
            self._halvings = 0


def _halved(rows: Sequence[_Row]) -> list[_Row]:
    return _extremes(rows, 2 * len(EXTREMES))


def _extremes(rows: Sequence[_Row], count: int) -> list[_Row]:
    """Of each `count` rows in a row the extremes, in their order; a figure that is not known is none."""
    kept: list[_Row] = []
    for first in range(0, len(rows), count):
        group = rows[first : first + count]
        chosen = set()
        for name, extreme in EXTREMES:
            known = [(row.figures[name], place) for place, row in enumerate(group) if row.figures[name] is not None]
            chosen.add(extreme(known)[1] if known else 0)
        kept += [group[place] for place in sorted(chosen)]
    return kept
