"""The new rows of a run's metrics, as rank 0 writes them: no step is missed, however short."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

LOOK_BACK_BYTES = 1 << 20
"""How much of the end of a file is read that was not read as it grew: months of rows are never read at once."""
REMEMBERED = 20_000
"""Rows that are known again when a restart has replaced the file; more than `LOOK_BACK_BYTES` hold."""


class MetricsTail:
    """Reads `metrics.jsonl` as it grows.

    A restarted run replaces the file by the rows up to its checkpoint and goes on from there, so the first rows of a
    new file have been seen before. They are told by their text: the same step trained again takes another time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, Any] = {}
        """The newest row; empty before the first."""
        self.saving_s = 0.0
        """Seconds that saves have blocked since the generation's start."""
        self._offset = 0
        self._last_line = b""
        """It ends at the offset: if it does not stand there any more, the file is another one."""
        self._status: tuple[int, int, int] = (0, 0, 0)
        self._seen: dict[int, int] = {}
        """Checksums of the newest rows by step."""
        self.past = self.read()
        """The newest rows of those that there were at the start."""
        self.saving_s = 0.0

    def restart(self, saving_s: float = 0.0) -> None:
        """A new generation begins, or one goes on whose saves have blocked `saving_s` so far."""
        self.saving_s = saving_s

    def read(self) -> list[dict[str, Any]]:
        """The whole rows written since the last call; of a file cut back to a checkpoint only those after it."""
        lines, is_new_file = self._new_lines()
        rows: list[dict[str, Any]] = []
        may_be_known = is_new_file and bool(self._seen)
        oldest = next(iter(self._seen), 0)
        for line in lines:
            row = _row(line)
            if row is None:
                continue
            step, checksum = row["step"], zlib.crc32(line)
            if may_be_known and (step < oldest or self._seen.get(step) == checksum):
                continue
            if may_be_known:
                may_be_known = False
                self._seen = {seen: known for seen, known in self._seen.items() if seen < step}
            self._seen[step] = checksum
            rows.append(row)
        for step in list(self._seen)[: max(0, len(self._seen) - REMEMBERED)]:
            del self._seen[step]
        if rows:
            self.last = rows[-1]
            self.saving_s += sum(row.get("checkpoint_s") or 0.0 for row in rows)
        return rows

    def _new_lines(self) -> tuple[list[bytes], bool]:
        """What has been written since the last call, and whether that is to a new file."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                now = (status.st_ino, status.st_size, status.st_mtime_ns)
                if now == self._status:
                    return [], False
                start = self._offset - len(self._last_line)
                file.seek(start)
                data = file.read()
                is_new = not self._offset or not data.startswith(self._last_line)
                if is_new:
                    start = file.seek(max(0, status.st_size - LOOK_BACK_BYTES))
                    data = file.read()
        except OSError:
            return [], False
        self._status = now
        lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
        lines = [line + b"\n" for line in lines]
        self._offset = start + sum(map(len, lines))
        # The first is the last of the last time, or one whose begin was not read.
        known = int(bool(start)) if is_new else int(bool(self._last_line))
        if lines or is_new:
            self._last_line = lines[-1] if lines else b""
        return lines[known:], is_new


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None
