"""Runs of the tiny model on real ranks, with faults planted: what the tests of stops, bad steps and audits share."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from goku_mega.config.training import AuditConfig, CheckpointConfig, DataConfig, FlowRun, OptimizerConfig

STEPS = 6


def make_run(dataset: Path, run_dir: Path, *, every: int = 0, save_every: int = 3, **changes: Any) -> FlowRun:
    run = FlowRun(
        run_dir=str(run_dir),
        steps=STEPS,
        precision="fp32",
        data=DataConfig(path=str(dataset), samples_per_step=6, max_tokens_per_rank=300),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=save_every),
        audit=AuditConfig(every_steps=every),
    )
    return replace(run, **changes)


def skipping(run: FlowRun, *positions: int) -> FlowRun:
    return replace(run, data=replace(run.data, skip_steps=positions))


def train_with(rank: int, run: FlowRun, fault: Callable[..., None] | None, *args: Any) -> Any:
    """What `train` returns, or the fault that it raises: (exit code, report, message)."""
    import goku_mega.train.loop as loop
    from goku_mega.errors import RunFault

    original = loop.Trainer.step

    def step(self: Any, batch: Any) -> Any:
        if fault is not None:
            fault(self, batch, rank, *args)
        return original(self, batch)

    loop.Trainer.step = step  # type: ignore[method-assign]
    try:
        return loop.train(run)
    except RunFault as error:
        return error.exit_code, error.report, str(error)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir)]


def committed(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_????????"))


def flip_bit(trainer: Any, batch: Any, rank: int, victim: int, at_step: int, part: str) -> None:
    """As a cosmic ray would, between two updates."""
    import torch

    if rank == victim and batch.step == at_step:
        shard = next(shard for shard in trainer.state[part].values() if shard.tensor.numel() > 8)
        shard.tensor.flatten().view(torch.int32)[5] ^= 1 << 12


def flip_replica(trainer: Any, batch: Any, rank: int, victim: int, at_step: int) -> None:
    """One bit of one replica's weights, and the seal on it: as an update that computed wrongly would leave it."""
    flip_bit(trainer, batch, rank, victim, at_step, "model")
    if rank == victim and batch.step == at_step:
        trainer.audit.seal()


def compute_wrongly(trainer: Any, batch: Any, rank: int, victim: int, at_step: int) -> None:
    """From a step on, what the victim's last layer gives is a little off."""
    if rank == victim and batch.step == at_step:
        layer = trainer.model.module.final_layer
        layer.register_forward_hook(lambda module, inputs, output: output + 1e-3)


def spoil(trainer: Any, batch: Any, rank: int, victim: int, data_step: int, value: float) -> None:
    """The victim's samples of one position of the data lead to a loss or a gradient of `value`."""
    if rank == victim and batch.data_step == data_step:
        batch.micro_batches[0].packed.patches.fill_(value)  # the first pipeline stage's
        batch.micro_batches[0].velocity.fill_(value)  # the last one's


def ask_to_stop(trainer: Any, batch: Any, rank: int, victim: int, at_step: int, kind: str) -> None:
    """The agent of one rank's node asks."""
    if rank == victim and batch.step == at_step:
        trainer.control.request_stop(kind)


def with_own_control(rank: int, run: FlowRun, folder: str, *args: Any) -> Any:
    """As `train_with` under agents: each rank on a node of its own."""
    os.environ["GOKU_HEARTBEATS"] = f"{folder}/node{rank}"
    return train_with(rank, run, ask_to_stop, *args)
