"""What the journal comes to, kept up event by event: its cost does not grow with the length of a run."""

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from goku_infra.record.accounting import Ledger
from goku_infra.record.incidents import IncidentBook
from goku_infra.record.journal import Event

RECENT = 20
"""Alerts that are kept."""


class History:
    """The accounts of time, the incidents and the newest alerts of a journal that grows."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.incidents = IncidentBook()
        self.alerts: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._newest = -1

    def follow(self, events: Sequence[Event]) -> None:
        """Take up those of a journal's events that are new since the last call."""
        new = list(takewhile(lambda event: event.seq > self._newest, reversed(events)))
        for event in reversed(new):
            self.ledger.add(event)
            self.incidents.add(event)
            if event.kind == "alert":
                self.alerts.append({"time_s": event.time_s, **event.data})
            self._newest = event.seq
