"""Packed batches ahead of the step that needs them, read and packed in a thread.

The loader's whole state is the step: epoch and place in it follow.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

import torch

from goku_mega.config.training import FlowRun
from goku_mega.data.packing import TrainingBatch, pack_training
from goku_mega.data.planner import Planner, data_step
from goku_mega.data.shards import Index, ShardReader
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.groups import Groups


class StepBatch(NamedTuple):
    """What one rank needs for one step."""

    step: int
    micro_batches: list[TrainingBatch]
    """This data-parallel rank's packs; as many on every rank."""
    total_tokens: int
    """Real tokens of the global batch."""
    samples: int
    """Samples of the global batch."""
    flops: int
    """Model FLOPs of the global batch."""
    data_step: int
    """The position in the data's order that the samples, their noise and their times are of."""
    to_audit: Sequence[TrainingBatch] = ()
    """The first packs of the next data-parallel rank, in steps that are audited."""


class Loader:
    """Iterates over the steps from `start_step` to the run's last; a context manager that ends its thread."""

    def __init__(
        self, index: Index, run: FlowRun, shape: ModelShape, *, groups: Groups, start_step: int, dtype: torch.dtype
    ) -> None:
        self.run = run
        self.shape = shape
        self.groups = groups
        self.dtype = dtype
        self.reader = ShardReader(index)
        self.tokens, self.flops = index.tokens(shape), index.flops(shape)
        self.planner = Planner(
            self.flops, self.tokens, seed=run.seed, samples_per_step=run.data.samples_per_step,
            keys=[row.key for row in index.rows],
        )  # fmt: skip
        self.wait_s = 0.0
        """Seconds the last step waited for its batch."""
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(max(1, run.data.prefetch_steps))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(start_step,), daemon=True)
        self._start_step = start_step

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(0.05)
        self.reader.close()

    def __iter__(self) -> Iterator[StepBatch]:
        for _ in range(self._start_step, self.run.steps):
            began = time.monotonic()
            item = self._ready.get()
            self.wait_s = time.monotonic() - began
            if isinstance(item, BaseException):
                raise item
            yield item

    def load(self, step: int) -> StepBatch:
        """Read and pack this rank's samples of a step."""
        run, layout = self.run, self.groups.layout
        position = data_step(step, run.data.skip_steps)
        plan = self.planner.plan(
            position, dp_ranks=layout.dp, max_tokens_per_rank=run.data.max_tokens_per_rank,
            micro_batch_multiple=layout.micro_batch_multiple,
        )  # fmt: skip
        batch, packs = list(plan.batch), plan.micro_batches[self.groups.dp_rank]
        following = plan.micro_batches[(self.groups.dp_rank + 1) % layout.dp]
        to_audit = following[: layout.micro_batch_multiple] if run.audit.due(step) else ()
        return StepBatch(
            step, [self._pack(pack, position) for pack in packs], int(self.tokens[batch].sum()), len(batch),
            int(self.flops[batch].sum()), position, [self._pack(pack, position) for pack in to_audit],
        )  # fmt: skip

    def _pack(self, numbers: Sequence[int], position: int) -> TrainingBatch:
        run = self.run
        return pack_training(
            [self.reader.read(number) for number in numbers],
            seed=run.seed, step=position, flow=run.flow, caption_dropout=run.data.caption_dropout,
            null_text=self.reader.null_text, shape=self.shape, layout=self.groups.layout,
            cp_rank=self.groups.cp_rank, token_multiple=run.compute.token_multiple, dtype=self.dtype,
        )  # fmt: skip

    def _fill(self, start_step: int) -> None:
        try:
            for step in range(start_step, self.run.steps):
                self._put(self.load(step))
                if self._stop.is_set():
                    return
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _drain(self) -> None:
        while not self._ready.empty():
            self._ready.get_nowait()
