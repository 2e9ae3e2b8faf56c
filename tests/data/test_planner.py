"""The plan: every sample once an epoch, in any layout, batches of equal cost, under the token cap."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.data.planner import Planner
from goku_mega.errors import DataError

sample_sets = st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 64)), min_size=1, max_size=120)
CAP = 10_000


def planner(samples, *, seed=0, samples_per_step=8) -> Planner:
    costs, tokens = zip(*samples, strict=True)
    return Planner(costs, tokens, seed=seed, samples_per_step=samples_per_step)


@settings(deadline=None, max_examples=60)
@given(samples=sample_sets, seed=st.integers(0, 5), per_step=st.integers(1, 40))
def test_every_sample_is_in_exactly_one_batch_of_an_epoch_and_no_batch_is_empty(samples, seed, per_step):
    plans = planner(samples, seed=seed, samples_per_step=per_step)
    for epoch in range(2):
        steps = range(epoch * plans.batches_per_epoch, (epoch + 1) * plans.batches_per_epoch)
        batches = [plans.plan(step, dp_ranks=1, max_tokens_per_rank=CAP) for step in steps]
        assert all(batch.epoch == epoch and batch.batch for batch in batches)
        assert sorted(number for batch in batches for number in batch.batch) == list(range(len(samples)))


@settings(deadline=None, max_examples=60)
@given(samples=sample_sets, ranks=st.integers(1, 9), cap=st.integers(64, 400), step=st.integers(0, 30))
def test_the_ranks_together_have_the_batch_and_nobody_passes_the_cap(samples, ranks, cap, step):
    plan = planner(samples).plan(step, dp_ranks=ranks, max_tokens_per_rank=cap)
    tokens = [sample[1] for sample in samples]
    assert len(plan.micro_batches) == ranks
    assert len({len(of_rank) for of_rank in plan.micro_batches}) == 1
    packs = [pack for of_rank in plan.micro_batches for pack in of_rank]
    assert sorted(number for pack in packs for number in pack) == sorted(plan.batch)
    assert all(sum(tokens[number] for number in pack) <= cap for pack in packs)


@settings(deadline=None, max_examples=30)
@given(samples=sample_sets, step=st.integers(0, 50))
def test_the_global_batch_does_not_depend_on_the_ranks_or_on_what_was_planned_before(samples, step):
    used = planner(samples)
    for earlier in range(step):
        used.plan(earlier, dp_ranks=3, max_tokens_per_rank=64)
    fresh = planner(samples).plan(step, dp_ranks=1, max_tokens_per_rank=CAP)
    assert used.plan(step, dp_ranks=4, max_tokens_per_rank=CAP).batch == fresh.batch


def test_batches_cost_the_same_to_within_a_sample():
    rng = np.random.default_rng(0)
    costs = rng.integers(10, 1000, 3000)
    plans = Planner(costs, np.ones_like(costs), seed=1, samples_per_step=32)
    totals = [
        costs[list(plans.plan(step, dp_ranks=1, max_tokens_per_rank=CAP).batch)].sum()
        for step in range(plans.batches_per_epoch)
    ]
    assert abs(np.array(totals) - costs.sum() / plans.batches_per_epoch).max() <= costs.max()


def test_ranks_of_a_mixed_batch_are_balanced():
    """Images and videos in one stream: the dearest rank has at most 5% more to do than the mean."""
    rng = np.random.default_rng(3)
    tokens = rng.choice([784, 3120, 12_480, 24_000], 400, p=[0.5, 0.2, 0.2, 0.1])
    costs = 24 * tokens * 1792**2 + 4 * tokens**2 * 1792
    plan = Planner(costs, tokens, seed=0, samples_per_step=160).plan(0, dp_ranks=8, max_tokens_per_rank=10**7)
    of_rank = np.array([costs[list(packs[0])].sum() for packs in plan.micro_batches])
    assert of_rank.max() / of_rank.mean() < 1.05


def test_two_epochs_have_different_orders_and_a_seed_repeats_them():
    samples = [(1, 1)] * 64
    batches = [planner(samples).plan(step, dp_ranks=1, max_tokens_per_rank=CAP).batch for step in (0, 8)]
    assert batches[0] != batches[1]
    assert planner(samples).plan(8, dp_ranks=1, max_tokens_per_rank=CAP).batch == batches[1]
    assert planner(samples, seed=1).plan(0, dp_ranks=1, max_tokens_per_rank=CAP).batch != batches[0]


@pytest.mark.parametrize("twos", [21, 22, 25, 38, 42, 98])
@pytest.mark.parametrize("seed", range(5))
def test_no_batch_is_empty_where_samples_end_exactly_on_the_edges_of_shares(twos, seed):
    plans = planner([(1, 1), *[(2, 1)] * twos, (1, 1)], seed=seed, samples_per_step=1)
    assert plans.batches_per_epoch == twos + 1
    plan = [plans.plan(step, dp_ranks=1, max_tokens_per_rank=CAP).batch for step in range(plans.batches_per_epoch)]
    assert all(plan)
    assert sorted(number for batch in plan for number in batch) == list(range(twos + 2))


def test_a_sample_above_the_cap_is_named_at_the_first_step():
    plans = Planner([9, 9, 9, 9], [10, 10, 90, 10], seed=0, samples_per_step=1, keys=["a", "b", "long", "c"])
    for step in range(4):
        with pytest.raises(DataError, match=r"sample long has 90 tokens.*max_tokens_per_rank=50"):
            plans.plan(step, dp_ranks=1, max_tokens_per_rank=50)


def test_planning_needs_no_torch():
    code = "import sys, goku_mega.data.planner; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
