"""What ranks show: one that ends, hangs, is slower than the rest, or whose loss jumps; and nodes that should not train,
or could and do not.
"""

import json
import time
from contextlib import suppress
from dataclasses import replace

from goku_infra.control.node_watch import NodeWatch
from goku_infra.control.recovery import SAVE_LIMIT_S, Recovery
from goku_infra.control.run_state import RunState
from goku_infra.diagnosis import culprit
from goku_infra.diagnosis.detectors import PhaseLimits, Spikes, Stragglers, find_hang
from goku_infra.messages import replace_file
from goku_infra.views import Finding

LEARNED_FILE = "learned_limits.json"
SHARE = 0.05
"""Of a core, for looks at all ranks: in a large run they come less often. What ends is seen at every tick all the same.
"""
LOOK_LIMIT_S = 1.0
"""However large the run, they come at least so often."""
SYMPTOMS_S = 0.15
"""After the first rank has ended: what else ends may be the cause of it."""
ENDED_AT_ONCE = 256
"""Of ranks that end together, whose last words are read: the cause is among the first."""
GROW_AFTER_S = 10.0
"""A node that has come back must have been there for so long before a run that shrank grows again."""


class RankWatch:
    """Asks the detectors about the present generation and opens incidents for what they find."""

    def __init__(self, state: RunState, nodes: NodeWatch, recovery: Recovery) -> None:
        self._state = state
        self._nodes = nodes
        self._recovery = recovery
        self._limits = PhaseLimits(floor_s=state.settings.hang_limit_s or None)
        self._stragglers = Stragglers()
        self._spikes = Spikes()
        self._generation = state.journal.generation
        self._look_at = 0.0
        """When the next look at all ranks is due."""
        self._known_slow: set[str] = set()
        self._known_sick: set[str] = set()
        """Nodes whose state has been reported in this generation."""
        self._more_since = 0.0
        """Since when there have been more nodes than train."""
        self._failed_saves = 0
        """In a row, up to now."""
        for row in state.tail.past:
            if row["loss"] is not None and row["gradient_norm"] is not None:
                self._spikes.observe(row["step"], row["loss"], row["gradient_norm"])
        with suppress(OSError, ValueError):
            self._limits.restore(json.loads((state.folder / LEARNED_FILE).read_text()))

    def look(self, now: float) -> None:
        """Called at every tick."""
        if self._generation != self._state.journal.generation:
            self._begin_generation()
        if self._state.has_ranks and (self._state.fleet.exited or now >= self._look_at):
            began_cpu_s = time.thread_time()
            self._look_at_all(now)
            self._look_at = now + min(LOOK_LIMIT_S, (time.thread_time() - began_cpu_s) / SHARE)

    def _begin_generation(self) -> None:
        self._generation = self._state.journal.generation
        self._stragglers = Stragglers()
        self._known_slow, self._known_sick = set(), set()
        self._limits.begin_generation()

    def _look_at_all(self, now: float) -> None:
        state = self._state
        if state.note_progress(now):
            with suppress(OSError):  # a disk that is full costs the memory of a limit, not the controller
                replace_file(state.folder / LEARNED_FILE, json.dumps(self._limits.to_json()))
        if state.fleet.exited:
            self._look_at_ended(now)
        elif (hang := find_hang(views := state.fleet.rank_views(now), self._limits)) is not None:
            self._recovery.open(hang)
        elif state.status in ("starting", "running"):
            self._limits.observe(views)
            self._stragglers.observe(views)
            slow = self._stragglers.finding()
            if slow is not None and slow.node not in self._known_slow:
                self._known_slow.add(slow.node)
                self._recovery.open(slow)
            if state.status == "running":  # and not about to close the incident that the start is because of
                self._look_at_nodes(now)
        self._look_at_metrics()

    def _look_at_ended(self, now: float) -> None:
        """Some ranks have ended: well, as asked, or by a fault of which one of them is the first."""
        fleet = self._state.fleet
        ended = list(fleet.exited.values())
        if self._nodes.in_doubt():
            return  # the others' ranks end because of the node that falls silent just now
        failed = [view for view in ended if view.failed]
        if not failed and len(ended) == len(fleet.ranks):
            self._recovery.all_left()
            return
        since = now - fleet.first_end_at
        if failed and (since >= SYMPTOMS_S or any((view.exit_code or 0) < 0 for view in failed)):
            left = [view for view in ended if not view.failed]
            # Those that left too early, if the others fail because of it, are looked at, too.
            self._recovery.open(culprit.first_cause([*failed, *left][:ENDED_AT_ONCE]))
        elif not failed and since >= SAVE_LIMIT_S:
            self._recovery.open(Finding(cause="early_exit", ranks=tuple(sorted(fleet.exited)), node=ended[0].node))

    def _look_at_nodes(self, now: float) -> None:
        """Nodes that train though they are unhealthy, and nodes that could train but do not."""
        fleet = self._state.fleet
        for node in fleet.nodes.values():
            if node.training and node.critical and node.name not in self._known_sick:
                self._known_sick.add(node.name)
                self._recovery.open(Finding(cause="unhealthy_node", node=node.name, detail=node.critical[0]))
                return
        ready = fleet.ready()
        training = sum(node.training for node in ready)
        if training == min(len(ready), self._state.settings.nodes) or not self._state.caught_up:
            self._more_since = now
        elif now - self._more_since > GROW_AFTER_S:
            self._recovery.open(Finding(cause="nodes_back", detail=f"{len(ready)} nodes are ready, {training} train"))

    def _look_at_metrics(self) -> None:
        for row in self._state.tail.read():
            self._look_at_saves(row.get("checkpoint_failures") or 0)
            if row["loss"] is None or row["gradient_norm"] is None:
                continue  # not finite: the ranks themselves have refused that step
            spike = self._spikes.observe(row["step"], row["loss"], row["gradient_norm"])
            if spike is not None and self._state.status == "running":
                self._recovery.open(replace(spike, data={"data_step": row.get("data_step", row["step"])}))
                break

    def _look_at_saves(self, failures: int) -> None:
        """A save that fails costs no step, but from then on a fault costs more."""
        if failures > self._failed_saves:
            self._state.alert("warning", f"a save failed, {failures} in a row; rank 0's log says why")
        self._failed_saves = failures
