"""The controller of one run: one loop that hears the agents, asks the detectors and the policy, acts and takes notes.

It holds nothing that the journal and the agents could not tell again: killed, it is raised by an agent, reads the
journal, and takes over the ranks that are still running. What it does is in the rooms beside this one: `connections`
hear, `rank_watch` and `node_watch` look, `recovery` acts under `policy`, all on one `run_state`.
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from goku_infra.control.allocation import Allocation
from goku_infra.control.connections import Connections
from goku_infra.control.metrics_tail import MetricsTail
from goku_infra.control.node_watch import NodeWatch
from goku_infra.control.operators import Operators
from goku_infra.control.policy import EXIT_FAILED, PolicyState
from goku_infra.control.rank_watch import RankWatch
from goku_infra.control.recall import recall
from goku_infra.control.recovery import Recovery
from goku_infra.control.run_state import RunState
from goku_infra.control.snapshot import Snapshots
from goku_infra.control.takeover import Takeover
from goku_infra.errors import OpsError
from goku_infra.messages import (
    CONTROLLER_FILE,
    PAGE_TOKEN_FILE,
    page_token,
    replace_file,
    sign,
    supervisor_folder,
)
from goku_infra.pages import prometheus
from goku_infra.pages.alerts import Alerts
from goku_infra.pages.page import Page
from goku_infra.record.journal import Journal
from goku_infra.settings import Settings, read_settings

logger = logging.getLogger("goku_infra.control.controller")

TICK_S = 0.05
SPEAK_S = 0.2
"""Between two words to every agent, and two signs in the shared folder, so that they know of us."""
ABANDONED_S = 120.0
"""A controller without any agent for so long ends."""
ALONE_S = 2.0
"""The same, where no other agent can come or needs this controller."""
DRAIN_LIMIT_S = 30.0
"""For commands to SLURM that are under way when the run ends."""
GARBAGE_AFTER = 50_000
"""New objects between two searches for garbage: every look makes one for each rank, and none of them is in a cycle."""


class Superseded(Exception):
    """Another controller has been raised for this run."""


class Controller:
    """One run's controller, from its epoch's beginning to the end of the run or of itself."""

    def __init__(self, settings: Settings, folder: Path, journal: Journal, host: str) -> None:
        self.state = RunState(
            settings, folder, journal, host, MetricsTail(Path(settings.run_dir) / "metrics.jsonl"),
            Alerts(settings.webhook), policy=PolicyState(restart_limit=settings.restart_limit),
        )  # fmt: skip
        left = recall(self.state)
        self.over = left.over
        self._undrained = left.undrained
        self.connections = Connections(self.state, left.over)
        self.connections.hearer = self
        self.allocation = Allocation(self.state, self.connections)
        self.recovery = Recovery(self.state, self.connections, self.allocation)
        self.nodes = NodeWatch(self.state, self.connections, self.recovery)
        self.ranks = RankWatch(self.state, self.nodes, self.recovery)
        self.takeover = Takeover(self.state, self.connections, self.recovery, self.nodes, left)
        self.operators = Operators(self.state, self.recovery, self.allocation)
        self.snapshots = Snapshots(self.state)
        self._said_at = 0.0

    async def serve(self) -> int:
        """Until the run is over; its exit code."""
        state = self.state
        server = await self.connections.listen()
        self._loop = asyncio.get_running_loop()
        await self.snapshots.take()
        secret = page_token(self.connections.token)
        replace_file(state.folder / PAGE_TOKEN_FILE, secret, 0o600)
        with Page(
            Path(state.settings.run_dir), lambda: self.snapshots.newest, self._ask_from_page, secret, state.host, 0,
            actions=state.settings.page_actions,
        ) as page:  # fmt: skip
            self._show_where(server.sockets[0].getsockname()[1], page.port)
            if self.over is None:
                state.journal.write("controller_started", host=state.host, pid=os.getpid())
                self.allocation.drain_again(self._undrained)
            beside = [asyncio.create_task(self.takeover.seek_expected())]
            if state.settings.in_slurm:
                beside.append(asyncio.create_task(self.allocation.watch(self._time_is_up)))
            async with server:
                while state.exit_code is None:
                    await asyncio.sleep(TICK_S)
                    if state.exit_code is None:
                        self._tick()
                for task in beside:
                    task.cancel()
                await self._finish_draining()
                await self._end_job_without_script()
                await self.connections.say_farewell(state.exit_code, state.reason if state.exit_code else "")
                state.alerts.close()
        await self.snapshots.take()
        if not self.allocation.requeued:
            replace_file(state.folder / prometheus.TARGETS_FILE, "[]")
        return state.exit_code

    def _show_where(self, port: int, page_port: int) -> None:
        """From here on agents and operators find this controller."""
        state = self.state
        address = {
            "host": state.host,
            "port": port,
            "page_port": page_port,
            "pid": os.getpid(),
            "epoch": state.journal.epoch,
            "job_id": state.settings.job_id,
        }
        replace_file(state.folder / CONTROLLER_FILE, json.dumps(address))
        targets = prometheus.targets(state.settings.run_dir, state.host, page_port)
        replace_file(state.folder / prometheus.TARGETS_FILE, targets)

    def _tick(self) -> None:
        now = time.monotonic()
        state = self.state
        self._check_epoch()
        if self.recovery.failure is not None:
            raise self.recovery.failure
        unheard_s = now - self.connections.heard_any_at
        if self.over is not None:
            state.exit_code = self.over if unheard_s > ALONE_S else None
            return
        self._speak(now)
        self.nodes.look(now)
        self.takeover.begin_when_nodes_suffice(now)
        self.ranks.look(now)
        self.snapshots.look(now)
        others_may_come = not state.settings.on_one_machine or any(
            node.back_since is not None for node in state.fleet.nodes.values()
        )
        if not self.connections.names and unheard_s > (ABANDONED_S if others_may_come else ALONE_S):
            state.finish("failed", "every agent is gone", EXIT_FAILED)

    async def _finish_draining(self) -> None:
        """What is asked of SLURM at the end is asked, or requested from the operator, before anybody leaves."""
        deadline = time.monotonic() + DRAIN_LIMIT_S
        while self.allocation.draining and time.monotonic() < deadline:
            self._speak(time.monotonic())
            await asyncio.sleep(TICK_S)

    def _check_epoch(self) -> None:
        next_epoch = self.state.folder / f"epoch_{self.state.journal.epoch + 1:05d}"
        if self.nodes.cut_off or next_epoch.exists():
            raise Superseded

    def _speak(self, now: float) -> None:
        if now - self._said_at >= SPEAK_S:
            self._said_at = now
            if not self.nodes.alone(now):
                sign(self.state.folder)
            self.connections.send_all({"kind": "here"})

    def _time_is_up(self) -> None:
        self.operators.stop(save=True, requeue=True)

    async def _end_job_without_script(self) -> None:
        """Nobody else ends such a job. Not after the farewell: SLURM ends us when the agents have left."""
        if self.state.settings.in_slurm and not self.allocation.requeued and await self.allocation.script_lost():
            await self.snapshots.take()
            await self.allocation.end_without_script()

    # -- what comes in --------------------------------------------------------------------------------------------

    def joins(self, name: str, generation: int) -> None:
        self.nodes.joins(name, generation)

    def joined(self, name: str, generation: int) -> None:
        self.takeover.joined(name, generation)

    def heard(self, name: str, message: dict[str, Any]) -> None:
        if message["kind"] == "stopped" and message["stuck"]:
            reason = f"rank {message['stuck'][0]} is stuck in the kernel and cannot be killed"
            self.allocation.exclude(self.state.fleet.nodes[name], reason)

    async def gone(self, name: str) -> None:
        await self.nodes.gone(name)

    async def asked(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if request["command"] == "state":
                await self.snapshots.take()
                return {"ok": True, "state": self.snapshots.newest}
            return {"ok": True, **self.operators.operate(request["command"], request)}
        except OpsError as error:
            return {"ok": False, "error": str(error)}

    def _ask_from_page(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """From the page's thread."""
        future = asyncio.run_coroutine_threadsafe(self.asked({"command": command, **arguments}), self._loop)
        return future.result(timeout=10)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="goku_infra.control.controller")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--host", required=True, help="this node, as the other nodes reach it")
    parser.add_argument("--epoch", type=int, required=True, help="which controller of the run; its file is there")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(GARBAGE_AFTER)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for every agent
    folder = supervisor_folder(options.run_dir)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(folder, options.epoch))
        try:
            return asyncio.run(Controller(read_settings(options.run_dir), folder, journal, options.host).serve())
        except Superseded:
            logger.warning("another controller has taken over")
            return 0


if __name__ == "__main__":
    sys.exit(main())
