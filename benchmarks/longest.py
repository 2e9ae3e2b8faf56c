"""The longest sample in one piece: `python -m benchmarks.longest [--json]`.

A whole training step (forward, backward, clipping, AdamW, EMA) on a single sample of 219,600 tokens, 720 x 1280 and
241 frames, twice in a row, on one GPU: Goku-2B, then 8B-wide layers at two depths, from which a layer's time and
memory follow. On a CPU a small model takes a sample of 4,800 tokens through the same code.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks._measure import arguments, device_name, report
from goku_mega.config.training import DataConfig, FlowConfig, FlowRun, RecomputeConfig
from goku_mega.data.loader import StepBatch
from goku_mega.data.packing import pack_training
from goku_mega.data.shards import Sample
from goku_mega.model.sizes import SIZES, ModelShape
from goku_mega.parallel.groups import initialise_distributed, single_process_groups
from goku_mega.parallel.parallelize import build_model
from goku_mega.plan.devices import peak_flops
from goku_mega.plan.flops import training_flops
from goku_mega.train.loop import Trainer

ON_GPU = torch.cuda.is_available()
LATENT = (61, 90, 160) if ON_GPU else (20, 24, 40)
TEXT_TOKENS = 256
STEPS = 2
DEPTHS = (1, 2)
"""Layers of 8B's width; their difference is one layer."""


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    device = initialise_distributed(1)
    sizes = {"2b": SIZES["2b"]} if ON_GPU else {"tiny": SIZES["tiny"]}
    if ON_GPU:
        sizes |= {f"8b, {depth} layers": replace(SIZES["8b"], layers=depth) for depth in DEPTHS}
    rows = [train(name, shape, device) for name, shape in sizes.items()]
    lines = []
    for row in rows:
        memory = "" if row["memory_gb"] is None else f"{row['memory_gb']:.1f} GB, "
        steps = ", ".join(f"{seconds:.1f}" for seconds in row["steps_s"])
        lines.append(
            f"{row['model']:14}{row['tokens']:9,} tokens, steps of {steps} s, {memory}{row['tflops_per_s']:.3f} TFLOP/s"
        )
    report(
        options,
        lines,
        {
            "name": "longest",
            "value": rows[0]["steps_s"][-1],
            "unit": "s per training step on one sample",
            "baseline": rows[0]["steps_s"][0],
            "ratio": round(rows[0]["steps_s"][-1] / rows[0]["steps_s"][0], 3),
            "rows": rows,
            "layer_of_8b": one_layer(rows[1:]),
            "device": device_name(),
        },
    )


def train(name: str, shape: ModelShape, device: torch.device) -> dict[str, Any]:
    groups = single_process_groups(device)
    computed = torch.bfloat16 if ON_GPU else torch.float32
    run = FlowRun(run_dir="unused", steps=STEPS, data=DataConfig(path="unused"))
    model = build_model(
        shape, groups, seed=0, compute_dtype=computed, recompute=RecomputeConfig(policy="full"), compute=run.compute
    )
    trainer = Trainer(model, groups, run, computed)
    generator = torch.Generator().manual_seed(0)
    sample = Sample(
        "longest",
        torch.randn(shape.latent_channels, *LATENT, generator=generator),
        torch.randn(TEXT_TOKENS, shape.text_width, generator=generator),
    )
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    steps_s = []
    for step in range(STEPS):
        pack = pack_training(
            [sample], seed=0, step=step, flow=FlowConfig(), caption_dropout=0.0, null_text=sample.text, shape=shape
        )
        flops = training_flops(pack.real_tokens, TEXT_TOKENS, shape)
        began = time.perf_counter()
        batch = StepBatch(step, [pack], pack.real_tokens, 1, flops, step)
        result = trainer.step(batch)  # ends with figures on the host
        steps_s.append(round(time.perf_counter() - began, 2))
        assert result.loss == result.loss, "the loss is not a number"
    peak = peak_flops(device_name(), "bf16")
    return {
        "model": name,
        "tokens": pack.real_tokens,
        "steps_s": steps_s,
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if ON_GPU else None,
        "tflops_per_s": round(flops / steps_s[-1] / 1e12, 4),
        "mfu": None if peak is None else round(flops / steps_s[-1] / peak, 4),
    }


def one_layer(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """Seconds and gigabytes of one more layer of 8B's width."""
    if not rows:
        return None
    shallow, deep = rows
    more = DEPTHS[1] - DEPTHS[0]
    return {
        "s": round((deep["steps_s"][-1] - shallow["steps_s"][-1]) / more, 2),
        "gb": round((deep["memory_gb"] - shallow["memory_gb"]) / more, 2),
    }


if __name__ == "__main__":
    main()
