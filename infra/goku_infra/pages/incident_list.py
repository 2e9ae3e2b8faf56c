"""All incidents of a run as JSON, kept up with the journal: what was read once is not read again."""

import json
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from goku_infra.record.incidents import IncidentBook, sentence
from goku_infra.record.journal import Event

PROGRESS = b'"kind":"progress"'
HEAD = 64
"""Bytes of a line that hold its kind."""


class IncidentList:
    """Follows a run's `journal.jsonl`; may be asked by several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._book = IncidentBook()
        self._offset = self._epoch = 0
        self._lock = threading.Lock()
        self._json = self._rendered()

    def as_json(self) -> bytes:
        """`{"incidents": [...]}`, by number, each with its `sentence`."""
        with self._lock:
            if self._read_on():
                self._json = self._rendered()
            return self._json

    def _read_on(self) -> bool:
        """Take up the whole lines that are new; whether any may concern an incident."""
        is_new = False
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                if PROGRESS in line[:HEAD]:  # most lines are, and none of them changes an incident
                    continue
                is_new = True
                try:
                    event = Event(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                if event.epoch >= self._epoch:  # else it is by a controller that had been superseded
                    self._epoch = event.epoch
                    self._book.add(event)
        return is_new

    def _rendered(self) -> bytes:
        rows = [{**asdict(incident), "sentence": sentence(incident)} for incident in self._book.all()]
        return json.dumps({"incidents": rows}).encode()
