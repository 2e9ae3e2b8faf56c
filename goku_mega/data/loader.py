"""Packed batches ahead of the step that needs them, read and packed in a thread.

The loader's whole state is the step: epoch and place in it follow. So is what will be read: the bytes of the steps
to come are asked for before they are packed, and never more of them than the settings say.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from goku_mega.config.training import DataConfig, FlowRun
from goku_mega.data.insisting import ReadCounts, ReadRules
from goku_mega.data.packing import TrainingBatch, pack_training
from goku_mega.data.planner import Planner, data_step
from goku_mega.data.shard_cache import RangeCache
from goku_mega.data.shard_store import open_store
from goku_mega.data.shards import Index, Sample, ShardReader
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.groups import Groups
from goku_mega.places import local_path


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


class _Ahead(NamedTuple):
    """A step whose samples are being read."""

    step: int
    position: int
    batch: list[int]
    micro_batches: Sequence[Sequence[int]]
    to_audit: Sequence[Sequence[int]]
    sample: Callable[[int], Sample]
    """Waits for a sample."""


class Loader:
    """Iterates over the steps from `start_step` to the run's last; a context manager that ends its thread."""

    def __init__(
        self, index: Index, run: FlowRun, shape: ModelShape, *, groups: Groups, start_step: int, dtype: torch.dtype
    ) -> None:
        self.run = run
        self.shape = shape
        self.groups = groups
        self.dtype = dtype
        index = index.repeated()
        self.reader = _reader(index, run.data)
        self.tokens, self.flops = index.tokens(shape), index.flops(shape)
        self.planner = Planner(
            self.flops, self.tokens, seed=run.seed, samples_per_step=run.data.samples_per_step,
            keys=[row.key for row in index.rows],
        )  # fmt: skip
        self.null_text = index.null_text
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
        self.reader.store.stop()
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

    @property
    def counts(self) -> ReadCounts:
        """What reading took so far."""
        return self.reader.store.counts

    def load(self, step: int) -> StepBatch:
        """Read and pack this rank's samples of a step."""
        return self._packed(self._start(step))

    def _start(self, step: int) -> _Ahead:
        """Plan a step and begin to read it."""
        run, layout, dp_rank = self.run, self.groups.layout, self.groups.dp_rank
        position = data_step(step, run.data.skip_steps)
        plan = self.planner.plan(
            position, dp_ranks=layout.dp, max_tokens_per_rank=run.data.max_tokens_per_rank,
            micro_batch_multiple=layout.micro_batch_multiple,
        )  # fmt: skip
        packs, following = plan.micro_batches[dp_rank], plan.micro_batches[(dp_rank + 1) % layout.dp]
        to_audit = following[: layout.micro_batch_multiple] if run.audit.due(step) else ()
        numbers = dict.fromkeys(number for pack in (*packs, *to_audit) for number in pack)
        return _Ahead(step, position, list(plan.batch), packs, to_audit, self.reader.start(list(numbers)))

    def _packed(self, ahead: _Ahead) -> StepBatch:
        tokens, flops = int(self.tokens[ahead.batch].sum()), int(self.flops[ahead.batch].sum())
        return StepBatch(
            ahead.step, [self._pack(pack, ahead) for pack in ahead.micro_batches], tokens, len(ahead.batch), flops,
            ahead.position, [self._pack(pack, ahead) for pack in ahead.to_audit],
        )  # fmt: skip

    def _pack(self, numbers: Sequence[int], ahead: _Ahead) -> TrainingBatch:
        run = self.run
        return pack_training(
            [ahead.sample(number) for number in numbers],
            seed=run.seed, step=ahead.position, flow=run.flow, caption_dropout=run.data.caption_dropout,
            null_text=self.null_text, shape=self.shape, layout=self.groups.layout,
            cp_rank=self.groups.cp_rank, token_multiple=run.compute.token_multiple, dtype=self.dtype,
        )  # fmt: skip

    def _fill(self, start_step: int) -> None:
        coming: deque[_Ahead] = deque()
        try:
            for step in range(start_step, self.run.steps):
                end = min(step + 1 + self.run.data.prefetch_steps, self.run.steps)
                coming.extend(self._start(later) for later in range(step + len(coming), end))
                self._put(self._packed(coming.popleft()))
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


def _reader(index: Index, data: DataConfig) -> ShardReader:
    cache = None
    if data.cache_folder and local_path(index.place) is None:
        cache = RangeCache(Path(data.cache_folder), int(data.cache_gb * 1e9), identity=index.identity)
    rules = ReadRules(data.read_retries, data.slow_read_s)
    return ShardReader(index, open_store(index.place, rules, threads=data.read_threads, cache=cache))
