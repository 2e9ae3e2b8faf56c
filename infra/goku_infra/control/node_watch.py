"""Nodes that fall silent: is the node gone, its link, ours, or only its agent?"""

import asyncio
import time
from dataclasses import replace

from goku_infra import slurm
from goku_infra.control.connections import Connections, until
from goku_infra.control.fleet import Node
from goku_infra.control.recovery import Recovery
from goku_infra.control.run_state import RunState
from goku_infra.views import Finding

RECONNECT_S = 0.4
HELD_UP_S = 4.0
"""An agent that is silent for so long is lost, though its node lives."""


class NodeWatch:
    """Finds nodes that are lost and opens their incidents."""

    def __init__(self, state: RunState, connections: Connections, recovery: Recovery) -> None:
        self.cut_off = False
        """Nobody hears us any more: another controller must do it."""
        self._state = state
        self._connections = connections
        self._recovery = recovery
        self._silent: set[str] = set()
        """Nodes that were silent for too long at the last tick."""
        self._doubts: dict[str, asyncio.Task[None]] = {}
        """Silent nodes that are being asked."""
        self._lost: dict[str, tuple[float, Finding]] = {}
        """Nodes of the generation whose incident is still to be opened, and when they were found."""

    def look(self, now: float) -> None:
        """Called at every tick."""
        silent_before, self._silent = self._silent, set()
        for node in list(self._state.fleet.nodes.values()):
            if not node.connected or now - node.heard_at <= self._state.settings.node_silence_s:
                continue
            self._silent.add(node.name)
            # Silent at the tick before, too: what came while we ourselves stood still has been read since then.
            if node.name in silent_before and node.name not in self._doubts:
                self._doubts[node.name] = asyncio.get_running_loop().create_task(self._doubt(node))
        self._open_incidents()

    def alone(self, now: float) -> bool:
        """Whether nothing is heard of any other node, which may be this one's own fault."""
        state = self._state
        return state.fleet.all_silent(except_at=state.host, now=now, limit_s=state.settings.node_silence_s)

    def in_doubt(self) -> bool:
        """Whether it is being found out if a node of the generation is lost."""
        return any(
            node.training and not node.lost and (not node.connected or node.name in self._doubts)
            for node in self._state.fleet.nodes.values()
        )

    def joins(self, name: str, generation: int) -> None:
        """An agent comes with the ranks of a generation (0: none): is it another than the one that had ours?"""
        node = self._state.fleet.nodes.get(name)
        if (
            node is not None
            and node.training
            and not node.lost
            and self._state.has_ranks
            and generation != self._state.journal.generation
        ):
            self.lose(node, "agent_lost", "its agent was killed; the node lives")

    async def gone(self, name: str) -> None:
        """An agent's connection has closed: has it died alone, or its node with it?"""
        node = self._state.fleet.nodes[name]
        node.connected = False
        lives = await self._connections.keeper_answers(name)
        if lives:  # the agent may only have closed a connection on which it heard nothing
            await until(lambda: node.connected, RECONNECT_S)
            # A keeper that is killed takes its agent with it, and its port may outlive both by a moment.
            lives = node.connected or await self._connections.keeper_answers(name)
        if node.connected or self._state.exit_code is not None:
            return
        if lives:
            node.back_since = time.monotonic()
            self.lose(node, "agent_lost", "its agent was killed; the node lives")
        else:
            self.lose(node, "node_lost", "its connection closed and it does not answer")

    def lose(self, node: Node, cause: str, why: str, fault_age_s: float = 0.0) -> None:
        """The node is not here any more; with ranks on it, that is an incident."""
        state = self._state
        node.lost = why
        state.journal.write("node_left", node=node.name, reason=why)
        if node.training:
            ranks = tuple(view.rank for view in state.fleet.ranks.values() if view.node == node.name)
            finding = Finding(cause=cause, ranks=ranks, node=node.name, detail=why, fault_age_s=fault_age_s)
            self._lost[node.name] = time.monotonic(), finding
            self._open_incidents()

    def _open_incidents(self) -> None:
        """Now, or when a recovery that leaves the ranks alone is over; a start without the node settles it, too."""
        for name, (found_at, finding) in list(self._lost.items()):
            node = self._state.fleet.nodes[name]
            if not node.training or not node.lost:
                del self._lost[name]
            elif self._state.has_ranks and not self._recovery.busy:
                del self._lost[name]
                self._recovery.open(replace(finding, fault_age_s=finding.fault_age_s + time.monotonic() - found_at))

    async def _doubt(self, node: Node) -> None:
        """A node has fallen silent: it is gone, or its link is, or ours, or only its agent is held up."""
        state = self._state
        lives = await self._connections.keeper_answers(node.name)
        cut_off = False
        if not lives and state.settings.in_slurm and self.alone(time.monotonic()):
            cut_off = not await asyncio.to_thread(slurm.answers)
        del self._doubts[node.name]
        silence = time.monotonic() - node.heard_at
        if not node.connected or silence < (HELD_UP_S if lives else state.settings.node_silence_s):
            return
        if cut_off:
            self.cut_off = True
            return
        node.connected = False
        self._connections.abort(node.name)
        if lives:
            node.back_since = time.monotonic()
        cause = "agent_lost" if lives else "link_lost"
        self.lose(node, cause, f"nothing has been heard of it for {silence:.1f} s", silence)
