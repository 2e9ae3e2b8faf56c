"""How far the memory plan is off: `python -m benchmarks.memory [--json] [--only CASE ...]`.

Each case is a process of its own that takes two real training steps (forward, backward, clipping, AdamW, moving
average) and is then asked for its peak: of what torch has allocated on a GPU, of all it holds on a CPU (VmHWM,
which counts the libraries too).

On a CPU each case runs twice. glibc's malloc keeps freed blocks of up to 32 MiB, between ones still in use, so a
process comes to hold more than it ever uses at once. The plan says what is used: it is compared with a process
whose malloc gives freed blocks back at once, and the figure of the usual one stands beside it. The largest model
needs 20 GB.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._measure import device_name, report
from goku_mega.config.training import DataConfig, FlowRun, RecomputeConfig
from goku_mega.model.sizes import model_shape
from goku_mega.plan.activations import Pack
from goku_mega.plan.memory import Job, rank_memory

ON_GPU = torch.cuda.is_available()
LIMIT = 0.05 if ON_GPU else 0.10
"""Relative error that the plan may have."""
STEPS = 2
TEXT_TOKENS = 16
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc: blocks from 64 KiB on are mapped, and unmapped when freed."""


class Case(NamedTuple):
    """One process; `latent` is (t, h, w) of each of its samples, in cells."""

    size: str
    latent: tuple[int, int, int]
    samples: int
    policy: str


CASES = {
    f"{size}-{policy}": Case(size, latent, samples, policy)
    for size, latent, samples, policies in (
        [("1b", (16, 60, 104), 1, ("off", "selective", "full")), ("2b", (8, 60, 104), 1, ("off", "full"))]
        if ON_GPU
        else [("tiny", (3, 64, 64), 2, ("off", "selective", "full")), ("1b", (1, 32, 32), 1, ("off",))]
    )
    for policy in policies
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--in-this-process", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(CASES[options.in_this_process])))
        return
    rows = [row_of(name) for name in options.only]
    worst = max(abs(row["error"]) for row in rows)
    lines = []
    for row in rows:
        usual = "" if ON_GPU else f"   (usual malloc {row['usual_malloc_gb']:.3f} GB)"
        lines.append(
            f"{row['case']:16} measured {row['measured_gb']:7.3f} GB  plan {row['predicted_gb']:7.3f} GB  "
            f"{row['error']:+.1%}{usual}"
        )
    result = {
        "name": "memory", "value": round(worst, 4), "unit": "largest relative error of the plan", "baseline": LIMIT,
        "ratio": round(worst / LIMIT, 3), "device": device_name(), "cases": rows,
    }  # fmt: skip
    report(options, lines, result)


def row_of(name: str) -> dict[str, Any]:
    """A case's figures."""
    if ON_GPU:
        return {"case": name, **in_own_process(name, {})}
    usual = in_own_process(name, {})["measured_gb"]
    return {"case": name, **in_own_process(name, GIVES_BACK), "usual_malloc_gb": usual}


def in_own_process(name: str, environment: dict[str, str]) -> dict[str, Any]:
    """`measure` in a new process: a peak is of a process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--in-this-process", name]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case) -> dict[str, Any]:
    """Train a little; the peak and what the plan says of it, GB."""
    from goku_mega.parallel.groups import build_groups, initialise_distributed
    from goku_mega.parallel.layout import Layout
    from goku_mega.parallel.parallelize import build_model
    from goku_mega.train.loop import Trainer, dtypes, planned_device

    run = FlowRun(run_dir="none", size=case.size, steps=STEPS, data=DataConfig(path="none"))
    shape, device = model_shape(run.size), initialise_distributed(run.threads_per_rank)
    recompute = RecomputeConfig(policy=case.policy)  # type: ignore[arg-type]
    stored, computed = dtypes(run.precision, device)
    planned = planned_device(run, device, stored, computed)
    groups = build_groups(Layout(), device)
    model = build_model(shape, groups, seed=0, dtype=stored, compute_dtype=computed, recompute=recompute)
    trainer = Trainer(model, groups, run, computed)
    for step in range(STEPS):
        batch = a_step(step, case, shape, stored)
        trainer.step(batch)
    pack = Pack(batch.total_tokens, TEXT_TOKENS * case.samples, case.samples)
    job = Job(
        shape=shape, layout=Layout(), pack=pack, numerics=planned.numerics, process_bytes=planned.process_bytes
    )  # fmt: skip
    memory = rank_memory(job, recompute)
    measured = torch.cuda.max_memory_allocated() if ON_GPU else peak_of_process()
    return {
        "tokens": pack.tokens,
        "measured_gb": round(measured / 1e9, 3),
        "predicted_gb": round(memory.peak / 1e9, 3),
        "of_it_process_gb": round(memory.process / 1e9, 3),
        "error": round(memory.peak / measured - 1, 4),
    }


def a_step(step: int, case: Case, shape: Any, stored: torch.dtype) -> Any:
    """One pack of noise, as the loader gives it."""
    from goku_mega.config.training import FlowConfig
    from goku_mega.data.loader import StepBatch
    from goku_mega.data.packing import pack_training
    from goku_mega.data.shards import Sample

    text_width = shape.text_width
    samples = [
        Sample(f"{number}", torch.randn(shape.latent_channels, *case.latent), torch.randn(TEXT_TOKENS, text_width))
        for number in range(case.samples)
    ]
    pack = pack_training(
        samples, seed=0, step=step, flow=FlowConfig(), caption_dropout=0.0, null_text=torch.zeros(1, text_width),
        shape=shape, dtype=stored,
    )  # fmt: skip
    return StepBatch(step, [pack], pack.real_tokens, case.samples, 0, step)


def peak_of_process() -> int:
    """Most bytes of main memory that this process has had at once."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


if __name__ == "__main__":
    main()
