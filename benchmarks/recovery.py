"""From a fault to the next step, under three launchers: `python -m benchmarks.recovery [--json]`.

Two ranks of `goku-mega train` on one machine, a tiny model, a checkpoint every few steps. Under torchrun, under NVRx's
ft_launcher (`pip install nvidia-resiliency-ext==0.4.1`; left out, and said so, where it is missing) and under
`goku-ops run`, the same faults in turn: SIGKILL of rank 1 and of rank 0, SIGSTOP of rank 1 with a limit of 3 s where
the launcher has one, SIGKILL of the launcher's agent. The sides alternate, round by round.

The fault is the moment of the signal. *Detected* is the launcher's own word: an incident in the journal of `goku-ops`,
the first line about a failure in the log of the others, when it arrives. The *first step* is the first row that the
restarted ranks add to `metrics.jsonl`: they put a new file in its place, so it cannot be an old rank's. What has no
first step within --limit seconds has not recovered, and is not tried again. Orphans are ranks that are alive then.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks._measure import device_name, report
from goku_infra.heartbeat import read_beats
from goku_mega.data.shards import NULL_TEXT, EncodedSample, write_index, write_shard

NVRX = "nvidia_resiliency_ext"
RANKS, HANG_LIMIT_S = 2, 3
EVERY_STEPS = 20
START_LIMIT_S = 120
POLL_S = 0.002
MARK = "GOKU_BENCHMARK_RUN"
"""In the environment of every process of a side: finds those to end, orphans, too."""
ABOUT_A_FAILURE = re.compile(r"fail|exit|hang|hung|timeout|timed out|terminat|restart|signal", re.IGNORECASE)
NVRX_RANK = """
import runpy, sys
from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
from goku_infra.heartbeat import Heartbeat

client, beat = RankMonitorClient(), Heartbeat.beat

def beat_to_both(self, step, phase, *rest, **named):
    beat(self, step, phase, *rest, **named)
    if phase in ("forward", "backward", "optimizer"):  # not before the first step, whose limit is another
        client.send_heartbeat()

client.init_workload_monitoring()
Heartbeat.beat = beat_to_both
sys.argv[0] = "goku-mega"
runpy.run_module("goku_mega.cli", run_name="__main__", alter_sys=True)
"""


class Fault(NamedTuple):
    """Whom a signal hits."""

    name: str
    victim: int | None
    """A rank; None: the agent."""
    signal: signal.Signals


FAULTS = (
    Fault("SIGKILL of rank 1", 1, signal.SIGKILL),
    Fault("SIGKILL of rank 0", 0, signal.SIGKILL),
    Fault("SIGSTOP of rank 1", 1, signal.SIGSTOP),
    Fault("SIGKILL of the agent", None, signal.SIGKILL),
)


class Recovery(NamedTuple):
    """What became of one fault; seconds after it, None where it did not come in time."""

    detected_s: float | None
    first_step_s: float | None
    orphans: int
    """Ranks still alive, where nothing recovered."""


class Session:
    """One job under one launcher."""

    def __init__(self, command: list[str], run_dir: Path, *, has_journal: bool) -> None:
        self.run_dir, self.has_journal = run_dir, has_journal
        self.mark = uuid.uuid4().hex
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, errors="replace",
        )  # fmt: skip
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.time(), line))

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        if not self.has_journal:
            return {beat.rank: beat.pid for beat in read_beats(self.run_dir / "heartbeats")}
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads((self.run_dir / "supervisor" / "state.json").read_text())
            return {rank["rank"]: rank["pid"] for rank in state["ranks"]}
        return {}

    def agent(self) -> int:
        if not self.has_journal:
            return self.process.pid
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child.pid for child in children if "goku_infra.node.agent" in child.cmdline())

    def wait_until_steady(self) -> None:
        """Until the present ranks have trained from checkpoint to checkpoint, and all are alive."""
        steps, deadline = last_step(self.run_dir), time.monotonic() + START_LIMIT_S
        while last_step(self.run_dir) < steps + 2 * EVERY_STEPS or not self._all_alive():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError("the job does not train:\n" + "".join(line for _, line in self.lines[-30:]))
            time.sleep(0.05)
        time.sleep(1.0)  # what the launchers look at every second has been seen

    def _all_alive(self) -> bool:
        return len(ranks := self.ranks()) == RANKS and all(is_alive(pid) for pid in ranks.values())

    def suffer(self, fault: Fault, limit_s: float) -> Recovery:
        ranks = self.ranks()
        victim = self.agent() if fault.victim is None else ranks[fault.victim]
        before = inode(self.run_dir)
        fault_s = time.time()
        os.kill(victim, fault.signal)
        first_step_s = self._first_step_s(before, fault_s + limit_s)
        detected_s = self._detected_s(fault_s, first_step_s)
        orphans = 0 if first_step_s else sum(is_alive(pid) for pid in ranks.values())
        return Recovery(
            detected_s and round(detected_s - fault_s, 3), first_step_s and round(first_step_s - fault_s, 3), orphans
        )  # fmt: skip

    def _first_step_s(self, before: int, deadline_s: float) -> float | None:
        seen, size = before, 0
        while time.time() < deadline_s:
            with contextlib.suppress(FileNotFoundError):
                now = (self.run_dir / "metrics.jsonl").stat()
                if now.st_ino not in (before, seen):
                    seen, size = now.st_ino, now.st_size
                elif now.st_ino != before and now.st_size > size:
                    return time.time()
            time.sleep(POLL_S)
        return None

    def _detected_s(self, fault_s: float, until_s: float | None) -> float | None:
        if self.has_journal:
            text = (self.run_dir / "supervisor" / "journal.jsonl").read_text()
            events = (json.loads(line) for line in text.splitlines())
            said = (event["time_s"] for event in events if event["kind"] == "incident_opened")
        else:
            said = (at for at, line in list(self.lines) if ABOUT_A_FAILURE.search(line))
        return next((at for at in said if fault_s <= at <= (until_s or time.time())), None)

    def close(self) -> None:
        """End every process of this side, those it has lost, too."""
        deadline = time.monotonic() + 10
        while left := [process for process in psutil.process_iter() if self._is_mine(process)]:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {[process.pid for process in left]} cannot be killed")
            time.sleep(0.05)
        self.process.wait()

    def _is_mine(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--limit", type=float, default=15.0, metavar="S", help="wait so long for the first step")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    missing = [side for side in options.sides if side == "nvrx" and importlib.util.find_spec(NVRX) is None]
    sides = [side for side in options.sides if side not in missing]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending what runs
    with tempfile.TemporaryDirectory() as root:
        write_dataset(Path(root) / "data")
        measured = measure(Path(root), sides, options.repeats, options.limit)
    cases = {
        fault.name: {side: summary(measured[side, fault.name]) for side in sides if (side, fault.name) in measured}
        for fault in FAULTS
    }
    notes = [f"{side} is not installed: pip install nvidia-resiliency-ext==0.4.1" for side in missing]
    first = cases[FAULTS[0].name]
    ours, baseline = (first.get(side, {}).get("first_step_s") for side in ("goku_ops", "torchrun"))
    result = {
        "name": "recovery", "value": ours, "unit": "s from SIGKILL of rank 1 to the first new step",
        "baseline": baseline, "ratio": round(ours / baseline, 3) if ours and baseline else None,
        "device": device_name(), "cores": len(os.sched_getaffinity(0)), "ranks": RANKS, "hang_limit_s": HANG_LIMIT_S,
        "limit_s": options.limit, "cases": cases, "missing": missing,
    }  # fmt: skip
    report(options, [*table(cases), *notes], result)


def measure(root: Path, sides: list[str], repeats: int, limit_s: float) -> dict[tuple[str, str], list[Recovery]]:
    """Every round, each side suffers what it has recovered from before."""
    measured: dict[tuple[str, str], list[Recovery]] = {}
    hopeless: set[tuple[str, str]] = set()
    for number in range(repeats):
        for side in sides:
            faults = [fault for fault in FAULTS if (side, fault.name) not in hopeless]
            for fault, recovery in suffer_all(side, faults, root / f"{side}_{number}", root / "data", limit_s):
                print(f"round {number + 1}: {side}: {fault.name}: {recovery}", file=sys.stderr)
                measured.setdefault((side, fault.name), []).append(recovery)
                if recovery.first_step_s is None:
                    hopeless.add((side, fault.name))
    return measured


def suffer_all(
    side: str, faults: list[Fault], folder: Path, data: Path, limit_s: float
) -> Iterator[tuple[Fault, Recovery]]:
    """One fault after the other to the same job; to a new one after a fault from which it did not recover."""
    session: Session | None = None
    try:
        for number, fault in enumerate(faults):
            session = session or SIDES[side](folder / f"job_{number}", data)
            session.wait_until_steady()
            recovery = session.suffer(fault, limit_s)
            yield fault, recovery
            if recovery.first_step_s is None:
                session.close()
                session = None
    finally:
        if session is not None:
            session.close()


def train_words(folder: Path, data: Path) -> list[str]:
    return [
        "train", f"run_dir={folder / 'run'}", f"data.path={data}", "steps=10000000", "data.samples_per_step=8",
        f"checkpoint.every_steps={EVERY_STEPS}",
    ]  # fmt: skip


def torchrun(folder: Path, data: Path) -> Session:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
        "--max-restarts=1000", "--redirects=3", f"--log-dir={folder / 'logs'}",
        "-m", "goku_mega.cli", *train_words(folder, data),
    ]  # fmt: skip
    return Session(command, folder / "run", has_journal=False)


def nvrx(folder: Path, data: Path) -> Session:
    """With its quickest settings: it looks every second, and gives a rank 2 s to end."""
    folder.mkdir(parents=True)
    script = folder / "rank.py"
    script.write_text(NVRX_RANK)
    command = [
        sys.executable, "-m", f"{NVRX}.fault_tolerance.launcher", "--standalone", f"--nproc-per-node={RANKS}",
        "--max-restarts=1000", "--redirects=3", f"--log-dir={folder / 'logs'}", "--workers-stop-timeout=2",
        f"--ft-rank-heartbeat-timeout={HANG_LIMIT_S}", "--ft-initial-rank-heartbeat-timeout=60",
        "--ft-workload-check-interval=1", "--ft-enable-nic-monitor=false", str(script), *train_words(folder, data),
    ]  # fmt: skip
    return Session(command, folder / "run", has_journal=False)


def goku_ops(folder: Path, data: Path) -> Session:
    command = [
        sys.executable, "-m", "goku_infra.cli", "run", f"--ranks={RANKS}", f"--hang-limit={HANG_LIMIT_S}",
        f"--run-dir={folder / 'run'}", "--", "python", "-m", "goku_mega.cli", *train_words(folder, data),
    ]  # fmt: skip
    return Session(command, folder / "run", has_journal=True)


SIDES: dict[str, Callable[[Path, Path], Session]] = {"torchrun": torchrun, "nvrx": nvrx, "goku_ops": goku_ops}


def write_dataset(folder: Path) -> None:
    """Forty encoded samples of noise."""
    rng = np.random.default_rng(1)
    samples = [
        EncodedSample(
            f"sample-{number:03d}",
            rng.standard_normal((16, 1 + 2 * (number % 2), 8, 8)).astype(np.float32),
            rng.standard_normal((2 + number % 3, 64)).astype(np.float32),
            {"caption": ""},
        )
        for number in range(40)
    ]
    write_index(folder / "index.parquet", write_shard(folder / "shards" / "00000.tar", samples))
    np.save(folder / NULL_TEXT, rng.standard_normal((1, 64)).astype(np.float32))
    (folder / "dataset.json").write_text('{"latent_channels": 16, "text_width": 64, "text": "none", "vae": "none"}')


def last_step(run_dir: Path) -> int:
    """The step of the newest row of `metrics.jsonl`; -1: none yet."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return -1


def inode(run_dir: Path) -> int:
    return (run_dir / "metrics.jsonl").stat().st_ino


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def summary(recoveries: list[Recovery]) -> dict[str, Any]:
    recovered = [recovery for recovery in recoveries if recovery.first_step_s is not None]
    return {
        "faults": len(recoveries), "recovered": len(recovered),
        **{
            f"{name}{suffix}": quantile([getattr(recovery, name) for recovery in recoveries], share)
            for name in ("detected_s", "first_step_s")
            for suffix, share in (("", 0.5), ("_p95", 0.95))
        },
        "orphans": max(recovery.orphans for recovery in recoveries), "all": [list(one) for one in recoveries],
    }  # fmt: skip


def quantile(seconds: list[float | None], share: float) -> float | None:
    known = [value for value in seconds if value is not None]
    if not known:
        return None
    return round(statistics.median(known) if share == 0.5 else float(np.quantile(known, share)), 3)


def table(cases: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    rows = [("fault", "launcher", "recovered", "detected s", "p95", "first step s", "p95", "orphans")]
    for fault, sides in cases.items():
        for side, case in sides.items():
            seconds = (case[name] for name in ("detected_s", "detected_s_p95", "first_step_s", "first_step_s_p95"))
            shown = ["never" if value is None else f"{value:.2f}" for value in seconds]
            rows.append((fault, side, f"{case['recovered']}/{case['faults']}", *shown, str(case["orphans"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    main()
