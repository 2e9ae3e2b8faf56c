"""Training of the flow: assembly on one page, then the step on one screen.

The phases of a step (data, forward, backward, optimizer, checkpoint) carry the same names in the
heartbeat, the metrics and the operator's status page.
"""

import json
import logging
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from goku_infra.heartbeat import Heartbeat
from goku_mega import environment
from goku_mega.checkpoint.load import Stored, fill, load_newest
from goku_mega.checkpoint.save import Saver
from goku_mega.checkpoint.state import State
from goku_mega.config import FlowRun, Precision
from goku_mega.data.loader import Loader, StepBatch
from goku_mega.data.packing import TrainingBatch
from goku_mega.data.shards import Index, load_index
from goku_mega.errors import ConfigError
from goku_mega.flow.path import velocity_loss
from goku_mega.interchange.initial import initialise_from
from goku_mega.model.sizes import ModelShape, model_shape
from goku_mega.parallel.groups import Groups, build_groups, initialise_distributed
from goku_mega.parallel.layout import resolve
from goku_mega.parallel.parallelize import ParallelModel, build_model, gradient_norm, sum_partial_gradients
from goku_mega.parallel.pipeline import Loss, ModelCall, forward_backward
from goku_mega.plan.activations import Numerics
from goku_mega.plan.devices import USABLE_SHARE, host_memory_bytes, peak_flops, process_bytes
from goku_mega.plan.fit import Device, decide_recompute
from goku_mega.train.ema import ShardedEMA
from goku_mega.train.metrics import MetricsLog
from goku_mega.train.optimizer import ShardedOptimizer

logger = logging.getLogger(__name__)

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_dir", "steps", "layout", "checkpoint", "threads_per_rank", "precision",
        "recompute", "compute", "ignore_plan",
    }
)  # fmt: skip
"""Settings that leave a run the same run; the others decide its samples, noise or updates."""


class StepResult(NamedTuple):
    """What one step was: global figures, the same on every rank."""

    loss: float
    gradient_norm: float
    learning_rate: float


class Trainer:
    """A model with its optimizer and average: everything that a step changes and a checkpoint keeps."""

    def __init__(self, model: ParallelModel, groups: Groups, run: FlowRun, dtype: torch.dtype) -> None:
        """
        Args:
            dtype: type of the matrix products, and so of the model's inputs.
        """
        self.model = model
        self.groups = groups
        self.dtype = dtype
        self.optimizer = ShardedOptimizer(model, groups, run.optimizer, run.steps)
        self.ema = ShardedEMA(model.shards, run.optimizer.ema_decay)
        self.heartbeat: Heartbeat | None = None
        self.saver: Saver | None = None
        self.fence_s = 0.0
        """How long the last step waited for a save to have copied its tensors."""

    @property
    def state(self) -> State:
        """What a checkpoint holds, as this rank's boxes."""
        return {"model": self.model.shards, "ema": self.ema.shards, **self.optimizer.moments()}

    def step(self, batch: StepBatch) -> StepResult:
        """One update from this rank's micro-batches."""
        step = batch.step
        self.model.start_step()
        loss = forward_backward(
            self.model.chunks, self.groups, batch.micro_batches, [len(m.loss_weight) for m in batch.micro_batches],
            partial(self.forward, batch), self.dtype,
        )  # fmt: skip
        self.beat(step, "optimizer")
        sum_partial_gradients(self.model, self.groups)
        norm = gradient_norm(self.model, self.groups)
        if self.saver is not None:
            self.fence_s = self.saver.fence()  # what is being saved must be copied before it changes
        rate = self.optimizer.step(step, self.model.gradients(), norm)
        self.ema.update(step)
        for group in (self.groups.data, self.groups.pp):
            dist.all_reduce(loss, group=group)
        return StepResult(loss.item(), norm.item(), rate)

    def forward(self, batch: StepBatch, model: ModelCall, micro_batch: TrainingBatch) -> tuple[Tensor, Loss]:
        """A micro-batch through `model`: what it gave, and the loss of a velocity.

        The phase is "backward" from here to the next forward, and so while a stage waits for its neighbours.
        """
        self.beat(batch.step, "forward")
        micro = micro_batch.to(self.groups.device, self.dtype)
        output = model(micro.packed)
        self.beat(batch.step, "backward")
        return output, lambda velocity: velocity_loss(velocity, micro.velocity, micro.loss_weight, batch.total_tokens)

    def beat(self, step: int, phase: str) -> None:
        """Tell the operator's page where this rank is."""
        if self.heartbeat is not None:
            self.heartbeat.beat(step, phase)


def train(run: FlowRun) -> dict[str, Any]:
    """Train until `run.steps`, from the newest intact checkpoint in `run.run_dir` if there is one.

    Raises:
        UserError: the recipe, the data, the layout or a checkpoint does not fit.
    """
    device = initialise_distributed(run.threads_per_rank)
    index = load_index(Path(run.data.path))
    shape = model_shape(run.size, latent_channels=index.latent_channels, text_width=index.text_width)
    layout = resolve(run.layout, dist.get_world_size(), shape)
    stored, computed = dtypes(run.precision, device)
    lengths = zip(index.tokens(shape).tolist(), (row.text_tokens for row in index.rows), strict=True)
    recompute = decide_recompute(run, shape, layout, lengths, planned_device(run, device, stored, computed))
    groups = build_groups(layout, device)
    model = build_model(
        shape, groups, seed=run.seed, dtype=stored, compute_dtype=computed, recompute=recompute, compute=run.compute
    )
    trainer = Trainer(model, groups, run, computed)
    start_step = resume(trainer, run, shape)
    if start_step >= run.steps:
        logger.info("%s has reached step %d already", run.run_dir, start_step)
        return {"run_dir": run.run_dir, "step": start_step, "resumed_from": start_step}

    run_dir, rank = Path(run.run_dir), dist.get_rank()
    info = describe(run, shape, index, str(layout))
    with ExitStack() as stack:
        trainer.heartbeat = stack.enter_context(Heartbeat(run_dir / "heartbeats", rank, layout.world_size))
        loader = stack.enter_context(Loader(index, run, shape, groups=groups, start_step=start_step, dtype=stored))
        metrics = stack.enter_context(
            MetricsLog(run_dir, is_main=rank == 0, start_step=start_step, total_steps=run.steps)
        )
        keep = run.checkpoint
        trainer.saver = saver = stack.enter_context(
            Saver(
                checkpoints(run), trainer.state,
                keep=keep.keep, keep_every=keep.keep_every_steps, keep_best=keep.keep_best,
                node_folder=keep.node_folder, store_every=keep.store_every,
            )
        )  # fmt: skip
        clock = StepClock(peak_flops_of_job(device, computed, layout.world_size))
        trainer.beat(start_step, "data")
        saving_s, losses = 0.0, []
        for batch in loader:
            result = trainer.step(batch)
            losses.append(result.loss)
            # The row comes first: a checkpoint whose steps are not all in the metrics would lose them at a kill.
            metrics.record(
                clock.row(batch, result, data_s=loader.wait_s, checkpoint_s=saving_s + trainer.fence_s)
                | {"checkpoint_failures": saver.failures, "checkpoint_waits": saver.waits}
            )
            steps_done, saving_s = batch.step + 1, 0.0
            if steps_done % run.checkpoint.every_steps == 0 or steps_done == run.steps:
                trainer.beat(steps_done, "checkpoint")
                saving_s = saver.save(steps_done, {**info, "loss": statistics.fmean(losses)})
                losses.clear()
            trainer.beat(steps_done, "data")
    return {"run_dir": run.run_dir, "step": run.steps, "resumed_from": start_step, "loss": result.loss}


class StepClock:
    """Turns steps into the figures of a metrics row; time runs from row to row."""

    def __init__(self, peak: float | None) -> None:
        self.peak = peak
        self.began = time.monotonic()

    def row(self, batch: StepBatch, result: StepResult, *, data_s: float, checkpoint_s: float) -> dict[str, Any]:
        """Global figures of the step just taken; `mfu` is None where the device's peak is unknown."""
        now = time.monotonic()
        step_s, self.began = now - self.began, now
        real = sum(micro.real_tokens for micro in batch.micro_batches)
        padded = sum(micro.padded_tokens for micro in batch.micro_batches)
        return {
            "step": batch.step,
            **result._asdict(),
            "samples": batch.samples,
            "tokens": batch.total_tokens,
            "samples_per_s": batch.samples / step_s,
            "tokens_per_s": batch.total_tokens / step_s,
            "model_tflops_per_s": batch.flops / step_s / 1e12,
            "mfu": None if self.peak is None else batch.flops / step_s / self.peak,
            "real_token_share": real / padded,
            "step_s": step_s,
            "data_s": data_s,
            "checkpoint_s": checkpoint_s,
            "time_s": time.time(),
        }


def peak_flops_of_job(device: torch.device, computed: torch.dtype, world_size: int) -> float | None:
    """FLOP/s of all devices together, where the device is known."""
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device), "bf16" if computed == torch.bfloat16 else "fp32")
    return None if peak is None else peak * world_size


def resume(trainer: Trainer, run: FlowRun, shape: ModelShape) -> int:
    """Fill the trainer from the run's newest intact checkpoint; the steps it has taken, 0 for a new run.

    Raises:
        CheckpointError: every checkpoint is damaged, or holds another model.
        ConfigError: the checkpoint was made with settings that make it another run.
    """

    def load(stored: Stored) -> None:
        check_same_run(run, stored.info["run"], str(stored.folder))
        fill(stored, trainer.state, model=describe_model(run.size, shape))

    loaded = load_newest(checkpoints(run), load, node_folder=run.checkpoint.node_folder)
    if loaded is None:
        begin(trainer, run)
        return 0
    newest, _ = loaded
    step = int(newest.info["step"])
    trainer.optimizer.resume_at(step)
    logger.info("resumed from %s (saved by %s)", newest.folder, newest.info["layout"])
    return step


def begin(trainer: Trainer, run: FlowRun) -> None:
    """A new run: weights from the seed, or those that `run.init` names. The average starts where the weights do.

    Raises:
        CheckpointError: that checkpoint is damaged, or does not fit the model.
    """
    if run.init.checkpoint:
        loaded = initialise_from(
            run.init.checkpoint, trainer.model.shards, weights=run.init.weights, fresh=run.init.fresh
        )
        trainer.ema.restart()
        logger.info("starts from %s", loaded)


def check_same_run(run: FlowRun, saved: dict[str, Any], checkpoint: str) -> None:
    """Refuse to go on with settings under which the samples, the noise or the updates would differ."""
    for name, value in json.loads(json.dumps(asdict(run))).items():  # as `saved` was: tuples are lists there
        if name not in MAY_CHANGE_ON_RESUME and value != saved.get(name):
            raise ConfigError(
                f"{name} is {value} but {checkpoint} was trained with {saved.get(name)}; "
                "set it back, or give another run_dir"
            )


def describe(run: FlowRun, shape: ModelShape, index: Index, layout: str) -> dict[str, Any]:
    """What is kept beside a checkpoint's tensors: enough to resume it, to sample from it and to explain it."""
    return {
        "run": asdict(run),
        "model": describe_model(run.size, shape),
        "layout": layout,
        "dataset": {**index.dataset, "path": str(Path(run.data.path).resolve())},
    }


def describe_model(size: str, shape: ModelShape) -> dict[str, Any]:
    return {"size": size, **asdict(shape)}


def checkpoints(run: FlowRun) -> str:
    """The folder of the run's checkpoints, a path or a URL."""
    return run.checkpoint.store or str(Path(run.run_dir) / "checkpoints")


def planned_device(run: FlowRun, device: torch.device, stored: torch.dtype, computed: torch.dtype) -> Device:
    """What the plan takes a rank to have: its GPU, or its share of its host's memory.

    The least of any rank's, so that all decide alike: one that alone recomputed or refused would leave the others
    waiting in a collective.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        name = torch.cuda.get_device_name(device)
        memory, process = torch.cuda.get_device_properties(device).total_memory * USABLE_SHARE, 0.0
    else:
        name = "a rank's share of this host"
        memory, process = host_memory_bytes() / environment.local_world_size(), process_bytes()
    least = torch.tensor([memory, -process], dtype=torch.float64)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    numerics = Numerics(stored.itemsize, computed.itemsize, gpu=on_gpu, fused=on_gpu and run.compute.fused == "auto")
    return Device(name, least[0].item(), numerics, -least[1].item())


def dtypes(precision: Precision, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Types of the stored parameters and of the matrix products."""
    if precision == "fp64":
        return torch.float64, torch.float64
    on_gpu = device.type == "cuda"
    if precision == "bf16" or (precision == "auto" and on_gpu):
        return torch.float32, torch.bfloat16
    return torch.float32, torch.float32
