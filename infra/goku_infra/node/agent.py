"""The agent of one node: torch elastic's processes, under the controller's orders.

A `LocalElasticAgent` whose rendezvous is the controller's word and whose workers come from a fork server that has
imported torch and the training code. It tells the controller what its ranks do and when one ends; it decides nothing.
"""

import logging
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed import HashStore, Store, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from goku_infra.checks.node_check import NodeWatch
from goku_infra.diagnosis import stacks
from goku_infra.heartbeat import Beat, Control, read_beats
from goku_infra.node.fork_server import ForkServer, start_fork_server
from goku_infra.node.link import Link, Member
from goku_infra.node.observe import last_lines, observe
from goku_infra.node.scratch import fresh_scratch_folder, name_semaphores_after
from goku_infra.node.worker import Place, run_rank
from goku_infra.process_name import take_name
from goku_infra.settings import Settings, read_settings
from goku_infra.views import GpuView

logger = logging.getLogger("goku_infra.node.agent")

LOOK_S = 0.1
"""Between two looks at the ranks."""
SAY_S = 0.5
"""Between two words to the controller when nothing has changed."""
REPORTS_PER_S = 3500
"""From all agents of a run together, at most: a controller can hear no more."""
HEALTH_S = 10.0
KILL_LIMIT_S = 25.0
"""A rank that SIGKILL has not ended by then is stuck in the kernel: much pinned memory takes seconds to give back."""
ABANDONED_S = 60.0
"""Ranks whose agent finds no controller for so long are ended: another part of the job may have taken over."""
MANY_RESTARTS = 1 << 30


class Told(RendezvousHandler):
    """A rendezvous that has been held already: the controller says who is who."""

    def __init__(self) -> None:
        self.info: RendezvousInfo | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        assert self.info is not None
        return self.info

    def get_backend(self) -> str:
        return "goku_infra"

    def get_run_id(self) -> str:
        return "goku"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True

    @property
    def use_agent_store(self) -> bool:
        return True


class OwnLogs(LogsSpecs):
    """Ranks write their logs themselves (`worker.run_rank`)."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(dict(nowhere), dict(nowhere), {}, {}, dict.fromkeys(envs, os.devnull), "", "")

    @property
    def root_log_dir(self) -> str:
        return ""


class NodeAgent(LocalElasticAgent):
    """Runs the ranks of one node, generation after generation."""

    def __init__(self, settings: Settings, member: Member, scratch: Path, fork_server: ForkServer) -> None:
        self._handler = Told()
        spec = WorkerSpec(
            role="rank", local_world_size=settings.ranks_per_node, rdzv_handler=self._handler, fn=run_rank,
            max_restarts=MANY_RESTARTS,
        )  # fmt: skip
        super().__init__(spec, OwnLogs(), start_method="forkserver")
        self._settings = settings
        self._member = member
        self._link = Link(member)
        self._server = self._offer_store()
        self._generation = 0
        self._assignment: dict[str, Any] = {}
        self._processes: dict[int, BaseProcess] = {}
        """By global rank: those that run."""
        self._ended: dict[int, dict[str, Any]] = {}
        """What has been said of those that have ended in this generation."""
        self._beats: dict[int, Beat] = {}
        """The last of each rank in this generation."""
        self._started_s = 0.0
        self._scratch = scratch
        self._fork_server = fork_server
        self._control: Control | None = None
        self._said_at = self._looked_at = 0.0
        self._last_said: object = None
        self._health: list[str] = []
        self._gpus: list[GpuView] = []
        self._ended_with: int | None = None
        """The exit code that the controller has told this agent to end with."""
        threading.Thread(target=self._watch_health, name="health", daemon=True).start()

    # -- orders ---------------------------------------------------------------------------------------------------

    def _invoke_run(self, role: str = "") -> RunResult:
        """Serve until the controller says that the job is over."""
        while self._ended_with is None:
            if self._fork_server.handle in self._wait():
                raise RuntimeError("the fork server was killed, and the ranks with it")  # the nursery forks us anew
            if not self._link.connected and not self._link.connect(self._hello()):
                self._give_up_if_abandoned()
            for message in self._link.receive():
                self._obey(message)
            self._report_ended()
            self._report_ranks()
        return RunResult(WorkerState.SUCCEEDED if self._ended_with == 0 else WorkerState.FAILED)

    def _wait(self) -> list[Any]:
        """Until something happens, or it is time to look; what is ready then."""
        waited_for: list[Any] = [self._fork_server.handle, *(process.sentinel for process in self._processes.values())]
        connection = self._link.socket  # the thread that speaks may lose it meanwhile
        try:
            return wait(waited_for if connection is None else [*waited_for, connection], timeout=LOOK_S)
        except (ValueError, OSError):
            return []

    def _obey(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "start":
            self._start(message)
        elif kind == "stop":
            self._stop_ranks()
        elif kind == "ask_ranks" and self._control is not None:
            self._control.request_stop(message["stop"])
        elif kind == "dump":
            threading.Thread(target=self._dump, args=(message,), name="dump", daemon=True).start()
        elif kind == "leave":
            self._stop_ranks()
            if message.get("error"):
                print(message["error"], flush=True)
            self._ended_with = message["exit_code"]

    def _start(self, order: dict[str, Any]) -> None:
        """Start this node's ranks of a generation; the controller has waited for the end of those before."""
        self._generation, self._assignment = order["generation"], order
        folder = self._scratch / f"g{self._generation:04d}"
        folder.mkdir()
        self._control = Control(folder)
        # torch elastic counts down what is left; ranks read the difference as TORCHELASTIC_RESTART_COUNT.
        self._remaining_restarts = MANY_RESTARTS - self._generation
        self._worker_group.spec.args = (tuple(order["command"]), self._places(folder))
        is_host = order["group_rank"] == 0
        self._handler.info = RendezvousInfo(
            self._server if is_host else HashStore(), order["group_rank"], order["group_world_size"],
            RendezvousStoreInfo(order["master_address"], order["master_port"]),
        )  # fmt: skip
        self._ended, self._beats = {}, {}
        self._initialize_workers(self._worker_group)
        self._started_s = time.monotonic()  # the fork server may have been busy with its imports until now
        context: Any = self._pcontext
        first = order["group_rank"] * self._settings.ranks_per_node
        self._processes = {first + local: process for local, process in enumerate(context._pc.processes)}
        self._link.send({"kind": "started", "generation": self._generation})

    def _stop_ranks(self) -> None:
        """End all ranks at once and say so, naming those that cannot be ended."""
        for process in self._processes.values():
            process.kill()
        deadline = time.monotonic() + KILL_LIMIT_S
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [rank for rank, process in self._processes.items() if process.is_alive()]
        self._processes = {}
        self._shutdown(signal.SIGKILL, timeout=0)
        self._pcontext = None
        self._remove_scratch()
        if not stuck:
            self._server = self._offer_store()  # a fresh one: no key of an earlier generation can be met
        self._link.send(
            {"kind": "stopped", "generation": self._generation, "stuck": stuck, "store_port": self._server.port}
        )

    def _places(self, folder: Path) -> dict[str, Place]:
        logs = self._link.folder / "logs" / f"g{self._generation:04d}"
        logs.mkdir(parents=True, exist_ok=True)
        first = self._assignment["group_rank"] * self._settings.ranks_per_node
        return {
            str(rank): Place(
                str(logs / f"rank_{rank:05d}.log"),
                {
                    "GOKU_HEARTBEATS": str(folder), "GOKU_GENERATION": str(self._generation),
                    "GOKU_STACKS": str(folder / f"rank_{rank:05d}.stacks"), "PYTHONUNBUFFERED": "1",
                },
                self._fork_server.pid,
            )
            for rank in range(first, first + self._settings.ranks_per_node)
        }  # fmt: skip

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Every node has as many ranks, so nothing needs to be asked of the others."""
        size = spec.local_world_size
        world = group_world_size * size
        return [
            Worker(local, group_rank * size + local, group_rank * size + local, world, world) for local in range(size)
        ]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        return RunResult(WorkerState.HEALTHY)  # `_invoke_run` waits for the processes themselves

    def _offer_store(self) -> TCPStore:
        return TCPStore(self._member.address, 0, is_master=True, wait_for_workers=False)

    # -- reports --------------------------------------------------------------------------------------------------

    def _hello(self) -> dict[str, Any]:
        return {
            "slots": self._settings.ranks_per_node,
            "store_port": self._server.port,
            "generation": self._generation if self._processes or self._ended else 0,
            "ended": list(self._ended.values()),
            "pid": os.getpid(),
        }

    def _report_ended(self) -> None:
        for rank, process in list(self._processes.items()):
            if process.exitcode is None:
                continue
            del self._processes[rank]
            generation = f"g{self._generation:04d}"
            log = self._link.folder / "logs" / generation / f"rank_{rank:05d}.log"
            self._ended[rank] = {
                "kind": "ended", "generation": self._generation, "rank": rank,
                "exit_code": process.exitcode, "last_lines": last_lines(log),
                "record_left": (self._scratch / generation / f"rank_{rank:05d}").exists(),  # not if it has ended well
            }  # fmt: skip
            self._link.send(self._ended[rank])

    def _report_ranks(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        ranks = self._observe()
        said = [(rank["rank"], rank.get("step"), rank["phase"], rank["process_state"] in "Tt") for rank in ranks]
        since_s = now - self._said_at
        if since_s >= SAY_S or (said != self._last_said and since_s >= self._settings.nodes / REPORTS_PER_S):
            self._last_said, self._said_at = said, now
            self._link.send(
                {"kind": "ranks", "generation": self._generation, "ranks": ranks, "health": self._health,
                 "gpus": self._gpus}
            )  # fmt: skip

    def _observe(self) -> list[dict[str, Any]]:
        folder = self._scratch / f"g{self._generation:04d}"
        beats = {beat.rank: beat for beat in read_beats(folder)} if self._processes else {}
        now = time.monotonic()
        for rank, last in self._beats.items():
            if rank not in beats:  # it has ended well and taken its record with it
                gone = replace(last, phase="leave", monotonic_s=now, alive_monotonic_s=now)
                beats[rank] = last if last.phase == "leave" else gone
        self._beats = beats
        return [
            observe(rank, rank % self._settings.ranks_per_node, process.pid or 0, self._started_s, beats.get(rank))
            for rank, process in self._processes.items()
        ]

    def _dump(self, order: dict[str, Any]) -> None:
        """Stacks of this node's ranks, or native ones of some of them, all at the same time."""
        pids = {rank: process.pid for rank, process in list(self._processes.items()) if process.pid is not None}
        folder, timeout_s, native_of = Path(order["folder"]), order["timeout_s"], order["native_of"]
        if native_of:
            texts = stacks.dump_native({rank: pids[rank] for rank in native_of if rank in pids}, folder, timeout_s)
        else:
            texts = stacks.dump_texts(pids, folder, timeout_s)
        by_rank = {str(rank): text for rank, text in texts.items()}
        self._link.send({"kind": "stacks", "generation": order["generation"], "stacks": by_rank})

    def _watch_health(self) -> None:
        watch: NodeWatch | None = None
        while self._ended_with is None:
            try:
                watch = watch or NodeWatch(self._member.run_dir)
                self._health = [f"{finding.severity}: {finding.text}" for finding in watch.findings()]
                self._gpus = watch.gpus
            except Exception:
                logger.exception("the health check of this node failed")
            time.sleep(HEALTH_S)

    # -- ends -----------------------------------------------------------------------------------------------------

    def _give_up_if_abandoned(self) -> None:
        if self._processes and self._link.lost_for_s > ABANDONED_S:
            logger.error("no controller for %.0f s: this node's ranks are ended", self._link.lost_for_s)
            self._stop_ranks()

    def _remove_scratch(self) -> None:
        for folder in self._scratch.glob("g*"):
            shutil.rmtree(folder, ignore_errors=True)

    def serve(self) -> int:
        """Run until the job is over; the exit code."""
        try:
            self._invoke_run()  # not `run`, which wants a result of every worker
        except SignalException:
            self._ended_with = 128 + signal.SIGTERM
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may be said twice: by SLURM to all, and by our nursery
            for process in self._processes.values():
                process.kill()
            shutil.rmtree(self._scratch, ignore_errors=True)
        assert self._ended_with is not None
        return self._ended_with


def main(run_dir: str, node: str, index: str, address: str, keeper_port: str) -> int:
    """The agent of a node, in a process that its nursery has just forked; the exit code."""
    settings = read_settings(Path(run_dir))
    member = Member(Path(run_dir), settings.job_id, node, int(index), address, int(keeper_port))
    scratch = fresh_scratch_folder(member.run_dir, node)
    name_semaphores_after(scratch)
    words = [run_dir, node, index, address, keeper_port]
    fork_server = start_fork_server(scratch / "fork_server", words)  # before there are threads
    take_name("goku_infra.node.agent", *words)
    signal.signal(signal.SIGTERM, _end)
    return NodeAgent(settings, member, scratch, fork_server).serve()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SignalException("asked to end", signal.Signals(number))
