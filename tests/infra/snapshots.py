"""Snapshots of runs for tests, as a controller would write them, from the events of a `Story`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from journals import Story

from goku_infra.record.accounting import account, goodput
from goku_infra.record.incidents import incidents
from goku_infra.views import GpuView, NodeView, RankView


def rank(number: int, *, ranks_per_node: int = 4, **changes: Any) -> dict[str, Any]:
    fields = {
        "pid": 4000 + number, "step": 1260, "phase": "forward", "phase_age_s": 0.1, "alive_age_s": 0.05,
        "process_state": "R", "cpu_s": 300.0, "busy_s": 200.0, "waiting_s": 40.0, "rss_bytes": 2 << 30,
    }  # fmt: skip
    node, local_rank = f"n{number // ranks_per_node}", number % ranks_per_node
    return asdict(RankView(rank=number, node=node, local_rank=local_rank, **(fields | changes)))


def node(name: str, role: str = "training", **changes: Any) -> dict[str, Any]:
    gpus = () if role == "lost" else tuple(gpu(index) for index in range(4))
    return asdict(NodeView(name=name, host=f"10.77.0.{10 + int(name[1:])}", role=role, slots=4, gpus=gpus, **changes))


def gpu(index: int) -> GpuView:
    return GpuView(index=index, busy=0.97 - index / 100, memory_bytes=74 << 30, power_w=640.5, temperature_c=64)


def story() -> Story:
    """A run that has met a killed rank, a node that is gone, and, just now, a rank that is stopped."""
    made = Story().run(nodes=3).start(takes_s=3.0).train(600, save_s=1.5).train(100)
    made.fault("killed", rank=0, node="n0", found_s=0.21).act("restart").start(incident=1, takes_s=1.4).close()
    made.train(300, save_s=1.5).train(250).fault("node_lost", rank=None, node="n2", found_s=1.8)
    made.act("exclude", node="n2").act("restart").after(0.3).start(incident=2, takes_s=2.2).close().train(360)
    made.fault("hang", rank=None, node="", found_s=3.1).after(0.4)
    return made.write(
        "incident_blamed", incident=3, cause="stopped_process", ranks=[5], node="n1",
        detail="process state T for 3.2 s; 7 ranks wait for it in all_reduce",
        evidence=2,
    )  # fmt: skip


def snapshot(told: Story | None = None, **changes: Any) -> dict[str, Any]:
    """The state of `story()`, or of another, with `changes`."""
    told = told or story()
    accounts = account(told.events, told.now)
    made = {
        "run_dir": "out/goku_8b", "job_id": "4711", "command": ["goku-mega", "train"], "epoch": 1,
        "generation": told.generation, "status": "recovering", "reason": "", "step": told.step,
        "highest_step": told.highest, "committed_step": told.committed, "loss": 0.8431, "gradient_norm": 0.912,
        "tokens_per_s": 1_482_113.0, "samples_per_s": 61.2, "time_s": told.now, "accounts": accounts,
        "goodput": goodput(accounts), "nodes": [node("n0"), node("n1"), node("n2", "lost", reason="power-off"),
        node("n3", "spare")],
        "ranks": [rank(number, step=told.step) for number in range(8)],
        "incidents": [asdict(incident) for incident in incidents(told.events)][-20:],
        "requests": [
            {"request": 1, "text": "drain n2 in SLURM: node is gone", "command": "goku-ops approve out/goku_8b 1"}
        ],
        "alerts": [{"time_s": told.now, "level": "warning", "text": "rank 5 on n1 is stopped"}],
    }  # fmt: skip
    made["ranks"][5] |= {"process_state": "T", "alive_age_s": 3.4}
    return json.loads(json.dumps(made | changes))


def quiet(**changes: Any) -> dict[str, Any]:
    """A healthy run that has met nothing."""
    told = Story().run(nodes=2).start(takes_s=3.0).train(600, save_s=1.5).train(60)
    healthy = {
        "status": "running",
        "ranks": [rank(number, step=told.step) for number in range(8)],
        "nodes": [node("n0"), node("n1")],
        "requests": [],
        "alerts": [],
    }
    return snapshot(told, **(healthy | changes))


def write_run(run_dir: Path, told: Story, state: dict[str, Any]) -> None:
    """The folder of a supervised run: journal, state and metrics."""
    folder = run_dir / "supervisor"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "journal.jsonl").write_text("".join(json.dumps(vars(event)) + "\n" for event in told.events))
    (folder / "state.json").write_text(json.dumps(state))
    write_metrics(run_dir / "metrics.jsonl", told.step)


def write_metrics(path: Path, steps: int) -> None:
    rows = (
        {"step": step, "loss": 0.7 + 1.8 / (1 + step / 60) + 0.03 * ((step * 7919) % 13 / 13 - 0.5),
         "gradient_norm": 1.0, "tokens_per_s": 1.45e6 + 3e4 * ((step * 104729) % 17 / 17), "samples_per_s": 61.0}
        for step in range(steps)
    )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
