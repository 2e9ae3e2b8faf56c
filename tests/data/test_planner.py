"""The plan: every sample once an epoch, in any layout, batches of equal cost, under the token cap."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balance import by_planner, draw_mix, imbalance
from goku_mega.data.planner import Planner, data_step, same_history
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


@settings(deadline=None, max_examples=100)
@given(
    samples=sample_sets, ranks=st.integers(1, 8) | st.integers(9, 64), cap=st.integers(64, 400),
    step=st.integers(0, 30), multiple=st.integers(1, 4), per_step=st.integers(1, 100),
)  # fmt: skip
def test_the_ranks_together_have_the_batch_and_nobody_passes_the_cap(samples, ranks, cap, step, multiple, per_step):
    plan = planner(samples, samples_per_step=per_step).plan(
        step, dp_ranks=ranks, max_tokens_per_rank=cap, micro_batch_multiple=multiple
    )
    tokens = [sample[1] for sample in samples]
    assert len(plan.micro_batches) == ranks
    (micro_batches,) = {len(of_rank) for of_rank in plan.micro_batches}
    assert micro_batches % multiple == 0
    packs = [pack for of_rank in plan.micro_batches for pack in of_rank]
    assert sorted(number for pack in packs for number in pack) == sorted(plan.batch)
    assert all(sum(tokens[number] for number in pack) <= cap for pack in packs)


@settings(deadline=None, max_examples=30)
@given(samples=sample_sets, ranks=st.lists(st.integers(1, 64), min_size=1, max_size=4), cap=st.integers(64, 400))
def test_a_run_that_resumes_on_other_ranks_within_an_epoch_sees_every_sample_once(samples, ranks, cap):
    seen: list[int] = []
    for step in range(planner(samples).batches_per_epoch):
        # Every step a fresh planner, as after a restart, and other ranks under another cap.
        now, now_cap = ranks[step % len(ranks)], cap + step
        plan = planner(samples).plan(step, dp_ranks=now, max_tokens_per_rank=now_cap)
        seen += [number for of_rank in plan.micro_batches for pack in of_rank for number in pack]
    assert sorted(seen) == list(range(len(samples)))


@settings(deadline=None, max_examples=30)
@given(samples=sample_sets, step=st.integers(0, 50), others=st.lists(st.integers(0, 200), max_size=5))
def test_a_plan_does_not_depend_on_what_was_planned_before_nor_its_batch_on_the_ranks(samples, step, others):
    used = planner(samples)
    for other in others:
        used.plan(other, dp_ranks=3, max_tokens_per_rank=64)
    fresh = planner(samples)
    assert used.plan(step, dp_ranks=4, max_tokens_per_rank=80) == fresh.plan(step, dp_ranks=4, max_tokens_per_rank=80)
    alone = fresh.plan(step, dp_ranks=1, max_tokens_per_rank=CAP)
    assert used.plan(step, dp_ranks=4, max_tokens_per_rank=80).batch == alone.batch


@settings(deadline=None, max_examples=30)
@given(samples=sample_sets, per_step=st.integers(1, 40))
def test_no_sample_is_put_off_for_one_that_comes_later(samples, per_step):
    """The batches joined are the epoch's order, which knows no costs and no steps."""
    plans = planner(samples, samples_per_step=per_step)
    steps = range(plans.batches_per_epoch)
    joined = [number for step in steps for number in plans.plan(step, dp_ranks=1, max_tokens_per_rank=CAP).batch]
    one_batch = planner([(1, 1)] * len(samples), samples_per_step=len(samples))
    assert tuple(joined) == one_batch.plan(0, dp_ranks=1, max_tokens_per_rank=CAP).batch


def test_equal_costs_a_step_move_no_sample_by_more_than_64_steps():
    """Beside steps of equal counts; the mix has videos that cost 400 images."""
    mix = draw_mix(20_000)
    plans = Planner(mix.flops, mix.tokens, seed=0, samples_per_step=32)
    batches = [plans.plan(step, dp_ranks=1, max_tokens_per_rank=10**8).batch for step in range(plans.batches_per_epoch)]
    steps = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    by_count = np.arange(len(steps)) * len(batches) // len(steps)
    assert abs(steps - by_count).max() <= 64


def test_batches_cost_the_same_to_within_a_sample():
    rng = np.random.default_rng(0)
    costs = rng.integers(10, 1000, 3000)
    plans = Planner(costs, np.ones_like(costs), seed=1, samples_per_step=32)
    totals = [
        costs[list(plans.plan(step, dp_ranks=1, max_tokens_per_rank=CAP).batch)].sum()
        for step in range(plans.batches_per_epoch)
    ]
    assert abs(np.array(totals) - costs.sum() / plans.batches_per_epoch).max() <= costs.max()


@pytest.mark.parametrize("ranks, mean, p95", [(8, 2.0, 4.0), (32, 1.0, 2.0)])
def test_ranks_are_balanced_on_the_mix_of_the_benchmark(ranks, mean, p95):
    found = imbalance(by_planner(draw_mix(20_000), ranks, steps=40))
    assert found["mean_percent"] <= mean
    assert found["p95_percent"] <= p95
    assert found["micro_batches"] == 1


def test_a_dear_sample_does_not_make_every_micro_batch_dear():
    """One sample as dear as all a rank has to do: its micro-batch is full on all ranks, and the others are cheap."""
    costs = np.array([1024] + [64] * 48)
    plans = Planner(costs, np.full(49, 10), seed=0, samples_per_step=49)
    plan = plans.plan(0, dp_ranks=4, max_tokens_per_rank=160, micro_batch_multiple=4)
    of_pack = np.array([[costs[list(pack)].sum() for pack in of_rank] for of_rank in plan.micro_batches])
    assert of_pack.max(axis=0).sum() == 1024


def test_more_micro_batches_are_run_in_multiples_where_samples_leave_room_in_packs():
    """Nine samples of 51 tokens are 459, which six packs of 100 would hold, but no pack holds two of them."""
    plan = planner([(1, 51)] * 9, samples_per_step=9).plan(
        0, dp_ranks=2, max_tokens_per_rank=100, micro_batch_multiple=3
    )
    assert [len(of_rank) for of_rank in plan.micro_batches] == [6, 6]
    assert max(len(pack) for of_rank in plan.micro_batches for pack in of_rank) == 1


def test_micro_batches_are_of_like_cost_on_all_ranks():
    """Packs capped at the longest video: no rank's micro-batch is cheaper than another rank's next one."""
    mix = draw_mix(20_000)
    result = by_planner(mix, 8, steps=10, budget=4, cap=1)
    for costs, tokens in zip(result.costs, result.tokens, strict=True):  # [ranks, micro-batches]
        assert costs.shape[1] >= 6
        assert (costs.min(axis=0)[:-1] >= (1 - 1e-6) * costs.max(axis=0)[1:]).all()
        assert tokens.max() <= mix.longest
    found = imbalance(result)
    assert found["tied_mean_percent"] <= 8
    assert found["mean_percent"] <= 3


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


positions = st.sets(st.integers(0, 60), max_size=20)


@given(skipped=positions, steps=st.integers(0, 60))
def test_steps_take_every_position_once_but_those_left_out(skipped, steps):
    left = [position for position in range(200) if position not in skipped]
    assert [data_step(step, tuple(skipped)) for step in range(steps)] == left[:steps]


@given(there=positions, here=positions, steps=st.integers(0, 40))
def test_histories_are_the_same_where_they_have_taken_the_same_positions(there, here, steps):
    taken = [[data_step(step, skipped) for step in range(steps)] for skipped in (there, here)]
    assert same_history(steps, there, here) == (taken[0] == taken[1])


@settings(deadline=None, max_examples=30)
@given(samples=sample_sets, skipped=st.sets(st.integers(0, 20), max_size=6), ranks=st.integers(1, 8))
def test_an_epoch_with_steps_left_out_has_every_other_sample_once(samples, skipped, ranks):
    plans = planner(samples)
    inside = {step for step in skipped if step < plans.batches_per_epoch}
    seen = [
        number
        for step in range(plans.batches_per_epoch - len(inside))
        for number in plans.plan(data_step(step, inside), dp_ranks=ranks, max_tokens_per_rank=CAP).batch
    ]
    left_out = [number for step in inside for number in plans.plan(step, dp_ranks=1, max_tokens_per_rank=CAP).batch]
    assert sorted(seen + left_out) == list(range(len(samples)))
