"""Which samples each rank trains on at a step: a pure function of (seed, step, index). No torch.

An epoch is a permutation cut into batches of equal FLOPs. The batch of a step never depends on the
layout; only its distribution over the ranks does. So the loader's whole state is the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from goku_mega.errors import DataError
from goku_mega.seeding import derive_seed

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepPlan:
    """The samples of one step, by their numbers in the index."""

    epoch: int
    batch: tuple[int, ...]
    """The global batch in the epoch's order."""
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """[data-parallel rank][micro-batch] -> samples; every rank has the same number of micro-batches."""


class Planner:
    """Plans steps over an index; remembers the current epoch's order, nothing else."""

    def __init__(
        self, costs: Sequence[int] | Ints, tokens: Sequence[int] | Ints, *, seed: int, samples_per_step: int,
        keys: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """
        Args:
            costs: FLOPs of each sample.
            tokens: tokens of each sample.
            samples_per_step: samples of a global batch, on average.
            keys: names of the samples, for messages.
        """
        self.costs = np.asarray(costs, dtype=np.float64)
        self.tokens = np.asarray(tokens, dtype=np.int64)
        self.seed = seed
        self.keys = keys
        # No batch may be empty, so none is smaller than the dearest sample.
        most = int(self.costs.sum() // self.costs.max())
        self.batches_per_epoch = max(1, min(round(len(self.costs) / samples_per_step), most))
        self._epoch: tuple[int, list[Ints]] = (-1, [])

    def plan(self, step: int, *, dp_ranks: int, max_tokens_per_rank: int) -> StepPlan:
        """The plan of a step.

        Raises:
            DataError: one sample, of this step or another, is longer than `max_tokens_per_rank`.
        """
        epoch, number = divmod(step, self.batches_per_epoch)
        batch = self._batches(epoch)[number]
        longest = int(np.argmax(self.tokens))  # of all samples: a run learns of it at its first step
        if self.tokens[longest] > max_tokens_per_rank:
            name = self.keys[longest] if self.keys else f"number {longest}"
            raise DataError(
                f"sample {name} has {self.tokens[longest]} tokens, above data.max_tokens_per_rank="
                f"{max_tokens_per_rank}; raise the cap, split it with layout.cp, or leave the sample out"
            )
        return StepPlan(epoch, tuple(batch.tolist()), self._distribute(batch, dp_ranks, max_tokens_per_rank))

    def _batches(self, epoch: int) -> list[Ints]:
        """The epoch's batches: a permutation cut where the cumulative cost passes equal shares.

        A sample belongs to the share that the middle of its cost falls in, so every sample is in
        exactly one batch, and all batches cost the same to within a sample.
        """
        if self._epoch[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=derive_seed(self.seed, "order", epoch)))
            order = rng.permutation(len(self.costs))
            costs = self.costs[order]
            middles = np.cumsum(costs) - costs / 2
            share = np.floor(middles / costs.sum() * self.batches_per_epoch).astype(np.int64)
            before = np.arange(1, self.batches_per_epoch)
            # A middle on the edge of two shares can round to the wrong one and leave a batch empty.
            spare = np.maximum.accumulate(np.searchsorted(share, before) - before)
            self._epoch = (epoch, np.split(order, before + spare.clip(0, len(order) - self.batches_per_epoch)))
        return self._epoch[1]

    def _distribute(self, batch: Ints, dp_ranks: int, cap: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Fewest micro-batches a rank whose tokens stay under the cap, balanced by cost."""
        micro = max(1, -(-int(self.tokens[batch].sum()) // (cap * dp_ranks)))
        while (bins := self._balance(batch, dp_ranks * micro, cap)) is None:
            micro += 1
        return tuple(tuple(bins[rank * micro : (rank + 1) * micro]) for rank in range(dp_ranks))

    def _balance(self, batch: Ints, count: int, cap: int) -> list[tuple[int, ...]] | None:
        """Longest processing time first: the dearest sample left goes to the cheapest bin with room."""
        costs, tokens = np.zeros(count), np.zeros(count, dtype=np.int64)
        bins: list[list[int]] = [[] for _ in range(count)]
        for sample in batch[np.argsort(-self.costs[batch], kind="stable")]:
            room = np.flatnonzero(tokens + self.tokens[sample] <= cap)
            if not len(room):
                return None
            chosen = int(room[np.argmin(costs[room])])
            bins[chosen].append(int(sample))
            costs[chosen] += self.costs[sample]
            tokens[chosen] += self.tokens[sample]
        return [tuple(samples) for samples in bins]
