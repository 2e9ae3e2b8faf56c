"""From a finding to the next first step: look into it, let the policy decide, end the ranks, start them again.

One thing at a time: what is found while a recovery is under way is part of what is being recovered from.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from goku_infra.control import policy
from goku_infra.control.allocation import Allocation
from goku_infra.control.connections import Connections, until
from goku_infra.control.fleet import Node
from goku_infra.control.policy import EXIT_CRASH_LOOP, EXIT_FAILED, Action
from goku_infra.control.run_state import RunState
from goku_infra.diagnosis import culprit
from goku_infra.views import Finding

logger = logging.getLogger(__name__)

STACKS_LIMIT_S = 5.0
STACKS_OF_STOPPED_S = 1.0
"""Where the culprit is known already, stacks are for the record."""
STOPPED_LIMIT_S = 5.0
SAVE_LIMIT_S = 120.0
"""Longest that ranks asked to save and leave may take."""
RETURN_S = 30.0
"""How long an agent that was killed is waited for before the run goes on without its node."""
WAIT_LIMIT_S = 3600.0
"""Longest wait for nodes outside of SLURM."""
NATIVE_LIMIT_S = 3.0
"""For native stacks, which take a second of CPU each."""
NATIVE_OF = frozenset({"hang", "locked", "other_collective"})
"""Causes for which it matters where in native code those at fault are."""
NATIVE_RANKS = 8
"""Of those at fault, so many at most."""
LOOKED_INTO = frozenset({"hang", "stopped_process", "locked", "other_collective", "unkillable", "straggler"})
"""Causes that stacks tell more of."""


class Recovery:
    """Starts and ends the ranks, and nobody else does."""

    def __init__(self, state: RunState, connections: Connections, allocation: Allocation) -> None:
        self._state = state
        self._connections = connections
        self._allocation = allocation
        self.failure: OSError | None = None
        """What this controller cannot do; another one, on another node perhaps, can."""
        self._acting: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return self._acting is not None and not self._acting.done()

    # -- what sets it going ---------------------------------------------------------------------------------------

    def begin(self, reason: str) -> None:
        """The first start of the ranks, by this job."""
        self._act(self._start_generation(reason))

    def open(self, finding: Finding) -> None:
        """A fault has been found: write it down and see to it."""
        if self.busy:
            return
        state = self._state
        if state.status == "running":
            state.write_progress()
        state.incidents += 1
        state.incident = state.incidents
        views = [state.fleet.ranks[rank] for rank in finding.ranks if rank in state.fleet.ranks]
        if views and not finding.node:  # the ranks' own word names ranks only
            finding = replace(finding, node=views[0].node)
        state.journal.write(
            "incident_opened", incident=state.incident, cause=finding.cause, ranks=list(finding.ranks),
            node=finding.node, step=state.fleet.step(), fault_s=time.time() - finding.fault_age_s,
            detail=finding.detail, data=finding.data,
        )  # fmt: skip
        logger.warning("incident %d: %s", state.incident, policy.describe(finding))
        for view in views:
            if view.last_lines:
                with suppress(OSError):  # the disk may be what has failed
                    (self._evidence() / f"log_rank_{view.rank:05d}.txt").write_text("\n".join(view.last_lines) + "\n")
        self.go_on(finding)

    def go_on(self, finding: Finding) -> None:
        """See to the open incident, whoever has opened it."""
        self._state.status = "recovering"
        self._act(self._recover(finding))

    def stop(self, *, save: bool, requeue: bool, reason: str) -> str:
        """End the run, or only this start of its job, when the ranks have saved or at once; in words."""
        state = self._state
        state.journal.write("stop_requested", reason=reason, after_save=save, requeue=requeue)
        state.leaving, state.reason = "requeue" if requeue else "stop", reason
        return self.go_on_stopping(save=save)

    def go_on_stopping(self, *, save: bool) -> str:
        """Do what was asked by `stop`, also of a controller before this one."""
        if save and self._state.status in ("running", "stopping"):  # a second word must not end ranks that save
            self._state.status = "stopping"
            self._connections.send_all({"kind": "ask_ranks", "stop": "save"})
            return "the ranks save and leave"
        if not self.busy:  # else it is done when the ranks have ended for what is going on
            self._state.status = "recovering"
            self._act(self._end_and_leave())
        return "the ranks are ended"

    def all_left(self) -> None:
        """Every rank has ended well."""
        if self._state.leaving:
            self._state.status = "recovering"
            self._act(self._leave())
        else:
            self._state.finish("done", "the command has ended well on all ranks", 0)

    # -- what it does ---------------------------------------------------------------------------------------------

    def _act(self, work: Coroutine[Any, Any, None]) -> None:
        self._acting = asyncio.create_task(work)
        self._acting.add_done_callback(self._acted)

    def _acted(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("the recovery has failed", exc_info=error)
        if isinstance(error, OSError):
            self.failure = error
        elif error is not None:
            self._state.finish("failed", f"the supervisor itself failed: {error}", EXIT_FAILED)

    async def _recover(self, finding: Finding) -> None:
        state = self._state
        if finding.cause in LOOKED_INTO:
            finding = await self._look_into(finding)
        state.policy = replace(
            state.policy,
            spares=sum(node.role == "spare" and not node.critical for node in state.fleet.nodes.values()),
            removable=len(state.fleet.ready()) - state.settings.min_nodes,
        )
        state.policy, actions = policy.decide(state.policy, finding, time.time())
        for action in actions:
            self._note_action(action)
        state.alert("warning", policy.describe(finding))
        for action in actions:
            if action.kind == "exclude":
                self._allocation.exclude(state.fleet.nodes[action.node], action.reason)
        last = actions[-1]
        if last.kind == "alert":
            state.status = "running"
            state.close_incident(state.fleet.step(), 0)
            if state.leaving:  # asked for meanwhile
                self.go_on_stopping(save=True)
            return
        if last.kind == "save_and_restart":
            await self._save_and_leave()
        await self._end_ranks()
        if state.leaving:
            await self._leave()
            return
        if last.kind == "stop":
            state.finish("failed", last.reason, last.exit_code)
            return
        state.skip_steps = last.skip_steps
        await asyncio.sleep(last.delay_s)
        await self._start_generation(last.reason)

    def _note_action(self, action: Action) -> None:
        fields = {name: value for name, value in action._asdict().items() if value and name not in ("kind", "reason")}
        self._state.journal.write(
            "action", incident=self._state.incident, action=action.kind, reason=action.reason, **fields
        )

    def _evidence(self) -> Path:
        """The folder of what is known of the open incident."""
        folder = self._state.folder / "incidents" / f"{self._state.incidents:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    async def _look_into(self, finding: Finding) -> Finding:
        """Collect the stacks of all ranks, and blame with what they say."""
        state, folder = self._state, self._evidence()
        before = state.fleet.rank_views(time.monotonic())  # asking for stacks wakes a rank that sleeps in a system call
        limit = STACKS_OF_STOPPED_S if finding.cause == "stopped_process" else STACKS_LIMIT_S
        asked = [state.fleet.nodes[name] for name in self._connections.names if state.fleet.nodes[name].training]
        await self._ask_for_stacks(asked, folder, limit)
        stacks = {rank: text for node in asked for rank, text in (node.stacks or {}).items()}
        blamed = await asyncio.to_thread(culprit.blame, before, stacks)
        if blamed.cause in NATIVE_OF:
            ranks = blamed.ranks[:NATIVE_RANKS]
            names = {state.fleet.ranks[rank].node for rank in ranks if rank in state.fleet.ranks}
            await self._ask_for_stacks([node for node in asked if node.name in names], folder, NATIVE_LIMIT_S, ranks)
        if finding.cause == "straggler":
            blamed = finding  # nobody stands still: the stacks only show what it is about
        elif not blamed.ranks:
            blamed = replace(finding, detail=blamed.detail or finding.detail)
        state.journal.write(
            "incident_blamed", incident=state.incident, cause=blamed.cause, ranks=list(blamed.ranks), node=blamed.node,
            detail=blamed.detail, evidence=sum(1 for _ in folder.iterdir()),
        )  # fmt: skip
        return blamed

    async def _ask_for_stacks(
        self, nodes: Sequence[Node], folder: Path, limit_s: float, native_of: Sequence[int] = ()
    ) -> None:
        """Of all ranks of these nodes; with `native_of`, native ones of those ranks."""
        for node in nodes:
            node.stacks = None
        order = {
            "kind": "dump", "generation": self._state.journal.generation, "folder": str(folder), "timeout_s": limit_s,
            "native_of": list(native_of),
        }  # fmt: skip
        self._connections.send_all(order, [node.name for node in nodes])
        await until(lambda: all(node.stacks is not None for node in nodes), limit_s + 0.5)

    async def _save_and_leave(self) -> None:
        self._connections.send_all({"kind": "ask_ranks", "stop": "save"})
        fleet = self._state.fleet
        await until(
            lambda: all(view.exit_code is not None or fleet.nodes[view.node].lost for view in fleet.ranks.values()),
            SAVE_LIMIT_S,
        )

    async def _end_ranks(self) -> None:
        """End what is left of the generation, on every node that can still be told."""
        nodes = [self._state.fleet.nodes[name] for name in self._connections.names]
        told = [node for node in nodes if node.training or not node.idle]
        for node in told:
            node.stopping = True
        self._connections.send_all({"kind": "stop"}, [node.name for node in told])
        await until(lambda: not any(node.stopping and node.connected for node in told), STOPPED_LIMIT_S)

    async def _end_and_leave(self) -> None:
        await self._end_ranks()
        await self._leave()

    async def _leave(self) -> None:
        """What the operator or the end of the job's time has asked for, now that no rank is left."""
        state = self._state
        if state.leaving == "requeue" and state.settings.in_slurm:
            await self._allocation.requeue(state.reason)
        else:
            state.finish("stopped", state.reason, 0)

    async def _start_generation(self, reason: str) -> None:
        """Start all ranks on the nodes at hand; wait, or go back into the queue, where they are too few."""
        state, settings = self._state, self._state.settings
        await until(lambda: len(state.fleet.startable()) >= settings.nodes or not self._more_soon(), RETURN_S)
        if state.leaving:
            await self._end_and_leave()
            return
        order = state.fleet.startable()[: settings.nodes]
        if len(order) < settings.min_nodes:
            await self._wait_or_requeue(reason)
            return
        state.fleet.begin(order, settings.ranks_per_node)
        state.journal.generation += 1
        state.resumed_from = None
        state.caught_up = state.highest_step == 0
        state.tail.restart()
        state.journal.write(
            "generation_started", nodes=[node.name for node in order], world_size=len(state.fleet.ranks),
            reason=reason, incident=state.incident, skip_steps=list(state.skip_steps),
        )  # fmt: skip
        state.status, state.reason = "starting", reason
        command = list(settings.command)
        if state.skip_steps:
            command.append(f"data.skip_steps=[{','.join(map(str, state.skip_steps))}]")
        for group_rank, node in enumerate(order):
            node.idle = False
            self._connections.send(
                node.name,
                {
                    "kind": "start", "generation": state.journal.generation, "command": command,
                    "group_rank": group_rank, "group_world_size": len(order),
                    "master_address": order[0].address, "master_port": order[0].store_port,
                },
            )  # fmt: skip

    def _more_soon(self) -> bool:
        """Whether nodes may soon be startable: agents come back or still end ranks, or are asked if they live."""
        fleet, now = self._state.fleet, time.monotonic()
        nodes = fleet.nodes.values()
        coming = any(node.back_since is not None and now - node.back_since < RETURN_S for node in nodes)
        asked = any(node.heard_at and not node.connected and not node.lost and not node.excluded for node in nodes)
        return coming or asked or len(fleet.startable()) < len(fleet.ready())

    async def _wait_or_requeue(self, reason: str) -> None:
        state = self._state
        have, need = len(state.fleet.startable()), state.settings.min_nodes
        why = f"{have} of the {need} nodes it needs are left: {reason}"
        state.journal.write("waiting", reason=why)
        state.status, state.reason = "waiting", why
        if state.settings.in_slurm:
            if policy.requeues_in_vain(state.journal.events) >= policy.NO_PROGRESS_LIMIT:
                state.finish("failed", f"back from the queue again without a new step: {why}", EXIT_CRASH_LOOP)
            else:
                await self._allocation.requeue(why)
            return
        await until(lambda: state.leaving or len(state.fleet.startable()) >= need, WAIT_LIMIT_S)
        if state.leaving or len(state.fleet.startable()) >= need:
            await self._start_generation("enough nodes again")
        else:
            state.finish("failed", why, EXIT_FAILED)
