"""How a controller comes to its ranks: those of an earlier one go on and notice nothing, or there is a first start."""

import asyncio
import time

from goku_infra import environment
from goku_infra.control.connections import Connections
from goku_infra.control.node_watch import NodeWatch
from goku_infra.control.recall import Inheritance
from goku_infra.control.recovery import Recovery
from goku_infra.control.run_state import RunState
from goku_infra.views import Finding

ADOPT_S = 3.0
"""How long the agents of a generation that the journal tells of are waited for."""
START_WAIT_S = 60.0
"""How long the first start waits for all nodes before it takes fewer."""


class Takeover:
    """At work until the ranks of a generation are this controller's."""

    def __init__(
        self, state: RunState, connections: Connections, recovery: Recovery, nodes: NodeWatch, left: Inheritance
    ) -> None:
        self._state = state
        self._connections = connections
        self._recovery = recovery
        self._nodes = nodes
        self._left = left
        self._began = time.monotonic()
        self._expected = set(left.nodes)
        """Nodes whose agents may have ranks and have not come yet."""
        self._gone: set[str] = set()
        """Of those: nodes that do not answer at all."""

    async def seek_expected(self) -> None:
        """Find out which of the nodes do not answer: they are not waited for."""
        names = sorted(self._expected)
        lives = await asyncio.gather(*(self._connections.keeper_answers(name) for name in names))
        self._gone = {name for name, answered in zip(names, lives, strict=True) if not answered}

    def joined(self, name: str, generation: int) -> None:
        """An agent has come with the ranks of a generation (0: with none)."""
        state = self._state
        node = state.fleet.nodes[name]
        if self._expected:
            self._expected.discard(name)
            if not self._expected and self._somebody_trains():
                self._adopt()
        elif generation and not (node.training and generation == state.journal.generation and state.has_ranks):
            self._connections.send(name, {"kind": "stop"})  # ranks of a generation that is over

    def begin_when_nodes_suffice(self, now: float) -> None:
        """Called at every tick: the first start of a run, or of a job that goes on with it."""
        state, settings = self._state, self._state.settings
        if state.status != "waiting" or self._recovery.busy:
            return
        ready = len(state.fleet.ready())
        if self._expected:
            awaited = self._expected - self._gone and now - self._began < ADOPT_S
            if awaited and (self._somebody_trains() or ready < settings.nodes):
                return
            missing, self._expected = self._expected, set()
            if self._somebody_trains():
                self._adopt()
                for name in sorted(missing):
                    age = max(0.0, time.time() - self._left.signed_s)
                    self._nodes.lose(
                        state.fleet.node(name), "node_lost", "it was lost together with the controller", age
                    )
                return
        if state.leaving:  # asked of a controller that did not live to do it
            self._recovery.go_on_stopping(save=False)
            return
        enough = settings.nodes if now - self._began < START_WAIT_S else settings.min_nodes
        too_few_come = settings.in_slurm and now - self._began > 2 * START_WAIT_S
        if ready >= enough or too_few_come:
            state.journal.write(
                "run_started", command=list(settings.command), ranks_per_node=settings.ranks_per_node,
                nodes=settings.nodes, spares=max(0, ready - settings.nodes), min_nodes=settings.min_nodes,
                job_id=settings.job_id, requeues=environment.slurm_restart_count(),
            )  # fmt: skip
            self._recovery.begin("start")

    def _somebody_trains(self) -> bool:
        return any(node.brought for node in self._state.fleet.nodes.values())

    def _adopt(self) -> None:
        """Take over the ranks: they have not noticed."""
        state = self._state
        order = [state.fleet.node(name) for name in self._left.nodes]
        generation = state.journal.generation
        early_ends = state.fleet.early_ends
        state.fleet.begin(order, state.settings.ranks_per_node)
        for name, ended in early_ends:
            state.fleet.hear(name, ended, generation, time.monotonic())
        state.tail.restart(self._left.saved_s)
        strangers = [node.name for node in order if node.brought not in (None, generation)]
        noted = {event.kind for event in state.journal.events if event.generation == generation}
        state.caught_up = generation == 1 or "caught_up" in noted
        state.status = "running" if "first_step" in noted else "starting"
        state.resumed_from = state.highest_step if state.status == "running" else None
        if state.incident is not None or strangers:
            finding = Finding(
                cause="unknown",
                node=strangers[0] if strangers else "",
                detail="the controller was lost while it recovered the run",
            )
            self._recovery.go_on(finding)
        elif state.leaving:
            self._recovery.go_on_stopping(save=self._left.stop_after_save)
