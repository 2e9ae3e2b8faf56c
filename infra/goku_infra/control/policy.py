"""What to do about a finding: the ladder of recovery as a pure function.

Cheapest first: restart the ranks in place -> without the bad node, on a hot spare -> on the nodes that are left ->
back into the queue. Every rung has a budget, and a run that gets nowhere is stopped with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from goku_infra.causes import CAUSES
from goku_infra.record.journal import Event
from goku_infra.settings import RESTART_LIMIT
from goku_infra.views import Finding

NO_PROGRESS_LIMIT = 3
"""Restarts in a row without a step that the run had not seen before; then it is a crash loop."""
WINDOW_S = 1800.0
STRIKES = 2
"""Faults that suspect one node's hardware, within `STRIKE_WINDOW_S`, until it must go; with a spare one is enough."""
STRIKE_WINDOW_S = 24 * 3600.0
SKIP_LIMIT = 100
"""Data steps that loss rules may leave out of a run; past that something else is wrong."""
BACKOFF_S = (0.0, 0.5, 2.0)
"""Wait before a restart, by the restarts without progress before it."""
EXIT_BAD_INPUT = 2
EXIT_CRASH_LOOP = 93
EXIT_FAILED = 1

UNUSABLE = frozenset({"unkillable"})
"""The node cannot be used, whatever else there is."""
NODE_GONE = frozenset({"node_lost", "link_lost"})
"""The node is not here. If it comes back it may train again, but not for a second time."""
WAIT_AND_SEE = frozenset({"straggler", "unhealthy_node"})
"""No rank has failed: worth a restart only where a spare makes it better."""
PLANNED = frozenset({"operator", "nodes_back"})
"""No fault at all: the ranks save first, and no budget is spent."""
LOSS_RULES = frozenset({"nan_loss", "loss_spike", "gradient_spike"})

Kind = Literal["restart", "save_and_restart", "exclude", "stop", "alert"]


class Action(NamedTuple):
    """One thing to do."""

    kind: Kind
    reason: str
    node: str = ""
    delay_s: float = 0.0
    skip_steps: tuple[int, ...] = ()
    """Data steps that the run leaves out from now on, all of them."""
    exit_code: int = 0


class Strike(NamedTuple):
    """A fault that counts against a node."""

    node: str
    time_s: float


@dataclass(frozen=True)
class PolicyState:
    """What the ladder remembers; everything in it can be read back from the journal."""

    restarts: tuple[float, ...] = ()
    """Times of the restarts within the window."""
    has_trained: bool = False
    """Whether the run has ever taken a step: data that cannot be read before that is not there at all."""
    without_progress: int = 0
    """Restarts in a row that have not reached a new step."""
    strikes: tuple[Strike, ...] = ()
    skip_steps: tuple[int, ...] = ()
    suspected_data_steps: tuple[int, ...] = ()
    """Data steps at which a loss was not finite once: a second time they are skipped."""
    spares: int = 0
    """Healthy nodes that wait."""
    restart_limit: int = RESTART_LIMIT
    """Of this run."""
    removable: int = 0
    """Nodes that the run can do without and still has as many as it needs."""


def decide(state: PolicyState, finding: Finding, now: float) -> tuple[PolicyState, list[Action]]:
    """What to do about `finding`, and what to remember of it. `now`: seconds of any one clock."""
    state = replace(state, restarts=tuple(t for t in state.restarts if now - t < WINDOW_S))
    if finding.cause == "bad_input" or (finding.cause == "data_error" and not state.has_trained):
        return state, [Action("stop", finding.detail or "the settings were refused", exit_code=EXIT_BAD_INPUT)]
    if finding.cause in WAIT_AND_SEE:
        return _slow_node(state, finding)
    if finding.cause in PLANNED:
        return state, [Action("save_and_restart", describe(finding), skip_steps=state.skip_steps)]
    state, exclusions = _exclusions(state, finding, now)
    state, skip_reason = _skips(state, finding)
    if state.without_progress >= NO_PROGRESS_LIMIT:
        why = f"{state.without_progress} restarts in a row reached no new step; the last: {describe(finding)}"
        return state, [*exclusions, Action("stop", f"crash loop: {why}", exit_code=EXIT_CRASH_LOOP)]
    if len(state.restarts) >= state.restart_limit:
        why = f"{len(state.restarts)} restarts within {WINDOW_S / 60:.0f} minutes; the last: {describe(finding)}"
        return state, [*exclusions, Action("stop", f"restart storm: {why}", exit_code=EXIT_CRASH_LOOP)]
    if len(state.skip_steps) > SKIP_LIMIT:
        why = f"the loss rules have left out {len(state.skip_steps)} steps of data"
        return state, [
            *exclusions,
            Action("stop", f"{why}; look at the learning rate and the data", exit_code=EXIT_FAILED),
        ]
    delay = BACKOFF_S[min(state.without_progress, len(BACKOFF_S) - 1)]
    restart = Action("restart", skip_reason or describe(finding), delay_s=delay, skip_steps=state.skip_steps)
    return restarted(state, now), [*exclusions, restart]


def restarted(state: PolicyState, now: float) -> PolicyState:
    """The ranks have been started again because of a fault."""
    return replace(state, restarts=(*state.restarts, now), without_progress=state.without_progress + 1)


def progressed(state: PolicyState) -> PolicyState:
    """The run has taken a step that it had never taken: what went before was no loop."""
    if state.has_trained and not state.without_progress:
        return state
    return replace(state, without_progress=0, has_trained=True)


def requeues_in_vain(events: Sequence[Event]) -> int:
    """How often in a row the job went back into the queue without a step that the run had never taken."""
    count = 0
    for event in reversed(events):
        if event.kind == "caught_up" or (event.kind == "first_step" and event.generation == 1):
            break
        count += event.kind == "finished" and event.data["status"] == "requeued"
    return count


def describe(finding: Finding) -> str:
    """The finding as one line: `rank 3 on n2 was killed by a signal: SIGKILL`."""
    if finding.ranks and not CAUSES[finding.cause].of_node:
        names = ", ".join(map(str, finding.ranks[:8])) + (", ..." if len(finding.ranks) > 8 else "")
        who = f"rank {names}" if len(finding.ranks) == 1 else f"ranks {names}"
        who += f" on {finding.node}" if finding.node else ""
    else:
        who = f"node {finding.node}" if finding.node else "the run"
    return f"{who} {CAUSES[finding.cause].text}" + (f": {finding.detail}" if finding.detail else "")


def _slow_node(state: PolicyState, finding: Finding) -> tuple[PolicyState, list[Action]]:
    alert = Action("alert", describe(finding))
    if not state.spares or not finding.node:
        return state, [alert]
    exclude = Action("exclude", describe(finding), node=finding.node)
    restart = Action("save_and_restart", f"{describe(finding)}; a spare takes over", skip_steps=state.skip_steps)
    return replace(state, spares=state.spares - 1), [alert, exclude, restart]


def _exclusions(state: PolicyState, finding: Finding, now: float) -> tuple[PolicyState, list[Action]]:
    """Whether the finding's node must go: at once if it is gone, on suspicion if a spare is at hand or it is not the
    first time."""
    if not finding.node:
        return state, []
    if finding.cause in UNUSABLE:
        return state, [Action("exclude", describe(finding), node=finding.node)]
    gone = finding.cause in NODE_GONE
    if not CAUSES[finding.cause].blames_node or (state.removable <= 0 and not gone):
        return state, []
    recent = tuple(strike for strike in state.strikes if now - strike.time_s < STRIKE_WINDOW_S)
    strikes = (*recent, Strike(finding.node, now))
    state = replace(state, strikes=strikes)
    count = sum(strike.node == finding.node for strike in strikes)
    if count < STRIKES and (gone or state.spares == 0):
        return state, []
    return state, [Action("exclude", describe(finding), node=finding.node)]


def _skips(state: PolicyState, finding: Finding) -> tuple[PolicyState, str]:
    """Leave out data that the loss cannot bear.

    A loss that is not finite is first tried again, since a passing fault of the hardware would do the same; the second
    time at the same data the data is at fault. A jump is met after the step that caused it, so that step goes, too; one
    of the gradient norm is told at its second step.
    """
    data_step = finding.data.get("data_step")
    if finding.cause not in LOSS_RULES or data_step is None:
        return state, ""
    if finding.cause == "nan_loss":
        if data_step not in state.suspected_data_steps:
            return replace(state, suspected_data_steps=(*state.suspected_data_steps, data_step)), ""
        skip = {data_step}
    else:
        before = 2 if finding.cause == "gradient_spike" else 1
        skip = set(range(max(0, data_step - before), data_step + 1))
    state = replace(state, skip_steps=tuple(sorted({*state.skip_steps, *skip})))
    return state, f"{describe(finding)}; goes on from before it, without data step {', '.join(map(str, sorted(skip)))}"
