"""What the controller knows of its run, in one place, and how a change of it is written down.

Nothing here acts: rooms above read it, decide, and note what has come of it. All of it can be read back from the
journal and from what agents say (`recall`).
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from goku_infra.control import policy
from goku_infra.control.fleet import Fleet
from goku_infra.control.metrics_tail import MetricsTail
from goku_infra.control.policy import PolicyState
from goku_infra.pages.alerts import Alerts
from goku_infra.record.journal import Journal
from goku_infra.settings import Settings
from goku_infra.views import Status

PROGRESS_S = 10.0


@dataclass
class RunState:
    """One run under one controller."""

    settings: Settings
    folder: Path
    """The supervisor's, shared by all nodes."""
    journal: Journal
    host: str
    """This node, as the other nodes reach it."""
    tail: MetricsTail
    alerts: Alerts
    fleet: Fleet = field(default_factory=Fleet)
    policy: PolicyState = field(default_factory=PolicyState)
    status: Status = "waiting"
    reason: str = ""
    leaving: Literal["", "stop", "requeue"] = ""
    """What happens once the ranks have left; empty: nothing was asked."""
    exit_code: int | None = None
    """Once the run is over for this controller."""
    highest_step: int = 0
    committed_step: int = -1
    resumed_from: int | None = None
    """Of the present generation: the step its ranks began at, once they have loaded."""
    caught_up: bool = True
    skip_steps: tuple[int, ...] = ()
    incident: int | None = None
    """The open one."""
    incidents: int = 0
    requests: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the operator is asked to approve, by number."""
    _progress_at: float = 0.0

    @property
    def has_ranks(self) -> bool:
        """Whether ranks run, or should, that nobody is just restarting."""
        return self.status in ("starting", "running", "stopping")

    def note_progress(self, now: float) -> bool:
        """First steps, and how far the run has come; whether the regular report of it was due."""
        loaded = [view for view in self.fleet.ranks.values() if view.phase not in ("start", "load")]
        if len(loaded) < len(self.fleet.ranks):
            return False
        step = self.fleet.step()
        self.committed_step = max(self.committed_step, self.fleet.committed_step())
        if self.resumed_from is None:
            self.resumed_from = step
        if self.status == "starting" and step > self.resumed_from:
            self.status = "running"
            self.journal.write("first_step", step=step, resumed_from=self.resumed_from)
            if self.incident is not None:
                self.close_incident(step, max(0, self.highest_step - self.resumed_from))
        if step > self.highest_step:
            if not self.caught_up:
                self.caught_up = True
                self.journal.write("caught_up", step=step)
            self.highest_step = step
            self.policy = policy.progressed(self.policy)
        if self.status != "running" or now - self._progress_at < PROGRESS_S:
            return False
        self._progress_at = now
        self.write_progress()
        return True

    def note_rows(self) -> None:
        """Steps that rank 0 has written down and nobody has told us of: taken while no controller lived, or just before
        the ranks left.
        """
        taken = self.tail.last.get("step", -1) + 1
        if taken > self.highest_step:
            self.highest_step, self.policy = taken, policy.progressed(self.policy)

    def write_progress(self) -> None:
        rank0 = self.fleet.ranks.get(0)
        self.journal.write(
            "progress", step=self.fleet.step(), committed_step=self.committed_step,
            loss=rank0.loss if rank0 else None, saving_s=round(self.tail.saving_s, 3),
        )  # fmt: skip

    def close_incident(self, step: int, lost_steps: int) -> None:
        self.journal.write("incident_closed", incident=self.incident, step=step, lost_steps=lost_steps)
        self.incident = None

    def alert(self, level: str, text: str) -> None:
        self.journal.write("alert", level=level, text=text)
        fields = {"run_dir": self.settings.run_dir, "incident": self.incident, "step": self.highest_step}
        self.alerts.send(level, text, fields)

    def finish(self, status: str, reason: str, exit_code: int) -> None:
        """The run is over; what is said first counts."""
        if self.exit_code is not None:
            return
        self.note_progress(time.monotonic())
        self.status, self.reason, self.exit_code = "finished", reason, exit_code
        self.alert("critical" if exit_code else "info", f"{status}: {reason}")
        self.write_finished(status, reason, exit_code)

    def write_finished(self, status: str, reason: str, exit_code: int) -> None:
        """The last word on the run, or on this start of its job."""
        self.tail.read()
        self.note_rows()
        self.journal.write("finished", status=status, step=self.highest_step, reason=reason, exit_code=exit_code)
