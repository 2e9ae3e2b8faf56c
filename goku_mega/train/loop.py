"""Training of the flow: assembly on one page, then the step on one screen.

The phases of a step (data, forward, backward, optimizer, checkpoint) carry the same names in the
heartbeat, the metrics and the operator's status page.
"""

import gc
import json
import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from goku_infra.heartbeat import Control, Heartbeat, Stop, dump_stacks_on_signal
from goku_mega import environment
from goku_mega.checkpoint.load import Stored, fill, load_newest
from goku_mega.checkpoint.save import Saver
from goku_mega.checkpoint.state import State
from goku_mega.config.training import FlowRun, Precision
from goku_mega.data.loader import Loader, StepBatch
from goku_mega.data.packing import TrainingBatch
from goku_mega.data.planner import data_step, same_history
from goku_mega.data.shards import Index, load_index
from goku_mega.errors import ConfigError, OtherHistory, UnusableStep
from goku_mega.flow.path import velocity_loss
from goku_mega.interchange.initial import initialise_from
from goku_mega.model.sizes import ModelShape, model_shape
from goku_mega.parallel.groups import Groups, build_groups, initialise_distributed
from goku_mega.parallel.layout import resolve
from goku_mega.parallel.parallelize import ParallelModel, build_model, sum_partial_gradients
from goku_mega.parallel.pipeline import Loss, ModelCall, forward_backward
from goku_mega.places import full_place
from goku_mega.plan.activations import Numerics
from goku_mega.plan.devices import USABLE_SHARE, host_memory_bytes, peak_flops, process_bytes
from goku_mega.plan.fit import Device, decide_recompute
from goku_mega.train.agreement import agree, origins_of_unusable
from goku_mega.train.audit import Audit
from goku_mega.train.ema import ShardedEMA
from goku_mega.train.metrics import MetricsLog
from goku_mega.train.optimizer import ShardedOptimizer

logger = logging.getLogger(__name__)

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_dir", "steps", "layout", "checkpoint", "threads_per_rank", "precision",
        "recompute", "compute", "ignore_plan", "audit",
    }
)  # fmt: skip
"""Settings that leave a run the same run; the others decide its samples, noise or updates."""
READING = frozenset(
    {"skip_steps", "prefetch_steps", "read_threads", "read_retries", "slow_read_s", "cache_folder", "cache_gb"}
)
"""Settings of `data` that only say how it is read; what `skip_steps` may be is `check_same_history`'s."""


class StepResult(NamedTuple):
    """What one step was: global figures, the same on every rank."""

    loss: float
    gradient_norm: float
    learning_rate: float
    stop: Stop
    """What the ranks are to do after it."""


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
        self.control: Control | None = None
        self.saver: Saver | None = None
        self.audit: Audit | None = None
        self.fence_s = 0.0
        """How long the last step waited for a save to have copied its tensors."""
        self._losses: list[Tensor] = []

    @property
    def state(self) -> State:
        """What a checkpoint holds, as this rank's boxes."""
        return {"model": self.model.shards, "ema": self.ema.shards, **self.optimizer.moments()}

    def step(self, batch: StepBatch) -> StepResult:
        """One update from this rank's micro-batches.

        Raises:
            UnusableStep: on every rank and before anything has changed, if loss or gradients are not finite.
            CorruptState: likewise, if the audit of a rank has found something.
        """
        step = batch.step
        self.model.start_step()
        neighbours_loss = self.pipeline(batch, batch.to_audit, forward_only=True) if batch.to_audit else None
        self._losses.clear()
        loss = self.pipeline(batch, batch.micro_batches)
        self.beat(step, "optimizer")
        sum_partial_gradients(self.model, self.groups)
        agreed = agree(
            self.model, self.groups, loss,
            stop=self.control.stop_requested if self.control else "",
            suspicion=self.suspicion(batch, neighbours_loss),
        )  # fmt: skip
        if agreed.corrupt and self.audit is not None:
            raise self.audit.verdict(step)
        if not agreed.usable:
            ranks = origins_of_unusable(loss)
            raise UnusableStep(step, batch.data_step, agreed.loss, agreed.gradient_norm, ranks)
        if self.saver is not None:
            self.fence_s = self.saver.fence()  # what is being saved must be copied before it changes
        rate = self.optimizer.step(step, self.model.gradients(), agreed.norm)
        self.ema.update(step)
        if self.audit is not None:
            self.audit.seal()
        return StepResult(agreed.loss, agreed.gradient_norm, rate, agreed.stop)

    def pipeline(self, batch: StepBatch, packs: Sequence[TrainingBatch], *, forward_only: bool = False) -> Tensor:
        """Micro-batches through this rank's part of the model; its part of their losses, fp64 scalar."""
        with torch.set_grad_enabled(not forward_only):
            return forward_backward(
                self.model.chunks, self.groups, packs, [len(pack.loss_weight) for pack in packs],
                partial(self.forward, batch), self.dtype, forward_only=forward_only,
            )  # fmt: skip

    def forward(self, batch: StepBatch, model: ModelCall, micro_batch: TrainingBatch) -> tuple[Tensor, Loss]:
        """A micro-batch through `model`: what it gave, and the loss of a velocity.

        The phase is "backward" from here to the next forward, and so while a stage waits for its neighbours.
        """
        self.beat(batch.step, "forward")
        micro = micro_batch.to(self.groups.device, self.dtype)
        output = model(micro.packed)
        self.beat(batch.step, "backward")

        def loss_of(velocity: Tensor) -> Tensor:
            loss = velocity_loss(velocity, micro.velocity, micro.loss_weight, batch.total_tokens)
            self._losses.append(loss.detach())
            return loss

        return output, loss_of

    def suspicion(self, batch: StepBatch, neighbours_loss: Tensor | None) -> Tensor | None:
        """How many faults this rank's audit finds in a step whose gradients are there, scalar; None without one."""
        if self.audit is None:
            return None
        found = self.audit.verify()
        if neighbours_loss is not None:
            own_loss = sum(self._losses[: len(batch.to_audit)], torch.zeros_like(neighbours_loss))
            found = found + self.audit.compare_copies() + self.audit.compare_losses(own_loss, neighbours_loss)
        return found

    def beat(self, step: int, phase: str) -> None:
        """Tell the operator's page where this rank is."""
        if self.heartbeat is not None:
            self.heartbeat.beat(step, phase)


def train(run: FlowRun) -> dict[str, Any]:
    """Train until `run.steps`, from the newest intact checkpoint in `run.run_dir` if there is one.

    Raises:
        UserError: the recipe, the data, the layout or a checkpoint does not fit.
        RunFault: a step cannot be used, or numbers are corrupt; nothing of it was saved.
    """
    gc.freeze()  # what imports have made stays: a collection that looks through it costs tenths of a second
    with ExitStack() as stack:
        heartbeat = stack.enter_context(start_heartbeat(run))
        trainer, index, shape = assemble(run)
        trainer.heartbeat = heartbeat
        trainer.control = Control(heartbeat.path.parent) if environment.heartbeats() else None
        trainer.beat(0, "load")
        start_step = resume(trainer, run, shape)
        if start_step >= run.steps:
            logger.info("%s has reached step %d already", run.run_dir, start_step)
            return {"run_dir": run.run_dir, "step": start_step, "resumed_from": start_step}

        groups, layout, run_dir = trainer.groups, trainer.groups.layout, Path(run.run_dir)
        stored, computed = dtypes(run.precision, groups.device)
        trainer.audit = Audit(trainer.state, groups) if run.audit.every_steps else None
        loader = stack.enter_context(Loader(index, run, shape, groups=groups, start_step=start_step, dtype=stored))
        metrics = stack.enter_context(
            MetricsLog(run_dir, is_main=dist.get_rank() == 0, start_step=start_step, total_steps=run.steps)
        )
        trainer.saver = saver = stack.enter_context(start_saver(run, trainer.state))
        info = describe(run, shape, index, str(layout))
        clock = StepClock(peak_flops_of_job(groups.device, computed, layout.world_size))
        heartbeat.beat(start_step, "data", committed_step=start_step or None)
        saving_s, losses = 0.0, []
        for batch in loader:
            result = trainer.step(batch)
            losses.append(result.loss)
            # The row comes first: a checkpoint whose steps are not all in the metrics would lose them at a kill.
            metrics.record(
                clock.row(batch, result, data_s=loader.wait_s, checkpoint_s=saving_s + trainer.fence_s)
                | {"checkpoint_failures": saver.failures, "checkpoint_waits": saver.waits}
                | {"read_failures": loader.counts.failures, "slow_reads": loader.counts.slow}
            )
            steps_done, saving_s = batch.step + 1, 0.0
            is_last = steps_done == run.steps or result.stop == "save"
            if is_last or steps_done % run.checkpoint.every_steps == 0:
                trainer.beat(steps_done, "checkpoint")
                if trainer.audit is not None:
                    trainer.audit.check(steps_done)
                saving_s = saver.save(steps_done, {**info, "loss": statistics.fmean(losses)}, to_store=is_last)
                losses.clear()
            if result.stop:
                break
            heartbeat.beat(
                steps_done, "data",
                loss=result.loss, gradient_norm=result.gradient_norm, committed_step=saver.committed_step,
            )  # fmt: skip
        trainer.beat(steps_done, "checkpoint")  # leaving waits for the last one
    if result.stop:
        logger.info("stopped after step %d, as was asked; %s", steps_done,
                    "it is saved" if result.stop == "save" else "it is not saved")  # fmt: skip
    return {"run_dir": run.run_dir, "step": steps_done, "resumed_from": start_step, "loss": result.loss}


def start_heartbeat(run: FlowRun) -> Heartbeat:
    """This rank's record, from before there are process groups; and its stacks, where a supervisor wants them."""
    stacks = environment.stacks_file()
    if stacks is not None:
        dump_stacks_on_signal(stacks)
    folder = environment.heartbeats() or Path(run.run_dir) / "heartbeats"
    heartbeat = Heartbeat(folder, environment.rank(), environment.world_size(), environment.generation())
    heartbeat.beat(0, "start")
    return heartbeat


def assemble(run: FlowRun) -> tuple[Trainer, Index, ModelShape]:
    """The process groups of the run's layout and its model in them, with its initial weights; what it trains on."""
    device = initialise_distributed(run.threads_per_rank)
    index = load_index(run.data.path)
    shape = model_shape(run.size, latent_channels=index.latent_channels, text_width=index.text_width)
    layout = resolve(run.layout, dist.get_world_size(), shape)
    stored, computed = dtypes(run.precision, device)
    lengths = zip(index.tokens(shape).tolist(), (row.text_tokens for row in index.rows), strict=True)
    recompute = decide_recompute(run, shape, layout, lengths, planned_device(run, device, stored, computed))
    groups = build_groups(layout, device)
    model = build_model(
        shape, groups, seed=run.seed, dtype=stored, compute_dtype=computed, recompute=recompute, compute=run.compute
    )
    return Trainer(model, groups, run, computed), index, shape


def start_saver(run: FlowRun, state: State) -> Saver:
    """What saves the run as its settings say."""
    keep = run.checkpoint
    return Saver(
        checkpoints(run), state,
        keep=keep.keep, keep_every=keep.keep_every_steps, keep_best=keep.keep_best,
        node_folder=keep.node_folder, store_every=keep.store_every,
    )  # fmt: skip


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
            "data_step": batch.data_step,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": result.learning_rate,
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
        OtherHistory: every checkpoint was trained on positions of the data that are now to be left out, and older ones
            have been deleted.
    """
    steps: list[int] = []

    def load(stored: Stored) -> None:
        steps.append(int(stored.info["step"]))
        check_same_run(run, stored.info["run"], str(stored.folder))
        check_same_history(run, stored.info, str(stored.folder))
        fill(stored, trainer.state, model=describe_model(run.size, shape))

    try:
        loaded = load_newest(checkpoints(run), load, node_folder=run.checkpoint.node_folder)
    except OtherHistory as error:
        if min(steps) > run.checkpoint.every_steps:
            raise
        logger.warning("%s; beginning anew", error)  # the run was as young then that nothing was before
        loaded = None
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
        there = saved.get(name)
        if name == "data" and isinstance(there, dict):
            value, there = ({key: data[key] for key in data if key not in READING} for data in (value, there))
        if name not in MAY_CHANGE_ON_RESUME and value != there:
            raise ConfigError(
                f"{name} is {value} but {checkpoint} was trained with {there}; set it back, or give another run_dir"
            )


def check_same_history(run: FlowRun, info: dict[str, Any], checkpoint: str) -> None:
    """Refuse a checkpoint that has seen data which the run leaves out, or left out data which the run would see.

    Raises:
        OtherHistory: an older checkpoint may be from before that data.
        ConfigError: the run does not leave out what it left out when the checkpoint was made.
    """
    steps, there, here = int(info["step"]), info["run"]["data"].get("skip_steps", []), run.data.skip_steps
    if same_history(steps, there, here):
        return
    seen = data_step(steps - 1, there)
    if forgotten := sorted({position for position in there if position <= seen}.difference(here)):
        raise ConfigError(
            f"data.skip_steps is {list(here)} but {checkpoint} left out {there}; add {forgotten}, or give another "
            "run_dir"
        )
    added = sorted({position for position in here if position <= seen}.difference(there))
    raise OtherHistory(f"{checkpoint} was trained on the data of {added}, which data.skip_steps now leaves out")


def describe(run: FlowRun, shape: ModelShape, index: Index, layout: str) -> dict[str, Any]:
    """What is kept beside a checkpoint's tensors: enough to resume it, to sample from it and to explain it."""
    return {
        "run": asdict(run),
        "model": describe_model(run.size, shape),
        "layout": layout,
        "dataset": {**index.dataset, "path": full_place(run.data.path)},
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
