"""The controller of a run of 10,000 ranks: `python -m benchmarks.controller_scale [--json] [--agents N ...]`.

The real controller, in a process of its own, against simulated agents of 8 ranks that say over real TCP what real
agents say, as often: reports of a training of 2-s steps, an end, silence, a hang with the stacks of all ranks, the end
of all ranks at once. Then a controller that takes over a run of 60 days: its journal, and metrics of every 5 s.

*Late* is by how much a tick of the controller's loop, due every 50 ms, comes later than that: every message to it
waits no longer. The time to detect is from the fault to the incident in the journal; of silence and of a hang, beyond
their limits. The agents share the machine with the controller, so all figures are upper limits.
"""

import argparse
import asyncio
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil

from goku_infra.control import controller
from goku_infra.messages import (
    ask,
    credentials,
    encode,
    ensure_token,
    page_token,
    read_address,
    supervisor_folder,
)
from goku_infra.node.worker import die_with_the_parent
from goku_infra.record.journal import Event, read_events
from goku_infra.settings import Settings, write_settings

RANKS_PER_NODE, SPARES = 8, 4
STEP_S = 2.0
PHASES = (("data", 0.05), ("forward", 0.35), ("backward", 0.95), ("optimizer", 1.0))
"""With the share of a step at which each ends."""
LOAD_S = 1.0
HANG_LIMIT_S, SILENCE_LIMIT_S = 12.0, 2.0
LOOK_S, SAY_S, SPEAK_S, REPORTS_PER_S = 0.1, 0.5, 0.4, 3500
"""As in `goku_infra.node.agent` and `goku_infra.node.link`, which would bring torch."""
DAYS, METRICS_EVERY_S, REPORT_EVERY_S, INCIDENTS_PER_DAY, JOBS = 60, 5, 10, 10, 15
TICKS_FILE = "ticks.json"
DEPTHS = range(25)
STACK = "== py-spy ==\n" + "".join(
    f'Thread {thread} (idle): "{name}"\n'
    + "    all_reduce (/lib/torch/distributed/distributed_c10d.py:3252)  # work.wait()\n"
    + "".join(f"    call_{depth} (/lib/goku_mega/train/loop.py:{depth})  # result = step(batch)\n" for depth in DEPTHS)
    for thread, name in enumerate(("MainThread", "heartbeat", "loader"))
)
LAST_LINES = [f"[rank]: RuntimeError: Connection closed by peer, in a line of a log as long as they are: {i}"
              for i in range(40)]  # fmt: skip


class Timed(controller.Controller):
    """The controller with the times at which its loop came round."""

    ticks: ClassVar[list[float]] = []

    def _tick(self) -> None:
        self.ticks.append(time.monotonic())
        super()._tick()


def serve(run_dir: str, epoch: str) -> int:
    """A controller process."""
    die_with_the_parent(os.getppid())
    controller.Controller = Timed  # type: ignore[misc]
    code = controller.main([run_dir, "--host", "127.0.0.1", "--epoch", epoch])
    (Path(run_dir) / TICKS_FILE).write_text(json.dumps(Timed.ticks))
    return code


class Run:
    """What the simulated ranks have in common: where the training is."""

    def __init__(self, agents: int) -> None:
        self.agents = agents
        self.look_s = max(LOOK_S, agents / REPORTS_PER_S)
        self.resumed_step = self.step = 0
        self.started: dict[str, float] = {}
        self.stuck_at: float | None = None
        self.sent_bytes = 0

    def place(self, now: float) -> tuple[int, str, float]:
        """(steps done, phase, since when): all ranks go in step, from when the last of them was started."""
        began = max(self.started.values(), default=now)
        now = self.stuck_at or now
        if now - began < LOAD_S:
            return self.resumed_step, "load", began
        steps, share = divmod((now - began - LOAD_S) / STEP_S, 1.0)
        before = 0.0
        for name, end in PHASES:
            phase = name
            if share < end:
                break
            before = end
        self.step = self.resumed_step + int(steps)
        return self.step, phase, began + LOAD_S + (steps + before) * STEP_S

    def stop(self, node: str) -> None:
        self.started.pop(node, None)
        if not self.started:
            self.resumed_step, self.stuck_at = self.step, None


class Agent:
    """One node, as the controller hears it."""

    def __init__(self, run: Run, index: int) -> None:
        self.run, self.index, self.name = run, index, f"n{index:04d}"
        self.generation = 0
        self.first_rank: int | None = None
        self.silent = False
        self.spoke_at = 0.0

    async def serve(self, address: dict[str, Any], token: str) -> None:
        reader, self.writer = await asyncio.open_connection(address["host"], address["port"])
        self.say(
            {"kind": "hello", **credentials(token, address["epoch"]), "job_id": "bench", "node": self.name,
             "index": self.index, "address": "127.0.0.1", "keeper_port": 9, "slots": RANKS_PER_NODE,
             "store_port": 29500, "generation": 0, "ended": [], "pid": 1}
        )  # fmt: skip
        speaking = asyncio.create_task(self.speak())
        try:
            await reader.readline()  # the proof
            while line := await reader.readline():
                self.obey(json.loads(line))
        except OSError:
            pass
        speaking.cancel()

    def obey(self, order: dict[str, Any]) -> None:
        match order["kind"]:
            case "start":
                self.generation, self.first_rank = order["generation"], order["group_rank"] * RANKS_PER_NODE
                self.run.started[self.name] = time.monotonic()
                self.say({"kind": "started", "generation": self.generation})
            case "stop":
                self.first_rank = None
                self.run.stop(self.name)
                self.say({"kind": "stopped", "generation": self.generation, "stuck": [], "store_port": 29500})
            case "leave":
                self.writer.close()
            case "dump":
                texts = {str(rank): STACK for rank in self.ranks}
                self.say({"kind": "stacks", "generation": self.generation, "stacks": texts})

    @property
    def ranks(self) -> range:
        return range(0) if self.first_rank is None else range(self.first_rank, self.first_rank + RANKS_PER_NODE)

    async def speak(self) -> None:
        said: object = None
        said_at = 0.0
        await asyncio.sleep(self.index % 100 / 100 * self.run.look_s)
        while True:
            now = time.monotonic()
            step, phase, since = self.run.place(now)
            if (step, phase, self.ranks) != said or now - said_at >= SAY_S:
                said, said_at = (step, phase, self.ranks), now
                self.say(
                    {"kind": "ranks", "generation": self.generation, "health": [], "gpus": [],
                     "ranks": [self.observe(rank, step, phase, now - since, now) for rank in self.ranks]}
                )  # fmt: skip
            elif now - self.spoke_at >= SPEAK_S - self.run.look_s:
                self.say({"kind": "alive"})
            await asyncio.sleep(self.run.look_s)

    def observe(self, rank: int, step: int, phase: str, age_s: float, now: float) -> dict[str, Any]:
        return {
            "rank": rank, "local_rank": rank % RANKS_PER_NODE, "pid": 1000 + rank, "process_state": "S",
            "cpu_s": round(now, 2), "rss_bytes": 34_359_738_368 + rank, "step": step, "phase": phase,
            "phase_age_s": age_s, "alive_age_s": 0.031234567, "busy_s": now * 0.7, "waiting_s": now * 0.3,
            "committed_step": 0, "loss": 1.2345678, "gradient_norm": 0.2345678,
        }  # fmt: skip

    def end(self, rank: int, exit_code: int, last_lines: list[str]) -> None:
        self.say(
            {"kind": "ended", "generation": self.generation, "rank": rank, "exit_code": exit_code,
             "last_lines": last_lines, "record_left": False}
        )  # fmt: skip

    def say(self, message: dict[str, Any]) -> None:
        if self.silent:
            return
        line = encode(message)
        self.run.sent_bytes += len(line)
        self.spoke_at = time.monotonic()
        self.writer.write(line)


async def one_size(agents: int, folder: Path, seconds: float) -> dict[str, Any]:
    """All figures with so many agents."""
    nodes = agents - SPARES if agents > 2 * SPARES else agents
    settings = Settings(
        run_dir=str(folder), command=("train",), job_id="bench", nodes=nodes, min_nodes=1,
        ranks_per_node=RANKS_PER_NODE, hang_limit_s=HANG_LIMIT_S, node_silence_s=SILENCE_LIMIT_S,
    )  # fmt: skip
    write_settings(settings)
    process = start_controller(folder, 1)
    address = await controller_of(folder, 1)
    token = ensure_token(supervisor_folder(folder))
    run = Run(agents)
    made = [Agent(run, index) for index in range(agents)]
    began = time.monotonic()
    serving = [asyncio.create_task(agent.serve(address, token)) for agent in made]
    await until(lambda: len(run.started) == nodes, 60)
    joined_s = time.monotonic() - began
    await first_steps(folder, 1)
    steady, cpu, steady_bytes = await watched(process, run, seconds)
    viewed, viewed_cpu, _ = await watched(process, run, seconds, viewing=(address, token))
    result: dict[str, Any] = {
        "agents": agents, "ranks": nodes * RANKS_PER_NODE, "join_and_start_s": round(joined_s, 2),
        "cpu_share": round(cpu, 3), "cpu_share_with_a_viewer": round(viewed_cpu, 3),
        "received_bytes_per_s": round(steady_bytes / seconds),
        "state_bytes": (supervisor_folder(folder) / "state.json").stat().st_size,
        "rss_bytes": process.memory_info().rss,
    }  # fmt: skip
    faults = []
    for cause, fault in (("exit", one_ends), ("silence", one_falls_silent), ("hang", all_hang), ("all_end", all_end)):
        window, overhead_s, restart_s = await befall(folder, made, run, fault)
        faults.append((cause, window))
        result |= {f"{cause}_detected_s": round(overhead_s, 3), f"{cause}_restarted_s": round(restart_s, 2)}
    await asyncio.to_thread(ask, folder, "stop")
    await until(lambda: process.poll() is not None, 30)
    await asyncio.gather(*serving)
    ticks = json.loads((folder / TICKS_FILE).read_text())
    for name, window in (("steady", steady), ("viewed", viewed), *faults):
        result |= lateness(name, ticks, window)
    return result


def one_ends(agents: list[Agent], run: Run) -> float:
    agents[1].end(agents[1].ranks[3], -9, LAST_LINES)
    return time.time()


def one_falls_silent(agents: list[Agent], run: Run) -> float:
    agents[2].silent = True
    run.stop(agents[2].name)
    return time.time() - (time.monotonic() - agents[2].spoke_at) + SILENCE_LIMIT_S


def all_hang(agents: list[Agent], run: Run) -> float:
    run.stuck_at = time.monotonic()
    return time.time() - (time.monotonic() - run.place(time.monotonic())[2]) + HANG_LIMIT_S


def all_end(agents: list[Agent], run: Run) -> float:
    for agent in agents:
        for rank in agent.ranks:
            agent.end(rank, 1, LAST_LINES)
    return time.time()


async def befall(
    folder: Path, agents: list[Agent], run: Run, fault: Callable[[list[Agent], Run], float]
) -> tuple[tuple[float, float], float, float]:
    """((begin, end), time to detect beyond the limit, time from there to the order to start again)."""
    generation = max(agent.generation for agent in agents)
    began = time.monotonic()
    due = fault(agents, run)
    await first_steps(folder, generation + 1)
    events = read_events(supervisor_folder(folder) / "journal.jsonl")
    opened = [event for event in events if event.kind == "incident_opened"][-1]
    started = [event for event in events if event.kind == "generation_started"][-1]
    await asyncio.sleep(STEP_S + 0.5)
    return (began, time.monotonic()), opened.time_s - due, started.time_s - opened.time_s


async def watched(
    process: psutil.Popen, run: Run, seconds: float, viewing: tuple[dict[str, Any], str] | None = None
) -> tuple[tuple[float, float], float, int]:
    """((begin, end), share of a core, bytes received), with a status page that looks every second or without."""
    times, began, before = process.cpu_times(), time.monotonic(), run.sent_bytes
    while (left := seconds - (time.monotonic() - began)) > 0:
        if viewing:
            await asyncio.to_thread(view, *viewing)
        await asyncio.sleep(min(1.0, left))
    now, spent_s = process.cpu_times(), time.monotonic() - began
    cpu_s = now.user + now.system - times.user - times.system
    return (began, time.monotonic()), cpu_s / spent_s, run.sent_bytes - before


def view(address: dict[str, Any], token: str) -> None:
    url = f"http://{address['host']}:{address['page_port']}/api/state"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {page_token(token)}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()


def lateness(name: str, ticks: list[float], window: tuple[float, float]) -> dict[str, Any]:
    """Of the ticks in a window, ms; the first and the last of a run are not among them."""
    begins = [begin for begin in ticks if window[0] <= begin <= window[1]]
    late = sorted(1000 * (b - a - controller.TICK_S) for a, b in itertools.pairwise(begins))
    return {
        f"{name}_late_p50_ms": round(statistics.median(late), 1),
        f"{name}_late_p99_ms": round(late[int(0.99 * len(late))], 1),
        f"{name}_late_max_ms": round(late[-1], 1),
    }


async def first_steps(folder: Path, generation: int) -> None:
    """Until the journal says that the ranks of a generation train."""
    path = supervisor_folder(folder) / "journal.jsonl"

    def trains() -> bool:
        return any(event.kind == "first_step" and event.generation >= generation for event in read_events(path))

    await until(trains, 120, poll_s=0.2)


async def until(condition: Callable[[], bool], limit_s: float, poll_s: float = 0.02) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {limit_s:.0f} s")
        await asyncio.sleep(poll_s)


def start_controller(folder: Path, epoch: int) -> psutil.Popen:
    with (folder / "controller.log").open("ab") as log:
        return psutil.Popen(
            [sys.executable, "-m", "benchmarks.controller_scale", "--serve", str(folder), str(epoch)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


async def controller_of(folder: Path, epoch: int) -> dict[str, Any]:
    await until(lambda: (read_address(supervisor_folder(folder)) or {}).get("epoch") == epoch, 60, poll_s=0.01)
    return read_address(supervisor_folder(folder)) or {}


async def after_months(nodes: int, folder: Path) -> dict[str, Any]:
    """A controller that takes over a run of `DAYS` days: how long until it listens, and what it holds."""
    settings = Settings(
        run_dir=str(folder), command=("train",), job_id="bench", nodes=nodes, min_nodes=nodes,
        ranks_per_node=RANKS_PER_NODE,
    )  # fmt: skip
    write_settings(settings)
    journal = supervisor_folder(folder) / "journal.jsonl"
    lines, last_step = write_months(journal, nodes)
    row = '{"step": %d, "loss": 0.5, "gradient_norm": 0.25, "tokens_per_s": 1482113.5, "checkpoint_s": null}\n'
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(row % step for step in range(last_step))
    began = time.monotonic()
    process = start_controller(folder, 2)
    await controller_of(folder, 2)
    back_s = time.monotonic() - began
    await asyncio.sleep(1.0)
    before = process.cpu_times()
    await asyncio.sleep(3.0)
    after, rss = process.cpu_times(), process.memory_info().rss
    process.kill()
    process.wait()
    return {
        "days": DAYS, "journal_lines": lines, "journal_bytes": journal.stat().st_size,
        "metrics_bytes": (folder / "metrics.jsonl").stat().st_size, "back_s": round(back_s, 2), "rss_bytes": rss,
        "idle_cpu_share": round((after.user + after.system - before.user - before.system) / 3.0, 3),
    }  # fmt: skip


def write_months(path: Path, nodes: int, days: int = DAYS) -> tuple[int, int]:
    """A journal of so many days; (its lines, the last step)."""
    seq, now, generation, step = 0, time.time() - days * 86400.0, 0, 0
    with path.open("w") as file:

        def write(kind: str, **data: Any) -> None:
            nonlocal seq
            event = Event(seq, kind, now, 1, generation, data)
            file.write(json.dumps(vars(event), separators=(",", ":")) + "\n")
            seq += 1

        names = [f"n{node:04d}" for node in range(nodes)]
        starts = days * INCIDENTS_PER_DAY
        for number in range(starts):
            if number % (starts // JOBS) == 0:
                for name in names:
                    write("node_joined", node=name, host="10.0.0.1", slots=RANKS_PER_NODE, running=0)
                write(
                    "run_started", command=["train"], ranks_per_node=8, nodes=nodes, spares=0, min_nodes=1, job_id="7"
                )
            generation += 1
            incident = number if number % (starts // JOBS) else None
            write("generation_started", nodes=names, world_size=nodes * RANKS_PER_NODE, reason="", incident=incident,
                  skip_steps=[])  # fmt: skip
            now += 30.0
            step += 1
            write("first_step", step=step, resumed_from=step - 1)
            if incident:
                write("incident_closed", incident=incident, step=step, lost_steps=0)
            for report_number in range(86400 // INCIDENTS_PER_DAY // REPORT_EVERY_S - 3):
                now += REPORT_EVERY_S
                step += REPORT_EVERY_S // METRICS_EVERY_S
                write("progress", step=step, committed_step=step, loss=1.23456, saving_s=report_number // 60 * 0.5)
            write("incident_opened", incident=number + 1, cause="killed", ranks=[number], node="n0001", step=step,
                  fault_s=now - 0.2, detail="SIGKILL")  # fmt: skip
            write("action", incident=number + 1, action="restart", reason="rank 5 was killed by a signal")
            write("alert", level="warning", text="rank 5 was killed by a signal")
        write("finished", status="requeued", step=step, reason="", exit_code=0)
    return seq, step


def table(sizes: list[dict[str, Any]], months: dict[str, Any]) -> list[str]:
    rows = {
        "ranks": "ranks", "all agents connected and told to start, s": "join_and_start_s",
        "tick late, median / p99, ms": "steady_late_p50_ms steady_late_p99_ms",
        "with a status page open": "viewed_late_p50_ms viewed_late_p99_ms",
        "share of a core": "cpu_share", "received, bytes/s": "received_bytes_per_s", "memory, bytes": "rss_bytes",
        "an end detected after, s": "exit_detected_s", "silence, beyond its limit": "silence_detected_s",
        "a hang, beyond its limit": "hang_detected_s", "all ranks end": "all_end_detected_s",
        "latest tick of any fault, ms":
        "exit_late_max_ms silence_late_max_ms hang_late_max_ms all_end_late_max_ms",
    }  # fmt: skip
    lines = [f"| {'agents':44} | {' | '.join(str(size['agents']) for size in sizes)} |"]
    lines.append("|---|" + "---|" * len(sizes))
    for text, keys in rows.items():
        cells = [" / ".join(f"{size[key]:,}" for key in keys.split()) for size in sizes]
        lines.append(f"| {text:44} | {' | '.join(cells)} |")
    lines.append(
        f"after {months['days']} days ({months['journal_lines']:,} events): back in {months['back_s']} s, "
        f"{months['rss_bytes'] / 1e6:.0f} MB"
    )
    return lines


async def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    sizes = []
    for agents in options.agents:
        with tempfile.TemporaryDirectory(prefix="goku-scale-") as folder:
            sizes.append(await one_size(agents, Path(folder), options.seconds))
    with tempfile.TemporaryDirectory(prefix="goku-scale-") as folder:
        months = await after_months(max(options.agents), Path(folder))
    return sizes, months


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--agents", type=int, nargs="+", default=[16, 128, 512, 1254])
    parser.add_argument("--seconds", type=float, default=20.0, help="how long an undisturbed run is watched")
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sizes, months = asyncio.run(measure(options))
    from benchmarks._measure import device_name, report  # with torch, which the controller's process does not need

    result = {"benchmark": "controller_scale", "device": device_name(), "cores": os.cpu_count(), "sizes": sizes}
    report(options, table(sizes, months), {**result, "months": months})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(*sys.argv[2:4]))
    main()
