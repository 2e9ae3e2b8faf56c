"""Every second of a run in exactly one class: what was training, and what kept it from training.

Pure: journal events in, spans of time out. A fault is known only after the fact, so the seconds between the last sign
of health and its detection change their class when it is found; figures of the past may go down.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from goku_infra.record.incidents import FOUND_WHILE_RUNNING
from goku_infra.record.journal import Event

CLASSES = ("productive", "recomputed", "saving", "start_up", "detection", "restart", "waiting_for_nodes")
"""
productive: steps that the run had not done before. recomputed: steps done again after a restart. saving: training
blocked by a save. start_up: from the start of a job to its first step. detection: from a fault's last sign of health
to its detection. restart: from there to the first step after it. waiting_for_nodes: too few nodes, or no job at all.
"""
TRAINING = ("productive", "recomputed")
SETTLED_AFTER_S = 3600.0
"""What is older does not change any more while the ranks train: no fault is found so late."""


class Span(NamedTuple):
    """Seconds of one class; the spans of a run follow each other without a gap."""

    start_s: float
    end_s: float
    kind: str


class _Pause(NamedTuple):
    """An incident that may have stopped the ranks."""

    fault_s: float
    opened_s: float
    step: int
    """Steps done when it was found."""


def account(events: Sequence[Event], until_s: float) -> dict[str, float]:
    """Seconds of every class of `CLASSES`; they add up to until_s - the first event's time.

    Give the time of a last `finished` event as `until_s` (`end_s`), or what follows counts as waiting for nodes.
    """
    ledger = Ledger()
    for event in events:
        ledger.add(event)
    return ledger.totals(until_s)


def goodput(accounts: dict[str, float]) -> float:
    """The productive share of all seconds, 0 to 1; 0 before the first second."""
    total = sum(accounts.values())
    return accounts["productive"] / total if total > 0 else 0.0


def end_s(events: Sequence[Event], now_s: float) -> float:
    """When the run's time ends: its last `finished` event if nothing followed and no requeue, else now."""
    if events and events[-1].kind == "finished" and events[-1].data.get("status") != "requeued":
        return events[-1].time_s
    return now_s


class Ledger:
    """The account of a journal that grows: add the events as they are written, ask for totals at any time."""

    def __init__(self) -> None:
        self._settled = dict.fromkeys(CLASSES, 0.0)
        self._spans: list[Span] = []
        self._kind = "start_up"
        self._now: float | None = None
        self._highest_step = -1
        self._pauses: dict[int, _Pause] = {}
        self._last_action: dict[int, float] = {}
        self._stopped = False
        """The ranks are down: there is nothing to detect until they are started again."""
        self._starting_kind = "start_up"
        self._controller_gap: tuple[float, float] | None = None
        """(last event of the controller before, start of this one) until it is known whether ranks outlived it."""
        self._saved: tuple[float, float] = (0.0, 0.0)
        """(time, seconds blocked by saves since the start of the generation) at the last report."""

    def add(self, event: Event) -> None:
        """Count on with the journal's next event."""
        before = self._now
        now = event.time_s if before is None else max(before, event.time_s)
        self._advance(now)
        data = event.data
        match event.kind:
            case "run_started":
                self._begin_job(now, before)
            case "controller_started":
                self._controller_gap = (now if before is None else before, now)
            case "node_joined":
                if data.get("running") and data["running"] == event.generation:
                    self._controller_gap = None
            case "waiting":
                self._apply_pauses(now)
                self._stopped, self._kind = True, "waiting_for_nodes"
            case "generation_started":
                self._begin_generation(now, data.get("incident"))
            case "first_step":
                step = data.get("step")
                again = step is not None and step <= self._highest_step
                self._kind = "recomputed" if again else "productive"
                self._saved = (now, 0.0)
                self._note_step(step)
            case "caught_up":
                self._kind = "productive" if self._kind == "recomputed" else self._kind
                self._note_step(data.get("step"))
            case "progress":
                self._progress(now, data)
            case "incident_opened":
                self._open(now, event)
            case "action":
                self._last_action[data.get("incident", -1)] = now
            case "incident_closed":
                self._pauses.pop(data.get("incident", -1), None)
            case "finished":
                self._apply_pauses(now)
                self._stopped, self._kind, self._starting_kind = True, "waiting_for_nodes", "start_up"

    def totals(self, until_s: float) -> dict[str, float]:
        """Seconds of every class up to `until_s`."""
        totals = dict(self._settled)
        for span in self.recent_spans(until_s):
            totals[span.kind] += span.end_s - span.start_s
        return totals

    def recent_spans(self, until_s: float) -> list[Span]:
        """The spans that may still change, of the last start of the ranks, the present included."""
        if self._now is None:
            return []
        spans = list(self._spans)
        _append(spans, self._now, max(until_s, self._now), self._kind)
        return _paused(spans, self._pauses.values(), max(until_s, self._now))

    def _advance(self, now: float) -> None:
        if self._now is not None:
            _append(self._spans, self._now, now, self._kind)
        self._now = now

    def _begin_job(self, now: float, before: float | None) -> None:
        """A job begins; if another one ended without a word, nothing trained since its last event."""
        if before is not None and not self._stopped:
            gap_start = self._controller_gap[0] if self._controller_gap else before
            self._spans = relabelled(self._spans, gap_start, now, "waiting_for_nodes")
        self._controller_gap = None
        self._pauses.clear()
        self._stopped, self._kind, self._starting_kind = True, "start_up", "start_up"

    def _begin_generation(self, now: float, incident: int | None) -> None:
        if self._controller_gap and incident is None and not self._stopped:
            gap_start, gap_end = self._controller_gap
            self._spans = relabelled(self._spans, gap_start, gap_end, "waiting_for_nodes")
            self._spans = relabelled(self._spans, gap_end, now, "start_up")
            self._starting_kind = "start_up"
        elif incident is not None and not self._pauses and not self._stopped:
            since = self._last_action.get(incident, now)
            self._spans = relabelled(self._spans, since, now, "restart", of=(*TRAINING, "saving"))
        self._apply_pauses(now)
        self._controller_gap = None
        self._settle(now)
        self._stopped, self._kind, self._starting_kind = False, self._starting_kind, "restart"

    def _open(self, now: float, event: Event) -> None:
        step = event.data.get("step")
        self._note_step(step)
        if self._stopped or event.data.get("cause") in FOUND_WHILE_RUNNING:
            return
        fault_s = min(max(event.data.get("fault_s") or now, self._generation_start(now)), now)
        self._pauses[event.data["incident"]] = _Pause(fault_s, now, self._highest_step if step is None else step)

    def _progress(self, now: float, data: dict[str, Any]) -> None:
        step = data.get("step")
        if step is not None:
            # Two steps on: the others may finish the step in which one fails, but not the next.
            self._pauses = {number: pause for number, pause in self._pauses.items() if step < pause.step + 2}
            if self._kind == "recomputed" and step > self._highest_step:
                self._kind = "productive"
            self._note_step(step)
        since, saved_s = self._saved
        total_s = data.get("saving_s") or 0.0
        if total_s > saved_s:
            self._spans = _with_saving(self._spans, since, now, total_s - saved_s)
        self._saved = (now, max(total_s, saved_s))
        self._settle(now - SETTLED_AFTER_S)

    def _apply_pauses(self, now: float) -> None:
        self._spans = _paused(self._spans, self._pauses.values(), now)
        if self._pauses:
            self._starting_kind = "restart"
        self._pauses.clear()

    def _generation_start(self, now: float) -> float:
        return self._spans[0].start_s if self._spans else now

    def _settle(self, until_s: float) -> None:
        """What ended before a start of the ranks, or long ago, changes no more."""
        count = 0
        for span in self._spans:
            if span.end_s > until_s:
                break
            self._settled[span.kind] += span.end_s - span.start_s
            count += 1
        if count:
            del self._spans[:count]

    def _note_step(self, step: int | None) -> None:
        self._highest_step = max(self._highest_step, -1 if step is None else step)


def relabelled(
    spans: Iterable[Span], start_s: float, end_s: float, kind: str, of: Sequence[str] = CLASSES
) -> list[Span]:
    """The spans with the seconds between two times turned into `kind`, where they are one of `of`."""
    result: list[Span] = []
    for span in spans:
        low = min(max(start_s, span.start_s), span.end_s)
        high = max(min(end_s, span.end_s), low)
        changed = kind if span.kind in of else span.kind
        for start, end, label in (
            (span.start_s, low, span.kind), (low, high, changed), (high, span.end_s, span.kind),
        ):  # fmt: skip
            _append(result, start, end, label)
    return result


def _append(spans: list[Span], start_s: float, end_s: float, kind: str) -> None:
    """One more span at the end; one of the same kind grows."""
    if end_s <= start_s:
        return
    if spans and spans[-1].kind == kind:
        start_s = spans.pop().start_s
    spans.append(Span(start_s, end_s, kind))


def _paused(spans: list[Span], pauses: Iterable[_Pause], now: float) -> list[Span]:
    """The seconds from the first fault on as detection, then restart; a wait for nodes stays one."""
    pauses = list(pauses)
    if not pauses:
        return spans
    fault_s, opened_s = min(pause.fault_s for pause in pauses), min(pause.opened_s for pause in pauses)
    running = tuple(kind for kind in CLASSES if kind != "waiting_for_nodes")
    return relabelled(
        relabelled(spans, fault_s, opened_s, "detection", of=running), opened_s, now, "restart", of=running
    )


def _with_saving(spans: list[Span], start_s: float, end_s: float, saving_s: float) -> list[Span]:
    """The last `saving_s` seconds of training between two reports as saving: the journal has only their sum."""
    for span in reversed(spans):
        low, high = max(span.start_s, start_s), min(span.end_s, end_s)
        if saving_s <= 0 or high <= low:
            break
        if span.kind in TRAINING:
            taken = min(saving_s, high - low)
            spans = relabelled(spans, high - taken, high, "saving")
            saving_s -= taken
    return spans
