"""The nodes that SLURM has given to the run: which may train, which are handed back, and what becomes of the job.

Outside SLURM only the exclusions are left.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from goku_infra import slurm
from goku_infra.control.connections import Connections
from goku_infra.control.fleet import Node
from goku_infra.control.policy import EXIT_FAILED
from goku_infra.control.run_state import RunState
from goku_infra.errors import OpsError

JOB_POLL_S = 10.0
WARNING_S = 300.0
"""Before the end of a job whose script is lost, when no signal comes: as `--signal` of launch/sbatch."""


class Allocation:
    """What is asked of SLURM, by the run and on behalf of it."""

    def __init__(self, state: RunState, connections: Connections) -> None:
        self.requeued = False
        self._state = state
        self._connections = connections
        self._batch_host = ""
        self._draining: set[asyncio.Task[None]] = set()

    @property
    def draining(self) -> bool:
        """Whether SLURM is still being asked to drain a node, or to give one back."""
        return bool(self._draining)

    def exclude(self, node: Node, reason: str) -> None:
        """The node trains no more, in this run nor, where we may say so, in another."""
        if node.excluded:
            return
        node.excluded = reason
        self._state.journal.write("node_excluded", node=node.name, reason=reason)
        self._beside(self._drain(node, reason))

    def drain_again(self, undrained: Mapping[str, str]) -> None:
        """Nodes, and why: a controller before this one did not live to ask SLURM for them."""
        for name, reason in undrained.items():
            self._beside(self._drain(self._state.fleet.node(name), reason))

    def readmit(self, node: Node, reason: str) -> None:
        """The node may train again; SLURM may give it to anyone if it was us who drained it."""
        node.excluded = ""
        self._state.journal.write("node_readmitted", node=node.name, reason=reason)
        self._beside(self._undrain(node))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Ask SLURM, if there is one, while the loop goes on."""
        if not self._state.settings.in_slurm:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def watch(self, time_is_up: Callable[[], None]) -> None:
        """See to the job's end where its script, which gets SLURM's warning, is lost with its node."""
        while True:
            with suppress(OpsError):
                if not self._batch_host or not self._connections.names or await self.script_lost():
                    job = await asyncio.to_thread(slurm.job, self._state.settings.job_id)
                    self._batch_host = job.batch_host
                    if job.state != "RUNNING":
                        self._state.finish("stopped", f"SLURM has ended the job: {job.state}", EXIT_FAILED)
                    elif job.end_s is not None and job.end_s - time.time() < WARNING_S and await self.script_lost():
                        time_is_up()
                        return
            await asyncio.sleep(JOB_POLL_S)

    async def script_lost(self) -> bool:
        """Whether the node on which the job's script runs is gone."""
        node = self._state.fleet.nodes.get(self._batch_host) or self._remembered(self._batch_host)
        if node is not None and node.connected:
            return False
        if node is not None and node.keeper_port:
            return not await self._connections.keeper_answers(node.name)
        try:
            return (await asyncio.to_thread(slurm.job, self._state.settings.job_id)).script_lost
        except OpsError:
            return False

    async def requeue(self, why: str) -> None:
        """Give the nodes back and the job into the queue; the run goes on when it starts again."""
        state = self._state
        with suppress(OpsError):
            job = await asyncio.to_thread(slurm.job, state.settings.job_id)
            if job.state != "RUNNING":  # then the nodes are not lost: SLURM is ending the job
                state.finish("stopped", f"SLURM has ended the job: {job.state}", EXIT_FAILED)
                return
        state.write_finished("requeued", why, 0)
        await self._mark_lost_nodes()
        self.requeued = True
        try:
            await asyncio.to_thread(slurm.requeue, state.settings.job_id)
            state.exit_code = 0
        except OpsError as error:
            state.finish("failed", f"{why}; and the job was not requeued: {error}", EXIT_FAILED)

    async def end_without_script(self) -> None:
        """Nobody but the controller ends a job whose script is lost."""
        await self._mark_lost_nodes()
        await self._ask(slurm.cancel, self._state.settings.job_id)

    async def _mark_lost_nodes(self) -> None:
        """Let SLURM know what it would find out in minutes: until then it neither ends a job nor avoids the nodes."""
        for node in list(self._state.fleet.nodes.values()):
            if node.lost and not await self._connections.keeper_answers(node.name):
                await self._ask(slurm.mark_down, node.name, node.lost)

    async def _drain(self, node: Node, reason: str) -> None:
        """Keep SLURM from giving the node to anyone; where we may not, ask the operator."""
        state = self._state
        if await self._ask(slurm.mark_down if node.lost else slurm.drain, node.name, f"goku: {reason}"[:200]):
            state.journal.write("node_drained", node=node.name)
            return
        number = 1 + max((e.data["request"] for e in state.journal.events if e.kind == "request"), default=0)
        text = f"drain node {node.name}: {reason}"
        command = f"goku-ops approve {state.settings.run_dir} {number}"
        state.requests[number] = {"request": number, "text": text, "command": command, "node": node.name}
        state.journal.write("request", **state.requests[number])
        state.alert("warning", f"approval needed: {text}")

    async def _undrain(self, node: Node) -> None:
        if not await self._ask(slurm.undrain, node.name):
            command = f"scontrol update nodename={node.name} state=resume"
            self._state.alert("warning", f"{node.name} is still drained in SLURM; an administrator can say: {command}")

    async def _ask(self, call: Callable[..., Any], *arguments: str) -> bool:
        """Ask SLURM for something; whether it was permitted."""
        try:
            await asyncio.to_thread(call, *arguments)
            return True
        except slurm.NotPermitted:
            return False
        except OpsError as error:
            self._state.alert("warning", str(error))
            return True

    def _remembered(self, name: str) -> Node | None:
        """A node that an earlier controller of this start of the job knew."""
        state = self._state
        for event in reversed(state.journal.events):
            if event.kind == "finished" and event.epoch < state.journal.epoch:
                return None
            if event.kind == "node_joined" and event.data["node"] == name:
                node = state.fleet.recall(name, event.data)
                node.lost = "it was lost under an earlier controller"
                return node
        return None
