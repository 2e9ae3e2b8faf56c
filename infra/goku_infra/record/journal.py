"""The supervisor's memory: typed events, one JSON line each, only ever appended.

A controller that is killed starts again from these lines alone, and so do the incidents, the accounts of time and the
operator's pages. An event is on disk before anything is done about it.

The file has every line; in memory, of reports of progress in a row only the newest is kept. So what a controller holds
and reads back grows with what has happened to a run, not with how long it has run.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

FILE = "journal.jsonl"


@dataclass(frozen=True)
class Event:
    """One thing that happened to a run."""

    seq: int
    """Position in the journal, from 0: the order of events, whatever the clocks say."""
    kind: str
    """A key of `KINDS`."""
    time_s: float
    """Unix time at which the controller wrote it."""
    epoch: int
    """Which controller of the run wrote it: 1 for the first."""
    generation: int
    """The start of the ranks that it belongs to: 0 before the first."""
    data: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "run_started": "command, ranks_per_node, nodes, spares, min_nodes, job_id, requeues (of the job so far)",
    "controller_started": "host, pid",
    "node_joined": "node, place, host, keeper_port, slots, running (the generation whose ranks it brought along, or 0)",
    "node_left": "node, reason",
    "waiting": "reason: too few nodes for a start, from now on",
    "generation_started": "nodes (in the order of ranks), world_size, reason, incident (number or null), skip_steps",
    "first_step": "step: the first step that the ranks of this generation finished; resumed_from",
    "caught_up": "step: further than the run has ever been; what came before was computed again",
    "progress": "step, committed_step, loss, saving_s (blocked by saves since this generation's start), every 10 s",
    "incident_opened": "incident, cause, ranks, node, step, fault_s (last sign of health, unix), detail, data",
    "incident_blamed": "incident, cause, ranks, node, detail, evidence (number of files in incidents/NNNN)",
    "action": "incident, action, reason, and what it applies to",
    "incident_closed": "incident, step, lost_steps",
    "node_excluded": "node, reason",
    "node_drained": "node: SLURM was asked to give it to nobody, and had an answer",
    "node_readmitted": "node, reason",
    "request": "request, text, command: something that the operator must approve",
    "request_answered": "request, approved (bool), by",
    "alert": "level (info, warning, critical), text",
    "stop_requested": "reason, after_save (bool), requeue (bool)",
    "finished": "status (done, stopped, failed, requeued), step, reason, exit_code",
}
"""What every kind of event says in its `data`."""


UNHURRIED = frozenset({"node_joined", "node_left", "node_drained", "progress", "alert"})
"""Nothing is done about these: a kill of the controller does not lose them, the next event takes them to disk, and a
disk that is full does without them."""
_REPORT = re.compile(rb'{"seq":\d+,"kind":"progress","time_s":[^,]+,("epoch":\d+,"generation":\d+),.*}}\n')
"""A line of progress, with whose it is."""


class Journal:
    """The journal of one run, open for appending; a context manager.

    Opening it reads what is there; a last line that a kill has torn is cut off.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        self.events, whole = _read(path)
        """As `read_events` would give them at any time."""
        self.epoch = epoch
        self.generation = max((event.generation for event in self.events), default=0)
        # Appending: whatever a controller that has been superseded still writes, it overwrites nothing.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, whole)

    def write(self, kind: str, **data: Any) -> Event:
        """Append an event and, unless it is `UNHURRIED`, wait until it is on disk.

        Raises:
            OSError: it cannot be written; then it has not happened. Never for an event that is `UNHURRIED`.
        """
        assert kind in KINDS, kind
        seq = self.events[-1].seq + 1 if self.events else 0
        event = Event(seq, kind, time.time(), self.epoch, self.generation, data)
        try:
            self._append(_line(event))
            if kind not in UNHURRIED:
                os.fdatasync(self._file)
        except OSError:
            if kind in UNHURRIED:
                return event
            raise
        if kind == "progress" and self.events and _is_report_of_the_same(self.events[-1], event):
            self.events.pop()
        self.events.append(event)
        return event

    def _append(self, line: bytes) -> None:
        """A line, or nothing of it: the next one would be glued to a torn one."""
        written = os.write(self._file, line)
        if written != len(line):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(f"the journal cannot be written any further: no space for a line of {len(line)} bytes")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def read_events(path: Path) -> list[Event]:
    """The events of a journal in their order, none if there is no file yet.

    Of reports of progress in a row the newest stands for all. Lines that are not whole are passed over, and so is what
    a controller wrote after it had been superseded.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Event], int]:
    """The events and where the last whole line ends, bytes."""
    events: list[Event] = []
    if not path.exists():
        return events, 0
    torn = b""
    with path.open("rb") as file:
        for line in _newest_reports(file):
            if not line.endswith(b"\n"):
                torn = line
                continue
            try:
                event = Event(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if not events or event.epoch >= events[-1].epoch:
                events.append(event)
        return events, file.tell() - len(torn)


def _newest_reports(lines: Iterable[bytes]) -> Iterator[bytes]:
    """All lines, but of the reports of progress that follow each other only the last.

    They are most of a journal: they are told by their text, which is much quicker than to parse them.
    """
    held, holder = b"", b""
    for line in lines:
        match = _REPORT.fullmatch(line)
        owner = match[1] if match else b""
        if held and owner != holder:
            yield held
        held, holder = (line, owner) if match else (b"", b"")
        if not match:
            yield line
    if held:
        yield held


def _is_report_of_the_same(before: Event, event: Event) -> bool:
    return (before.kind, before.epoch, before.generation) == (event.kind, event.epoch, event.generation)


def _line(event: Event) -> bytes:
    return (json.dumps(vars(event), separators=(",", ":")) + "\n").encode()
