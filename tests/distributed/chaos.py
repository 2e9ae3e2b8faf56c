"""A soak: a run on several nodes of this machine that random faults strike until it is asked to stop, and then what
must hold of it whatever befell it.

A node is a keeper with its agent and one rank, under an address of its own on the loopback device. Faults come from a
seed, at random moments, also while the run recovers from the one before. What was done is the truth that the incidents
are held against.

On `STEADY` ground a spare takes over for a lost node, so all starts have the same layout and the losses must be those
of a calm run bit for bit. On `SHRINKING` ground there is none: the run goes on with the nodes that are left, on one
rank if need be, and grows again when they come back; its losses must be the calm run's to rounding.
"""

import bisect
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from faulty_train import Plan
from supervised import LIMIT_S, Supervised, environment, faults_in

from goku_infra.errors import OpsError
from goku_infra.node.scratch import remove_scratch_folder
from goku_infra.record.accounting import CLASSES, account, goodput
from goku_infra.record.incidents import Incident, incidents
from goku_infra.record.journal import Event

EVERY = 5
HANG_LIMIT_S = 10.0
PAUSE_S = 0.04
"""In every step, so that many faults do not make the run long."""
READMIT_AFTER_S = 3.0
"""How long the operator takes to put a drained node back."""
BEFORE_S = 0.5
"""A fault may be found earlier than it was written down here."""
EXPLAINS_S = 60.0
"""A fault can be the cause of an incident for so long."""
BEFORE_A_MISTAKE_S = 10.0
AFTER_A_MISTAKE_S = 20.0
POLL_CHAOS_S = 0.03
DESCRIPTORS = 200
THREADS = 60
"""More than a process of the supervisor ever needs: a leak of one a fault is seen."""

KINDS = {
    "kill": 30, "kill_at_start": 5, "kill_at_load": 5, "kill_at_save": 8, "kill_again": 10, "segfault": 5, "abort": 5,
    "stop": 5, "hold_lock": 2, "exception": 5, "leave": 3, "not_finite": 3, "damaged_checkpoint": 5, "agent": 6,
    "controller": 6, "controller_pause": 4, "power_off": 8,
}  # fmt: skip
"""What may strike, and how often beside the others."""
PLANTED = {
    "kill_at_start": ("start", "kill"), "kill_at_load": ("load", "kill"), "kill_at_save": ("save", "kill"),
    "segfault": ("step", "segfault"), "abort": ("step", "abort"), "hold_lock": ("step", "hold_lock"),
    "exception": ("step", "exception"), "leave": ("step", "leave"), "not_finite": ("step", "spoil"),
}  # fmt: skip
"""Faults that a rank does to itself: where, and what."""
CAUSES = {
    "kill": {"killed"}, "kill_again": {"killed"}, "kill_at_start": {"killed"}, "kill_at_load": {"killed"},
    "kill_at_save": {"killed"}, "segfault": {"crashed"}, "abort": {"crashed"}, "stop": {"stopped_process"},
    "hold_lock": {"locked"}, "exception": {"exception"}, "leave": {"early_exit"}, "not_finite": {"nan_loss"},
    "damaged_checkpoint": {"killed"}, "agent": {"agent_lost"}, "controller": {"unknown"},
    "controller_pause": {"unknown"}, "power_off": {"node_lost", "link_lost"},
}  # fmt: skip
"""What an incident may call each of them."""
OF_NODE = ("agent", "power_off")
NO_INCIDENT = ("controller", "controller_pause")
"""Faults that cost the ranks nothing."""
SHRINKING_KINDS = KINDS | {"power_off": 60, "segfault": 10}
"""A node that crashes twice must go, and without a spare the run shrinks."""
PLANNED = ("operator", "nodes_back")
"""Incidents that are no faults."""


@dataclass(frozen=True)
class Ground:
    """What a soak strikes, and how near to a calm run's its losses must be."""

    training: int
    spares: int
    min_nodes: int
    back_after_s: tuple[float, float]
    """How long a node is off."""
    precision: str
    tolerance: float
    """Largest relative difference of a loss; 0: bit for bit."""
    kinds: Mapping[str, int]


STEADY = Ground(
    training=2, spares=1, min_nodes=2, back_after_s=(1.0, 4.0), precision="fp32", tolerance=0.0, kinds=KINDS
)
SHRINKING = Ground(
    training=3, spares=0, min_nodes=1, back_after_s=(2.0, 12.0), precision="fp64", tolerance=1e-9,
    kinds=SHRINKING_KINDS,
)  # fmt: skip
"""In fp64, where what is left between two layouts is the order of their sums: 7e-16 of a loss after 100 steps of one
rank against three, 2e-13 after 600, for training magnifies it. The tolerance leaves room for thousands; a sample that
is seen twice or not at all, or another noise, changes a loss by far more."""


@dataclass
class Fault:
    """What was done: the truth."""

    kind: str
    time_s: float
    rank: int = -1
    node: str = ""
    striking: str = ""
    """The file that tells that a planted fault has struck; empty: it has."""

    def __str__(self) -> str:
        return f"{self.kind} of {self.node or f'rank {self.rank}'}"

    def struck_s(self) -> float | None:
        """When; None if it never has."""
        if not self.striking:
            return self.time_s
        with suppress(OSError):
            return os.stat(self.striking).st_mtime
        return None


@dataclass
class Mistake:
    """An incident that no fault explains or a fault that no incident tells of, and what happened around it."""

    what: str
    faults: list[str]
    """What struck within `EXPLAINS_S`, and when."""
    events: list[str]
    """The journal from `BEFORE_A_MISTAKE_S` before it to `AFTER_A_MISTAKE_S` after it."""


@dataclass
class Report:
    """What a soak has come to."""

    seed: int
    faults: int
    by_kind: dict[str, int]
    incidents: int
    blamed_rightly: int
    wrongly: list[Mistake] = field(default_factory=list)
    missed: list[Mistake] = field(default_factory=list)
    """Faults that struck a healthy run and were never found."""
    steps: int = 0
    lost_steps: int = 0
    generations: int = 0
    wall_s: float = 0.0
    goodput: float = 0.0
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    """From the last sign of health to the next step, by cause."""
    worlds: list[int] = field(default_factory=list)
    """Ranks of the starts that took a step, those in a row with as many ranks once."""
    largest_difference: float = 0.0
    """Relative, of a loss from the calm run's."""


class Nodes(Supervised):
    """A run on nodes of this machine; a context manager that ends all of them."""

    def __init__(self, run_dir: Path, command: list[str], ground: Ground) -> None:
        super().__init__(run_dir, command)
        self.names = [f"127.0.0.{11 + number}" for number in range(ground.training + ground.spares)]
        self.keepers: dict[str, subprocess.Popen[str]] = {}
        self.options = [
            "--nodes", str(ground.training), "--min-nodes", str(ground.min_nodes), "--ranks-per-node", "1",
            "--run-dir", str(run_dir), "--hang-limit", str(HANG_LIMIT_S), "--restart-limit", "1000000", "--", *command,
        ]  # fmt: skip

    def __enter__(self) -> "Nodes":
        for name in self.names:
            self.power_on(name)
        self.process = self.keepers[self.names[0]]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()
        for keeper in self.keepers.values():
            keeper.wait()
        for name in self.names:
            remove_scratch_folder(self.run_dir, name)  # which a killed keeper could not

    def power_on(self, name: str) -> None:
        """Start a node's keeper, as SLURM's step would."""
        words = [sys.executable, "-m", "goku_infra.cli", "agent", "--node-name", name, *self.options]
        number = str(self.names.index(name))
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"keeper_{name}.log").open("a") as log:
            self.keepers[name] = subprocess.Popen(
                words, stdout=log, stderr=log, text=True, env=environment(SLURM_JOB_ID="chaos", SLURM_NODEID=number)
            )

    def power_off(self, name: str) -> None:
        """SIGKILL to all that runs on a node."""
        controller = self.controller_pid() if self.controller_node() == name else 0
        self.keepers[name].kill()
        with suppress(ProcessLookupError):
            os.kill(self.agent_pid_of(name), signal.SIGKILL)
        if controller:
            with suppress(ProcessLookupError):
                os.kill(controller, signal.SIGKILL)
        self.keepers[name].wait()

    def agent_pid_of(self, name: str) -> int:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if "goku_infra.node.agent" in words and str(self.run_dir) in words and name in words:
                    return process.pid
        raise ProcessLookupError(name)

    def controller_node(self) -> str:
        address = json.loads((self.folder / "controller.json").read_text())
        return str(address["host"])

    def until(self, found: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
        """As a run on one machine, but any keeper may be off."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if result := found():
                return result
            if any(event.kind == "finished" for event in self.events()[-3:]):
                if result := found():
                    return result
                raise AssertionError(f"the run ended before {what}\n{self.story()}")
            time.sleep(POLL_CHAOS_S)
        raise AssertionError(f"no {what} within {limit_s} s\n{self.story()}")

    def wait_for_the_end(self, limit_s: float = LIMIT_S) -> None:
        """All keepers end well, and nothing is left."""
        for name, keeper in self.keepers.items():
            assert keeper.wait(timeout=limit_s) == 0, f"{name}\n{self.story()}"
        self.wait_until_empty()

    def kill_all(self) -> None:
        for keeper in self.keepers.values():
            keeper.kill()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


class Storm:
    """Strikes a run with random faults; `faults` is what was done."""

    def __init__(self, run: Nodes, plan: Plan, seed: int, ground: Ground) -> None:
        self.run = run
        self.plan = plan
        self.random = random.Random(seed)
        self._kinds = random.Random(seed)
        """Of its own, so that what strikes does not depend on how long anything takes."""
        self.ground = ground
        self.kinds = ground.kinds
        self.faults: list[Fault] = []
        self._back: list[tuple[float, str]] = []
        """When which node is switched on again."""
        self._excluded: dict[str, float] = {}
        self._paused: tuple[float, int] | None = None
        """(until when, pid) of a controller that has been stopped."""
        self.most = Counter({"descriptors": 0, "threads": 0})

    def blow(self, count: int, progress: Callable[[int], None]) -> None:
        """Strike `count` times, each at a random moment after the run has got a little further, or at once."""
        while len(self.faults) < count:
            kind = self._kinds.choices(list(self.kinds), list(self.kinds.values()))[0]
            self._wait_for_progress()
            self._wait_for_a_moment(self.random.uniform(0.0, 0.5))
            self._strike(kind)
            if kind in ("kill", "kill_at_load") and self.random.random() < self.kinds.get("kill_again", 0) / 40:
                self._wait_for_a_moment(self.random.uniform(0.2, 1.5))
                self._strike("kill_again")
            progress(len(self.faults))
        self._wait_for_progress()
        while self._back or self._paused:
            self._wait_for_a_moment(0.1)
        self._wait_for_progress(self.ground.training)

    def _strike(self, kind: str) -> None:
        fault = Fault(kind, time.time())
        try:
            self._do(kind, fault)
        except (psutil.Error, StopIteration, OSError, ValueError, IndexError):
            if not fault.striking:
                return  # what was to be struck is not there at this moment
        self.faults.append(fault)  # a planted one strikes later, then

    def _do(self, kind: str, fault: Fault) -> None:
        if kind in PLANTED:
            where, what = PLANTED[kind]
            fault.rank = self._a_rank()
            fault.striking = str(self.plan.add_one({"kind": what, "where": where, "rank": fault.rank, "times": 1}))
            if where in ("start", "load"):
                self._do("kill", opening := Fault("kill", time.time()))  # to bring the next start about
                self.faults.append(opening)
            self._wait_until_struck(fault)
        elif kind in ("kill", "kill_again", "stop"):
            fault.rank = self._a_rank()
            pid, fault.time_s = self._pid(fault.rank), time.time()
            os.kill(pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        elif kind == "damaged_checkpoint":
            pids = [self._pid(rank) for rank in range(self._world_size())]
            fault.rank = self.random.randrange(len(pids))
            newest = sorted((self.run.run_dir / "checkpoints").glob("step_????????"))[1:][-1:]
            file = max(newest[0].glob("*.distcp"), key=lambda path: path.stat().st_size) if newest else None
            if file is None:
                raise ProcessLookupError
            fault.time_s = time.time()
            os.kill(pids[fault.rank], signal.SIGKILL)
            damage(file)
        elif kind == "agent":
            fault.node = self.random.choice(self.run.names)
            os.kill(self.run.agent_pid_of(fault.node), signal.SIGKILL)
        elif kind == "controller":
            os.kill(self.run.controller_pid(), signal.SIGKILL)
        elif kind == "controller_pause":
            pid = self.run.controller_pid()
            os.kill(pid, signal.SIGSTOP)
            self._paused = (time.monotonic() + self.random.uniform(0.5, 4.0), pid)
        elif kind == "power_off":
            fault.node = self.random.choice([name for name in self.run.names if name not in dict(self._off())])
            self.run.power_off(fault.node)
            self._back.append((time.monotonic() + self.random.uniform(*self.ground.back_after_s), fault.node))

    def _off(self) -> list[tuple[str, float]]:
        return [(name, when) for when, name in self._back]

    def _world_size(self) -> int:
        """Of the newest start."""
        return int(self.run.events("generation_started")[-1].data["world_size"])

    def _a_rank(self) -> int:
        return self.random.randrange(self._world_size())

    def _pid(self, rank: int) -> int:
        state = self.run.state()
        if state is None:
            raise ProcessLookupError
        row = next(row for row in state["ranks"] if row["rank"] == rank)
        if not row["pid"] or "goku_infra.node.worker" not in psutil.Process(row["pid"]).cmdline():
            raise ProcessLookupError
        return int(row["pid"])

    def _wait_until_struck(self, fault: Fault) -> None:
        deadline = time.monotonic() + 30
        while fault.struck_s() is None and time.monotonic() < deadline:
            self._wait_for_a_moment(0.02)

    def _wait_for_progress(self, nodes: int = 1) -> None:
        """Until the run has taken a step that it had never taken, after all that struck it, on so many nodes."""
        last = max((fault.struck_s() or fault.time_s for fault in self.faults), default=0.0)

        def progressed() -> bool:
            self._repair()
            state = self.run.state()
            return (
                state is not None
                and state["time_s"] > last + 0.5
                and state["status"] == "running"
                and state["generation"] == max((event.generation for event in self.run.events()), default=0)
                and self._is_beyond(state["generation"])
                and state["committed_step"] > 0
                and len(state["ranks"]) >= nodes
            )

        self.run.until(progressed, f"progress on {nodes} nodes or more")

    def _is_beyond(self, generation: int) -> bool:
        """Whether a start of the ranks has got further than all before it, which the ladder asks as well."""
        events = self.run.events()
        steps = {event.generation for event in events if event.kind == "first_step"}
        return generation in steps and (
            generation == min(steps) or any(e.kind == "caught_up" and e.generation == generation for e in events)
        )

    def _wait_for_a_moment(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._repair()
            time.sleep(min(seconds, POLL_CHAOS_S))

    def _repair(self) -> None:
        """What the operator does meanwhile: nodes come back, drained ones are put to use again."""
        now = time.monotonic()
        if self._paused and now >= self._paused[0]:
            with suppress(ProcessLookupError):
                os.kill(self._paused[1], signal.SIGCONT)
            self._paused = None
        for when, name in list(self._back):
            if now >= when:
                self._back.remove((when, name))
                self.run.power_on(name)
        state = self.run.state()
        for node in state["nodes"] if state else []:
            if node["role"] != "excluded":
                self._excluded.pop(node["name"], None)
            elif now - self._excluded.setdefault(node["name"], now) > READMIT_AFTER_S:
                with suppress(OpsError):
                    self.run.ask("readmit", node=node["name"])
                    self._excluded.pop(node["name"])
        if self.random.random() < 0.02:
            self._count_resources()

    def _count_resources(self) -> None:
        for process in self.run.processes():
            with suppress(psutil.Error):
                if any(
                    word in ("goku_infra.node.agent", "goku_infra.control.controller") for word in process.cmdline()
                ):
                    self.most["descriptors"] = max(self.most["descriptors"], process.num_fds())
                    self.most["threads"] = max(self.most["threads"], process.num_threads())


def damage(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        byte = content.read(1)
        content.seek(-1, os.SEEK_CUR)
        content.write(bytes([byte[0] ^ 1]))


def settings(run_dir: Path, dataset: Path, steps: int, precision: str) -> list[str]:
    return [
        f"run_dir={run_dir}", f"data.path={dataset}", f"steps={steps}", f"checkpoint.every_steps={EVERY}",
        "data.samples_per_step=4", "data.max_tokens_per_rank=300", "optimizer.learning_rate=3e-3",
        "optimizer.warmup_steps=2", f"precision={precision}",
    ]  # fmt: skip


def soak(
    folder: Path, dataset: Path, *, seed: int, faults: int, ground: Ground = STEADY,
    progress: Callable[[int], None] = lambda count: None,
) -> Report:  # fmt: skip
    """Strike a run of the tiny model `faults` times, then check what must hold of it.

    Raises:
        AssertionError: something of it does not hold; the seed is in the message.
    """
    print(f"chaos: seed {seed}, {faults} faults, in {folder}", flush=True)
    plan = Plan(folder / "plan.json", {"kind": "sleep", "arguments": {"seconds": PAUSE_S}})
    run_dir = folder / "run"
    command = [*plan.command, *settings(run_dir, dataset, 10_000_000, ground.precision)]
    with Nodes(run_dir, command, ground) as run:
        storm = Storm(run, plan, seed, ground)
        storm.blow(faults, progress)
        run.ask("stop", save=True)
        run.wait_for_the_end()
    report = judge(run, storm, seed)
    report.largest_difference = check_losses(run, folder, dataset, ground)
    assert storm.most["descriptors"] < DESCRIPTORS and storm.most["threads"] < THREADS, storm.most
    return report


def judge(run: Nodes, storm: Storm, seed: int) -> Report:
    """The invariants that the journal and the metrics tell of, and who was blamed."""
    events = run.events()
    found = incidents(events)
    accounts = account(events, events[-1].time_s)
    wall_s = events[-1].time_s - events[0].time_s
    assert set(accounts) == set(CLASSES) and abs(sum(accounts.values()) - wall_s) < 1e-3, accounts
    check_commits(run, storm)
    steps = [row["step"] for row in run.metrics()]
    assert steps == list(range(len(steps))) == [row["data_step"] for row in run.metrics()], f"seed {seed}"
    report = Report(
        seed=seed, faults=len(storm.faults), by_kind=dict(Counter(fault.kind for fault in storm.faults)),
        incidents=len(found), blamed_rightly=0, steps=len(steps),
        lost_steps=sum(incident.lost_steps or 0 for incident in found), wall_s=wall_s, goodput=goodput(accounts),
        generations=max(event.generation for event in events), worlds=worlds(events),
    )  # fmt: skip
    left = sorted(storm.faults, key=lambda fault: fault.struck_s() or 0.0)
    for incident in found:
        if incident.cause in PLANNED:
            continue
        cause = next((fault for fault in left if explains(fault, incident)), None)
        if cause is None:
            what = f"incident {incident.number} ({incident.cause}): {incident.text}: {incident.detail}"
            report.wrongly.append(mistake(what, incident.detected_s, storm.faults, events))
            continue
        left.remove(cause)
        report.blamed_rightly += 1
        if incident.recovered_s is not None:
            report.recovery_s.setdefault(incident.cause, []).append(round(incident.recovered_s - incident.fault_s, 3))
    report.missed = [
        mistake(str(fault), fault.struck_s() or fault.time_s, storm.faults, events)
        for fault in left
        if fault.kind not in (*NO_INCIDENT, *OF_NODE) and not is_masked(fault, found, storm.faults)
    ]
    return report


def mistake(what: str, time_s: float, faults: Sequence[Fault], events: Sequence[Event]) -> Mistake:
    """With times relative to it."""
    struck = [(fault.struck_s(), fault) for fault in faults]
    near = [(when - time_s, fault) for when, fault in struck if when is not None and abs(when - time_s) < EXPLAINS_S]
    told = [
        f"{event.time_s - time_s:+.2f} s g{event.generation} {event.kind} {json.dumps(event.data)[:300]}"
        for event in events
        if -BEFORE_A_MISTAKE_S <= event.time_s - time_s <= AFTER_A_MISTAKE_S
    ]
    return Mistake(what, [f"{when:+.2f} s {fault}" for when, fault in sorted(near, key=lambda pair: pair[0])], told)


def explains(fault: Fault, incident: Incident) -> bool:
    """Whether an incident is the fault's and says so."""
    struck_s = fault.struck_s()
    if struck_s is None or not struck_s - BEFORE_S <= incident.detected_s <= struck_s + EXPLAINS_S:
        return False
    if incident.cause not in CAUSES[fault.kind]:
        return False
    if fault.kind in NO_INCIDENT:
        return True
    if fault.kind in OF_NODE:
        return incident.node == fault.node
    return incident.ranks == (fault.rank,)


def is_masked(fault: Fault, found: list[Incident], faults: list[Fault]) -> bool:
    """Whether the fault never struck, or struck ranks that were about to be ended because of another."""
    struck_s = fault.struck_s()
    if struck_s is None:
        return True
    others = [(other.struck_s() or 0.0, other) for other in faults if other is not fault]
    near = any(abs(struck_s - other_s) < HANG_LIMIT_S for other_s, _ in others)
    return near or any(
        incident.fault_s - BEFORE_S <= struck_s <= (incident.recovered_s or struck_s) for incident in found
    )


def check_commits(run: Nodes, storm: Storm) -> None:
    """No start of the ranks went back behind a commit, but for those of damaged checkpoints."""
    damages = [fault.time_s for fault in storm.faults if fault.kind == "damaged_checkpoint"]
    committed, seen_s = -1, 0.0
    for event in run.events():
        if event.kind == "progress" and event.data["committed_step"] is not None:
            committed, seen_s = max(committed, event.data["committed_step"]), event.time_s
        if event.kind == "first_step":
            damaged = bisect.bisect(damages, event.time_s) - bisect.bisect(damages, seen_s - LIMIT_S)
            least = committed - (2 * EVERY if damaged else 0)
            assert event.data["resumed_from"] >= least, f"{event}: {committed} had been committed"


def worlds(events: Sequence[Event]) -> list[int]:
    """Numbers of ranks that trained, one after the other; those that are followed by the same number once."""
    sizes = {event.generation: event.data["world_size"] for event in events if event.kind == "generation_started"}
    trained = [sizes[event.generation] for event in events if event.kind == "first_step"]
    return [size for size, _ in itertools.groupby(trained)]


def first_other_step(events: Sequence[Event], world_size: int) -> int:
    """The first step of the final history that other than `world_size` ranks may have taken."""
    sizes = {event.generation: event.data["world_size"] for event in events if event.kind == "generation_started"}
    others = [e.data["resumed_from"] for e in events if e.kind == "first_step" and sizes[e.generation] != world_size]
    return min(others, default=sys.maxsize)


def check_losses(run: Nodes, folder: Path, dataset: Path, ground: Ground) -> float:
    """The losses are those of a run that nothing befell: bit for bit as long as the layout is the same, and after that
    as near as the ground's tolerance. The largest relative difference."""
    taken = [row["loss"] for row in run.metrics()]
    plan, run_dir = Plan(folder / "calm.json"), folder / "calm"
    command = [*plan.command, *settings(run_dir, dataset, len(taken), ground.precision)]
    with Supervised(run_dir, command, ranks=ground.training) as calm:
        calm.finish(limit_s=LIMIT_S + 5 * len(taken))
        assert not faults_in(calm.events())
        expected = [row["loss"] for row in calm.metrics()]
    alike = first_other_step(run.events(), ground.training)
    assert taken[:alike] == expected[:alike]
    difference = max(abs(loss / calm_loss - 1) for loss, calm_loss in zip(taken, expected, strict=True))
    assert difference <= ground.tolerance, f"{difference:.1e} after {len(taken)} steps on {worlds(run.events())} ranks"
    return difference
