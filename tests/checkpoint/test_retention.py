"""Which checkpoints go: the newest intact one never does, and every rule keeps as many as it says."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from goku_mega.checkpoint.retention import Kept, Retention, kept_as, retired

STEPS = st.integers(0, 40)
LOSSES = st.none() | st.sampled_from([math.nan, math.inf, 0.0, 0.25, -1.0]) | st.floats(-2, 2)
RULES = st.builds(Retention, st.integers(0, 6), st.integers(0, 12), st.integers(0, 6))


@st.composite
def folders(draw: st.DrawFn) -> list[Kept]:
    """What a folder may hold, newest first as it is listed; a step may be there twice, the replaced one second."""
    steps = sorted(draw(st.lists(STEPS, max_size=20)), reverse=True)
    return [Kept(step, f"{number}", draw(st.booleans()), draw(LOSSES)) for number, step in enumerate(steps)]


def staying(found: list[Kept], step: int, rules: Retention) -> list[Kept]:
    gone = retired(found, step, rules)
    assert len(set(gone)) == len(gone) and set(gone) <= set(found)
    return [one for one in found if one not in gone]


def ages(steps: range, *, damaged: tuple[int, ...] = (), losses: tuple[float, ...] = ()) -> list[Kept]:
    """One checkpoint a step, oldest first."""
    loss = dict(zip(steps, losses, strict=False))
    return [Kept(step, f"step_{step}", step not in damaged, loss.get(step)) for step in steps]


def steps_gone(found: list[Kept], step: int, rules: Retention) -> list[int]:
    return [one.step for one in retired(found, step, rules)]


@given(folders(), STEPS, RULES)
def test_the_newest_intact_one_stays_whatever_the_rules_say(found: list[Kept], step: int, rules: Retention) -> None:
    intact = [one for one in found if one.intact and one.step <= step]
    if intact:
        assert intact[0] in staying(found, step, rules)


@given(folders(), STEPS, RULES)
def test_every_rule_keeps_as_many_as_it_says(found: list[Kept], step: int, rules: Retention) -> None:
    intact = [one for one in found if one.intact and one.step <= step]
    stay = [one for one in staying(found, step, rules) if one in intact]
    newest = intact[: max(1, rules.keep)]
    every = [one for one in intact if rules.keep_every and one.step % rules.keep_every == 0]
    assert set(newest) | set(every) <= set(stay)
    best = [one for one in stay if one not in newest and one not in every]  # nothing else has a reason to stay
    assert len(best) <= rules.keep_best
    known = [one for one in intact if one.loss is not None and one.loss == one.loss]
    for one in best:
        assert one in known
        assert sum(other.loss < one.loss for other in known) < rules.keep_best
    for one in known:
        no_worse = [other for other in known if other.loss <= one.loss]
        assert one in stay or len(no_worse) > rules.keep_best  # and none of the best goes


@given(folders(), STEPS, RULES)
def test_a_damaged_one_goes_once_the_newest_kept_ones_are_all_newer(
    found: list[Kept], step: int, rules: Retention
) -> None:
    intact = [one for one in found if one.intact and one.step <= step]
    newest = intact[: max(1, rules.keep)]
    for one in found:
        if not one.intact and one.step <= step:
            enough = bool(newest) and len(newest) >= rules.keep and all(one.step < kept.step for kept in newest)
            assert (one not in staying(found, step, rules)) == enough


@given(folders(), STEPS, RULES)
def test_steps_beyond_the_saved_one_are_not_judged(found: list[Kept], step: int, rules: Retention) -> None:
    past = [one for one in found if one.step <= step]
    assert retired(found, step, rules) == retired(past, step, rules)
    assert all(one.step <= step for one in retired(found, step, rules))


@given(folders(), STEPS, RULES)
def test_what_stays_stays_when_judged_again(found: list[Kept], step: int, rules: Retention) -> None:
    assert retired(staying(found, step, rules), step, rules) == []


@given(folders(), STEPS, RULES, st.randoms(use_true_random=False))
def test_the_order_of_different_steps_does_not_matter(
    found: list[Kept], step: int, rules: Retention, order: random.Random
) -> None:
    once = list({one.step: one for one in found}.values())
    shuffled = order.sample(once, len(once))
    assert retired(shuffled, step, rules) == retired(once, step, rules)
    steps = [one.step for one in retired(shuffled, step, rules)]
    assert steps == sorted(steps, reverse=True)


@given(folders(), STEPS, RULES)
def test_an_intact_one_stays_exactly_when_a_rule_is_named_for_it(
    found: list[Kept], step: int, rules: Retention
) -> None:
    reasons = kept_as(found, step, rules)
    stay = {one.name for one in staying(found, step, rules) if one.intact and one.step <= step}
    assert set(reasons) == stay
    assert all(reasons.values())


def test_a_run_keeps_its_newest_the_periodic_and_the_best() -> None:
    found = ages(range(100, 1100, 100), losses=(9, 8, 1, 7, 6, 2, 5, 4, 3, 3.5))
    assert steps_gone(found, 1000, Retention(2)) == [800, 700, 600, 500, 400, 300, 200, 100]
    assert steps_gone(found, 1000, Retention(2, keep_every=400)) == [700, 600, 500, 300, 200, 100]
    assert steps_gone(found, 1000, Retention(2, keep_best=2)) == [800, 700, 500, 400, 200, 100]
    reasons = kept_as(found, 1000, Retention(2, keep_every=300, keep_best=2))
    assert reasons == {
        "step_1000": ["newest"],
        "step_900": ["newest", "every 300"],
        "step_600": ["every 300", "best"],
        "step_300": ["every 300", "best"],
    }


def test_a_loss_that_is_not_a_number_is_never_among_the_best() -> None:
    found = ages(range(1, 5), losses=(math.nan, 0.5, math.nan, math.inf))
    assert steps_gone(found, 4, Retention(1, keep_best=1)) == [3, 1]
    assert steps_gone(found, 4, Retention(1, keep_best=9)) == [3, 1]


def test_a_folder_of_damaged_ones_is_left_alone() -> None:
    found = ages(range(1, 6), damaged=(1, 2, 3, 4, 5))
    assert steps_gone(found, 5, Retention(1)) == []
    assert steps_gone([*found, Kept(6, "step_6", True)], 6, Retention(1)) == [5, 4, 3, 2, 1]
    assert steps_gone([*found, Kept(6, "step_6", True)], 6, Retention(2)) == []  # not yet two intact ones


def test_a_future_the_run_was_set_back_from_stays() -> None:
    found = ages(range(10, 60, 10))
    assert steps_gone(found, 30, Retention(1)) == [20, 10]
