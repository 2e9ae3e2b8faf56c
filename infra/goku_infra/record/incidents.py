"""The journal's events gathered into incidents: what befell the run, who was at fault, what was done, what it cost.

Pure: events in, values out. The clock of every time is the controller's, in unix seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from goku_infra.causes import CAUSES
from goku_infra.record.journal import Event

NODE_TEXTS = {
    "node_lost": "is gone",
    "link_lost": "cannot be reached",
    "agent_lost": "lost its agent",
    "unhealthy_node": "failed its health check",
}
"""What an incident says of a node when no rank is named."""
FOUND_WHILE_RUNNING = ("straggler", "unhealthy_node")
"""Causes that do not stop the ranks: they go on until something is done about it."""

LOSS_RULES = ("nan_loss", "loss_spike", "gradient_spike")
"""Causes that may end with data left out."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One thing that went wrong, from its fault to the first new step."""

    number: int
    cause: str
    """A key of `causes.CAUSES`."""
    text: str
    """Who and what, for people: "rank 5 on n2 was killed by a signal"."""
    ranks: tuple[int, ...] = ()
    """The ranks at fault."""
    node: str = ""
    step: int | None = None
    """Steps done when it was found."""
    fault_s: float
    """The last sign of health."""
    detected_s: float
    blamed_s: float | None = None
    restarted_s: float | None = None
    """The newest start of the ranks because of it."""
    recovered_s: float | None = None
    """The first step after that start."""
    resumed_step: int | None = None
    """The step that the ranks resumed from."""
    lost_steps: int | None = None
    actions: tuple[tuple[float, str, str], ...] = ()
    """(time_s, action, reason), in order."""
    excluded_node: str = ""
    """The node that may not train any more because of it."""
    skip_steps: tuple[int, ...] = ()
    """Positions of the data that the run leaves out because of it."""
    detail: str = ""
    evidence: int = 0
    """Number of files in its folder, `supervisor/incidents/NNNN`."""
    status: Literal["open", "recovered", "ended"] = "open"
    """`ended`: the run finished before it was repaired."""


def incidents(events: Iterable[Event]) -> list[Incident]:
    """Every incident of a journal, by number."""
    book = IncidentBook()
    for event in events:
        book.add(event)
    return book.all()


class IncidentBook:
    """The incidents of a journal that grows: add the events as they are written, ask at any time."""

    def __init__(self) -> None:
        self._found: dict[int, Incident] = {}
        self._open: set[int] = set()

    def add(self, event: Event) -> None:
        """Go on with the journal's next event."""
        if event.kind == "incident_opened":
            self._found[event.data["incident"]] = _opened(event)
            self._open.add(event.data["incident"])
        for number in _concerned(event, self._found, self._open):
            self._found[number] = followed = _followed(self._found[number], event)
            if followed.status != "open":
                self._open.discard(number)

    def all(self) -> list[Incident]:
        """Every incident, by number."""
        return [self._found[number] for number in sorted(self._found)]

    def newest(self, count: int) -> list[Incident]:
        """The last ones, by number."""
        return [self._found[number] for number in sorted(self._found)[-count:]]


def from_json(fields: dict[str, Any]) -> Incident:
    """An incident of a snapshot."""
    return Incident(**fields)


def subject(cause: str, ranks: Sequence[int], node: str) -> str:
    """Who is at fault and what is the matter, as one clause."""
    text = CAUSES[cause].text if cause in CAUSES else CAUSES["unknown"].text
    where = f" on {node}" if node else ""
    if len(ranks) == 1:
        return f"rank {ranks[0]}{where} {text}"
    if ranks:
        return f"{len(ranks)} ranks{where} ({number_ranges(ranks)}): each {text}"
    if node:
        return f"node {node} {NODE_TEXTS[cause]}" if cause in NODE_TEXTS else f"a rank{where} {text}"
    return f"the run {text}"


def sentence(incident: Incident) -> str:
    """What happened, what was done and what it cost, in one line."""
    parts = [f"found {seconds(incident.detected_s - incident.fault_s)} after the last sign of health"]
    if incident.detail:
        parts.insert(0, incident.detail)
    if incident.restarted_s is not None:
        without = f" without {incident.excluded_node}" if incident.excluded_node else ""
        skipping = f", leaving out data step {number_ranges(incident.skip_steps)}" if incident.skip_steps else ""
        parts.append(f"restarted{without}{skipping}")
    if incident.recovered_s is not None and incident.restarted_s is not None:
        since = f" since step {incident.resumed_step:,}" if incident.resumed_step is not None else ""
        parts.append(f"training again{since}, {seconds(incident.recovered_s - incident.fault_s)} after the fault")
    elif incident.status == "open":
        parts.append("not training again yet" if incident.cause not in FOUND_WHILE_RUNNING else "still open")
    elif incident.status == "ended":
        parts.append("the run ended before it was repaired")
    if incident.lost_steps is not None:
        parts.append(f"{incident.lost_steps:,} step{'s' * (incident.lost_steps != 1)} lost")
    return f"incident {incident.number}: {incident.text}: {'; '.join(parts)}"


def number_ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def seconds(value: float) -> str:
    """A duration as people say it: 0.21 s, 3.2 s, 4 min 10 s, 2 h 05 min."""
    if value < 10:
        return f"{value:.1f} s" if value >= 1 else f"{max(value, 0):.2f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _opened(event: Event) -> Incident:
    data = event.data
    ranks, node = tuple(data.get("ranks") or ()), data.get("node") or ""
    return Incident(
        number=data["incident"],
        cause=data["cause"],
        text=subject(data["cause"], ranks, node),
        ranks=ranks,
        node=node,
        step=data.get("step"),
        fault_s=min(data.get("fault_s") or event.time_s, event.time_s),
        detected_s=event.time_s,
        detail=data.get("detail") or "",
    )


def _concerned(event: Event, found: dict[int, Incident], unsettled: set[int]) -> list[int]:
    """The incidents that an event belongs to; a start of the ranks ends every wait for one."""
    if event.kind == "generation_started":
        named = event.data.get("incident")
        return [
            number
            for number in sorted(unsettled)
            if number == named
            or (named is not None and found[number].cause not in FOUND_WHILE_RUNNING)
            or any(action == "requeue" for _, action, _ in found[number].actions)
        ]
    if event.kind in ("first_step", "finished"):
        return sorted(unsettled)
    number = event.data.get("incident")
    return [number] if number in found else []


def _followed(incident: Incident, event: Event) -> Incident:
    data = event.data
    match event.kind:
        case "incident_blamed":
            cause = data.get("cause") or incident.cause
            ranks = tuple(data.get("ranks") or incident.ranks)
            node = data.get("node") or incident.node
            return replace(
                incident, cause=cause, ranks=ranks, node=node, text=subject(cause, ranks, node),
                detail=data.get("detail") or incident.detail, evidence=data.get("evidence", 0),
                blamed_s=event.time_s,
            )  # fmt: skip
        case "action":
            taken = (event.time_s, str(data.get("action", "")), str(data.get("reason") or ""))
            excluded = data.get("node") if data.get("action") == "exclude" else None
            return replace(
                incident,
                actions=(*incident.actions, taken),
                excluded_node=excluded or incident.excluded_node,
                skip_steps=tuple(data.get("skip_steps") or ()) if incident.cause in LOSS_RULES else (),
            )
        case "generation_started":
            return replace(incident, restarted_s=event.time_s)
        case "first_step" if incident.restarted_s is not None:
            return _recovered(incident, event.time_s, data)
        case "incident_closed":
            closed = replace(incident, status="recovered", recovered_s=incident.recovered_s or event.time_s)
            lost = data.get("lost_steps")
            return closed if lost is None else replace(closed, lost_steps=lost)
        case "finished" if data.get("status") != "requeued":
            return replace(incident, status="ended")
        case "finished":
            requeue = (event.time_s, "requeue", str(data.get("reason") or ""))
            return replace(incident, actions=(*incident.actions, requeue))
    return incident


def _recovered(incident: Incident, time_s: float, data: dict[str, Any]) -> Incident:
    resumed = data.get("resumed_from")
    lost = max(0, incident.step - resumed) if incident.step is not None and resumed is not None else None
    return replace(incident, status="recovered", recovered_s=time_s, resumed_step=resumed, lost_steps=lost)
