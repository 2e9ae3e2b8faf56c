"""What a new controller knows before it hears anybody: the run as the journal of those before it tells it."""

import time
from dataclasses import dataclass, field, replace

from goku_infra import environment
from goku_infra.control import policy
from goku_infra.control.run_state import RunState
from goku_infra.messages import last_sign
from goku_infra.record.journal import Event
from goku_infra.views import Finding

LATE_S = 60.0
"""An agent that comes so long after the end of its job was only slow to start, and is told of it."""


@dataclass
class Inheritance:
    """What an earlier controller has left running, perhaps."""

    nodes: tuple[str, ...] = ()
    """Of its last generation, in the order of ranks; empty: no ranks are left of it."""
    saved_s: float = 0.0
    """Seconds that saves of that generation had blocked when it last said so."""
    stop_after_save: bool = False
    """Its ranks were asked to save and leave."""
    signed_s: float = 0.0
    """Unix time at which that controller lived."""
    over: int | None = None
    """The exit code of a run that was over when this controller was raised, by an agent that came late."""
    job: tuple[str, int] = ("", 0)
    """The job that trained last, and how often it had been requeued then."""
    finding: Finding | None = None
    """Of the open incident."""
    undrained: dict[str, str] = field(default_factory=dict)
    """Excluded nodes, and why, for which SLURM may never have been asked."""
    decided: set[int] = field(default_factory=set)
    """Incidents that the policy has seen."""


def recall(state: RunState) -> Inheritance:
    """Bring a fresh `state` to where the journal ends."""
    left = Inheritance(signed_s=last_sign(state.folder) / 1e9)
    for event in state.journal.events:
        _follow(state, left, event)
    state.note_rows()
    end = state.journal.events[-1] if state.journal.events else None
    if (
        end is not None
        and (end.kind, left.job[0]) == ("finished", state.settings.job_id)
        and end.data["status"] != "requeued"
        and time.time() - end.time_s < LATE_S
    ):
        left.over, state.status, state.reason = end.data["exit_code"], "finished", end.data["reason"]
    ours = state.settings.job_id, environment.slurm_restart_count()
    if left.job not in (("", 0), ours):  # it has ended, perhaps without a word
        left.nodes, state.leaving = (), ""
        state.policy = replace(state.policy, without_progress=0, restarts=())
    for event in state.journal.events:
        if event.kind == "node_joined" and event.data["node"] in left.nodes:
            state.fleet.recall(event.data["node"], event.data)
    return left


def _follow(state: RunState, left: Inheritance, event: Event) -> None:
    data = event.data
    match event.kind:
        case "generation_started":
            left.nodes, left.saved_s = tuple(data["nodes"]), 0.0
            state.skip_steps = tuple(data["skip_steps"])
            state.policy = replace(state.policy, skip_steps=state.skip_steps)
            planned = left.finding is not None and left.finding.cause in (*policy.PLANNED, *policy.WAIT_AND_SEE)
            if data["incident"] is not None and not planned:
                state.policy = policy.restarted(state.policy, event.time_s)
        case "first_step" | "caught_up" | "progress":
            left.saved_s = data.get("saving_s", left.saved_s)
            if data["step"] > state.highest_step:
                state.policy = policy.progressed(state.policy)
            state.highest_step = max(state.highest_step, data["step"])
            state.committed_step = max(state.committed_step, data.get("committed_step", -1))
        case "incident_opened":
            state.incident = state.incidents = data["incident"]
            left.finding = Finding(
                cause=data["cause"], ranks=tuple(data["ranks"]), node=data["node"], data=data.get("data", {})
            )
        case "incident_blamed" if left.finding is not None:
            left.finding = replace(left.finding, cause=data["cause"], ranks=tuple(data["ranks"]), node=data["node"])
        case "action" if left.finding is not None and data["incident"] not in left.decided:
            left.decided.add(data["incident"])
            decided, _ = policy.decide(replace(state.policy, removable=1), left.finding, event.time_s)
            state.policy = replace(
                state.policy, strikes=decided.strikes, suspected_data_steps=decided.suspected_data_steps
            )
        case "incident_closed":
            state.incident = left.finding = None
        case "node_excluded":
            state.fleet.node(data["node"]).excluded = left.undrained[data["node"]] = data["reason"]
        case "node_drained":
            left.undrained.pop(data["node"], None)
        case "node_readmitted":
            state.fleet.node(data["node"]).excluded = ""
            left.undrained.pop(data["node"], None)
        case "request":
            state.requests[data["request"]] = data
            left.undrained.pop(data["node"], None)
        case "request_answered":
            state.requests.pop(data["request"], None)
        case "stop_requested":
            state.leaving, state.reason = "requeue" if data["requeue"] else "stop", data["reason"]
            left.stop_after_save = data["after_save"]
        case "finished" | "run_started":
            left.nodes, state.incident, state.leaving = (), None, ""
            if event.kind == "run_started":
                left.job = data["job_id"], data.get("requeues", 0)
