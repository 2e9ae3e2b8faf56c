"""From what befalls a node to the next step: `python -m benchmarks.recovery_cluster [--json]`; needs root and SLURM.

A real SLURM of four nodes in namespaces (tests/cluster), three nodes of one rank each and a hot spare where it says so,
`goku-mega train` with a tiny model under launch/sbatch's job. The fault is the moment at which the node is cut off or
the signal is sent. *Detected* is the incident in the journal (for a controller: its successor is up), *first step* the
first step of the ranks that were started because of it. Start-up of agents after a requeue is processor time: the
four nodes share this machine's cores.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks._measure import report

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests/cluster"), str(ROOT / "tests/distributed")]
from cluster import CONTROL, Cluster, available  # noqa: E402
from parity import write_dataset  # noqa: E402
from supervised_job import SupervisedJob  # noqa: E402

EVERY_STEPS = 20
COMMANDS = {"goku-mega": "goku_mega.cli", "goku-ops": "goku_infra.cli"}
ASKED = {
    "controller killed": (2.0, None),
    "link of a node down, spare": (4.0, 8.0),
    "agent killed, spare": (2.0, None),
    "node power-off, spare": (2.0, 6.0),
    "first node power-off (script and controller), spare": (2.0, 6.0),
    "agent killed, no spare": (2.0, None),
    "node power-off, no spare: shrink": (2.0, 10.0),
    "node power-off, too few left: requeue": (2.0, 15.0),
    "time limit: save and requeue": (None, None),
}
"""Seconds: to detection, to the first new step."""


class Recovery(NamedTuple):
    """Seconds since the fault; None where it does not apply."""

    detected_s: float | None
    first_step_s: float | None
    lost_steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if reason := available():
        sys.exit(f"recovery_cluster: error: {reason}")
    measured: dict[str, list[Recovery]] = {}
    load = os.getloadavg()[0]
    for number in range(options.repeats):
        with tempfile.TemporaryDirectory() as root:
            write_dataset(Path(root) / "data")
            for name, recovery in suffer_all(Path(root)):
                print(f"round {number + 1}: {name}: {recovery}", file=sys.stderr)
                measured.setdefault(name, []).append(recovery)
    cases = {name: summary(rows, *ASKED[name]) for name, rows in measured.items()}
    result = {
        "benchmark": "recovery_cluster", "cores": os.cpu_count(), "load_before": round(load, 1),
        "repeats": options.repeats, "cases": cases,
    }  # fmt: skip
    lines = [f"{'fault':55} {'detected':>9} {'first step':>11} {'asked':>12} {'lost steps':>11}"]
    for name, case in cases.items():
        asked = " / ".join("-" if value is None else f"{value:g}" for value in ASKED[name])
        cells = [_cell(case["detected_s"]), _cell(case["first_step_s"])]
        lines.append(f"{name:55} {cells[0]:>9} {cells[1]:>11} {asked:>12} {case['lost_steps']:>11}")
    report(options, lines, result)


def summary(rows: list[Recovery], *asked: float | None) -> dict[str, float | int | None]:
    """Medians over the rounds, and the worst."""
    detected = [row.detected_s for row in rows if row.detected_s is not None]
    first = [row.first_step_s for row in rows if row.first_step_s is not None]
    return {
        "detected_s": round(statistics.median(detected), 2) if detected else None,
        "first_step_s": round(statistics.median(first), 2) if first else None,
        "worst_detected_s": round(max(detected), 2) if detected else None,
        "worst_first_step_s": round(max(first), 2) if first else None,
        "asked_detected_s": asked[0],
        "asked_first_step_s": asked[1],
        "lost_steps": max(row.lost_steps for row in rows),
    }


def suffer_all(root: Path) -> Iterator[tuple[str, Recovery]]:
    """Every fault once, several to a job."""
    (root / "bin").mkdir()
    for name, module in COMMANDS.items():
        (root / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (root / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{root}/bin:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT}/infra"}
    overrides = [f"data.path={root}/data", "steps=100000", f"checkpoint.every_steps={EVERY_STEPS}"]
    overrides.append("data.samples_per_step=6")
    with Cluster(4, environment=environment) as cluster:
        with SupervisedJob(cluster, root / "one", overrides, nodes=3, spares=1, min_nodes=2) as job:
            job.wait_for_more_steps(EVERY_STEPS)
            before = len(job.events("controller_started"))
            fault_s = job.kill_controller()
            back = job.wait_for("controller_started", before + 1)
            yield "controller killed", Recovery(back.time_s - fault_s, None, 0)
            yield "link of a node down, spare", suffer(job, lambda: cluster.link(away(job), up=False))
            for node in cluster.nodes:
                cluster.link(node, up=True)
            wait_for_spare(job)
            yield "agent killed, spare", suffer(job, lambda: job.kill_agent(away(job)))
            wait_for_spare(job)
            yield "node power-off, spare", suffer(job, lambda: cluster.power_off(away(job)))
            yield "agent killed, no spare", suffer(job, lambda: job.kill_agent(away(job)))
            yield "node power-off, no spare: shrink", suffer(job, lambda: cluster.power_off(away(job)))
        cluster.restore(60)
        with SupervisedJob(cluster, root / "two", overrides, nodes=3, spares=1) as job:
            job.wait_for_more_steps(EVERY_STEPS)
            while job.controller_node() != "n1":
                before = len(job.events("controller_started"))
                job.kill_controller()
                job.wait_for("controller_started", before + 1)
                job.wait_for_more_steps(2)
            recovery = suffer(job, lambda: cluster.power_off("n1"))
            yield "first node power-off (script and controller), spare", recovery
    # A cluster of its own: of a node that was removed from a running job and has come back, SLURM 22.05 keeps the cores
    # for some 20 s more, so that a job which needs it waits for `Resources` beside idle nodes.
    with Cluster(4, environment=environment) as cluster, SupervisedJob(cluster, root / "three", overrides) as job:
        job.wait_for_more_steps(EVERY_STEPS)
        yield "node power-off, too few left: requeue", suffer(job, lambda: cluster.power_off(away(job)))
        wait_for_new_steps(job)
        fault_s, starts = time.time(), len(job.events("first_step"))
        cluster.exec(CONTROL, ["scancel", "--signal=USR1", "--batch", job.job_id])
        step = job.wait_for("first_step", starts + 1)
        saved = [event for event in job.events("finished") if event.time_s < step.time_s][-1].data["step"]
        lost = saved - step.data["resumed_from"]
        yield "time limit: save and requeue", Recovery(None, step.time_s - fault_s, lost)


def wait_for_new_steps(job: SupervisedJob) -> None:
    """Some since the last checkpoint, and one that the run had never taken: three faults without would be a crash loop,
    whose restarts wait.
    """
    highest = job.state()["highest_step"]
    job.wait_for_more_steps(EVERY_STEPS // 2)
    job.until(lambda: (state := job.state()) and state["step"] > highest + 1, "new steps")


def suffer(job: SupervisedJob, fault: Callable[[], object]) -> Recovery:
    """One fault, and the way back."""
    wait_for_new_steps(job)
    opened, starts = len(job.events("incident_opened")), len(job.events("first_step"))
    fault_s = time.time()
    fault()
    found = job.wait_for("incident_opened", opened + 1)
    step = job.wait_for("first_step", starts + 1)
    lost = max(0, found.data["step"] - step.data["resumed_from"])
    return Recovery(found.time_s - fault_s, step.time_s - fault_s, lost)


def away(job: SupervisedJob) -> str:
    """A node that trains, neither the first nor the controller's."""
    nodes = job.events("generation_started")[-1].data["nodes"]
    return next(node for node in nodes[::-1] if node not in ("n1", job.controller_node()))


def wait_for_spare(job: SupervisedJob) -> None:
    job.until(lambda: any(row["role"] == "spare" for row in job.state()["nodes"]), "a spare")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


if __name__ == "__main__":
    main()
