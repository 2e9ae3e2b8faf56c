"""Which samples each rank trains on at a step: a pure function of (seed, step, index). No torch.

An epoch is a permutation cut into batches of equal FLOPs: batches follow the permutation, so no sample is put
off, not by one step. The batch of a step never depends on the layout; only its distribution over the
ranks does. So the loader's whole state is the step.

FSDP's collectives tie the ranks at every micro-batch, so a step costs the sum over the micro-batches of the dearest
rank's pack. That sum is what the distribution makes small. All sums are of whole numbers: every machine makes the
same plan.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from goku_mega.errors import DataError
from goku_mega.seeding import derive_seed

Ints = NDArray[np.int64]

DEAREST = 2**24
"""Cost of the index's dearest sample in the planner's units: a step's sum fits 64 bits whatever the model."""

TOLERANCE = 1 / 1024
"""Imbalance below which no better distribution is looked for."""


@dataclass(frozen=True)
class StepPlan:
    """The samples of one step, by their numbers in the index."""

    epoch: int
    batch: tuple[int, ...]
    """The global batch in the epoch's order."""
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """[data-parallel rank][micro-batch] -> samples, the dearest micro-batch first; every rank has the same number."""


def data_step(step: int, skip_steps: Collection[int]) -> int:
    """The position of the data's order that a step trains on: the `step`-th that is not left out."""
    position = step
    for skipped in sorted(set(skip_steps)):
        if skipped > position:
            break
        position += 1
    return position


def same_history(steps: int, skipped_there: Collection[int], skipped_here: Collection[int]) -> bool:
    """Whether `steps` steps took the same positions under both lists."""
    seen = data_step(steps - 1, skipped_there) if steps else -1
    return {step for step in skipped_there if step <= seen} == {step for step in skipped_here if step <= seen}


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
        relative = np.asarray(costs, dtype=np.float64) / np.max(costs)
        self.costs = np.maximum(1, np.rint(relative * DEAREST)).astype(np.int64)
        self.tokens = np.asarray(tokens, dtype=np.int64)
        self.seed = seed
        self.keys = keys
        # No batch may be empty, so none is smaller than the dearest sample.
        most = int(self.costs.sum()) // DEAREST
        self.batches_per_epoch = max(1, min(round(len(self.costs) / samples_per_step), most))
        self._epoch: tuple[int, list[Ints]] = (-1, [])

    def plan(self, step: int, *, dp_ranks: int, max_tokens_per_rank: int, micro_batch_multiple: int = 1) -> StepPlan:
        """The plan of a step; a rank's micro-batches are a multiple of `micro_batch_multiple`, some perhaps empty.

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
        columns = (self.costs[batch].tolist(), self.tokens[batch].tolist(), batch.tolist())
        samples = [_Sample(*row) for row in zip(*columns, strict=True)]
        micro_batches = _distribute(samples, dp_ranks, max_tokens_per_rank, micro_batch_multiple)
        return StepPlan(epoch, tuple(batch.tolist()), micro_batches)

    def _batches(self, epoch: int) -> list[Ints]:
        """The epoch's batches: a permutation cut where the cumulative cost passes equal shares.

        A sample belongs to the share that the middle of its cost falls in, so every sample is in
        exactly one batch, and all batches cost the same to within a sample.
        """
        if self._epoch[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=derive_seed(self.seed, "order", epoch)))
            order = rng.permutation(len(self.costs))
            ends = np.cumsum(self.costs[order])
            twice_middles = 2 * ends - self.costs[order]
            # Twice the shares' edges, k x total / batches rounded up, without a product that passes 64 bits.
            whole, rest = divmod(2 * int(ends[-1]), self.batches_per_epoch)
            before = np.arange(1, self.batches_per_epoch)
            edges = before * whole - (-before * rest // self.batches_per_epoch)
            self._epoch = (epoch, np.split(order, np.searchsorted(twice_middles, edges)))
        return self._epoch[1]


class _Sample(NamedTuple):
    cost: int
    tokens: int
    number: int


_Pack = list[_Sample]


def _distribute(
    samples: list[_Sample], dp_ranks: int, cap: int, multiple: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """[rank][micro-batch] -> samples: as few micro-batches, in multiples, as the cap allows."""
    tokens = sum(sample.tokens for sample in samples)
    micro = max(1, -(-tokens // (cap * dp_ranks * multiple))) * multiple
    while (packs := _balance(samples, dp_ranks, micro, cap)) is None:
        micro += multiple
    packs.sort(key=_cost, reverse=True)
    ranks: list[list[_Pack]] = [[] for _ in range(dp_ranks)]
    totals = [0] * dp_ranks
    for first in range(0, len(packs), dp_ranks):
        # Packs of like cost are one micro-batch; in it the dearest pack meets the cheapest total.
        by_total = sorted(range(dp_ranks), key=totals.__getitem__)
        for pack, rank in zip(packs[first : first + dp_ranks], by_total, strict=True):
            ranks[rank].append(pack)
            totals[rank] += _cost(pack)
    return tuple(tuple(tuple(sample.number for sample in pack) for pack in of_rank) for of_rank in ranks)


def _balance(samples: list[_Sample], dp_ranks: int, micro: int, cap: int) -> list[_Pack] | None:
    """Packs for every rank's micro-batches, under the token cap, whose step costs least; None where they do not fit.

    First the longest processing time rule (Graham 1969), which is near perfect where samples are many and alike.
    Then MULTIFIT (Coffman, Garey, Johnson 1978): bisect to the lowest cost a pack may have for the samples to fit.
    """
    ordered = sorted(samples, key=lambda sample: sample.cost, reverse=True)
    count, total = dp_ranks * micro, _cost(ordered)
    packs = _fill(ordered, count, cap, total, spread=len(ordered)) or _fill(ordered, count, cap, total, spread=0)
    if packs is None:
        return None
    low = max(ordered[0].cost, -(-total // count))
    too_low, enough = low, max(map(_cost, packs))
    tried = [packs]
    if enough == low:  # one sample sets the limit: packs as dear as it leave less to the other micro-batches
        tried += _fits(ordered, count, cap, low)
    while enough - too_low > max(low * TOLERANCE, (enough - low) / 8):
        limit = (too_low + enough) // 2
        if (found := next(_fits(ordered, count, cap, limit), None)) is None:
            too_low = limit
        else:
            tried.append(found)
            enough = max(map(_cost, found))
    return min(tried, key=lambda packs: _step_cost(packs, dp_ranks))


def _fits(samples: list[_Sample], count: int, cap: int, limit: int) -> Iterator[list[_Pack]]:
    """Packs under both limits, for every way of filling them that finds room.

    Best fit alone puts the short samples, which have the most tokens for their cost, together into the last packs,
    where the cap leaves no room for them; so fits with the dearest samples spread over the packs come first.
    """
    for spread in (count * 3 // 2, count, 0):
        if (packs := _fill(samples, count, cap, limit, spread)) is not None:
            yield packs


def _fill(samples: list[_Sample], count: int, cap: int, limit: int, spread: int) -> list[_Pack] | None:
    """The first `spread` samples each go to the cheapest pack with room, the others to the dearest; None: no room."""
    packs: list[_Pack] = [[] for _ in range(count)]
    tokens = [0] * count
    by_cost = list(range(count))  # a pack's cost x count + its number, sorted: one number is compared faster than two
    for number, sample in enumerate(samples):
        room = cap - sample.tokens
        affordable = bisect_left(by_cost, (limit - sample.cost + 1) * count)
        for place in range(affordable) if number < spread else range(affordable - 1, -1, -1):
            pack = by_cost[place] % count
            if tokens[pack] <= room:
                break
        else:
            return None
        insort(by_cost, by_cost.pop(place) + sample.cost * count)
        packs[pack].append(sample)
        tokens[pack] += sample.tokens
    return packs


def _cost(pack: _Pack) -> int:
    return sum(sample.cost for sample in pack)


def _step_cost(packs: list[_Pack], dp_ranks: int) -> int:
    """Sum over the micro-batches of the dearest pack, where packs of like cost are one micro-batch."""
    return sum(sorted(map(_cost, packs), reverse=True)[::dp_ranks])
