"""The balanced set: shares as they are meant, no clip too often, and nothing that depends on the order of the clips."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.curate.balance import apportion, balance, parse_weights
from goku_mega.errors import ConfigError

TAGS = st.tuples(st.sampled_from(["human", "food", "animals", "other"]), st.sampled_from(["a", "b", "c"]))
CLIPS = st.lists(TAGS, min_size=1, max_size=60)
WEIGHTS = st.dictionaries(
    st.sampled_from(["human", "food", "animals"]), st.sampled_from([0.0, 0.5, 1.0, 1.5, 7.3]), max_size=3
)
CAPS = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0, 1.5, 40.0]), st.integers(0, 400)), min_size=1, max_size=12)


def keys_of(clips) -> list[str]:
    return [f"clip-{number}" for number in range(len(clips))]


def counts_of(clips, *, keys=None, weights=None, max_repeat=4, **options) -> np.ndarray:
    primary, subclass = zip(*clips, strict=True)
    return balance(keys or keys_of(clips), primary, subclass, weights=weights or {}, max_repeat=max_repeat, **options)


def per_class(clips, counts) -> dict[tuple[str, str], int]:
    totals = dict.fromkeys(clips, 0)
    for clip, count in zip(clips, counts, strict=True):
        totals[clip] += int(count)
    return totals


@given(CLIPS, WEIGHTS, st.integers(1, 5), st.integers(0, 400), st.integers(-3, 3))
def test_no_clip_is_taken_too_often_and_the_sum_is_the_size_where_it_can_be(clips, weights, max_repeat, size, seed):
    counts = counts_of(clips, weights=weights, max_repeat=max_repeat, size=size, seed=seed)
    assert counts.min() >= 0 and counts.max() <= max_repeat
    weighted = sum(weights.get(primary, 1.0) > 0 for primary, _ in clips)
    assert counts.sum() == min(size or len(clips), max_repeat * weighted)
    assert all(count == 0 for (primary, _), count in zip(clips, counts, strict=True) if weights.get(primary) == 0)


@given(CLIPS, WEIGHTS, st.integers(0, 200), st.randoms(use_true_random=False))
def test_the_order_of_the_clips_does_not_matter(clips, weights, size, random):
    keys = keys_of(clips)
    order = list(range(len(clips)))
    random.shuffle(order)
    shuffled = counts_of(
        [clips[number] for number in order], keys=[keys[number] for number in order], weights=weights, size=size
    )
    assert np.array_equal(shuffled, counts_of(clips, weights=weights, size=size)[order])


@given(CLIPS, WEIGHTS, st.integers(1, 200), st.integers(0, 30))
def test_no_clip_is_taken_less_often_in_a_larger_set(clips, weights, size, more):
    smaller = counts_of(clips, weights=weights, size=size)
    assert (counts_of(clips, weights=weights, size=size + more) >= smaller).all()


@given(CLIPS, WEIGHTS, st.integers(0, 200))
def test_clips_of_a_class_are_taken_equally_often_or_once_more(clips, weights, size):
    counts = counts_of(clips, weights=weights, size=size)
    for tag in set(clips):
        taken = [count for clip, count in zip(clips, counts, strict=True) if clip == tag]
        assert max(taken) - min(taken) <= 1


@given(st.integers(1, 600), st.sampled_from([0.5, 1.0, 1.5, 3.0]))
def test_shares_are_as_meant_where_there_are_clips_enough(size, weight):
    clips = [(primary, name) for primary in ("human", "food", "animals") for name in "abcd" for _ in range(60)]
    totals = per_class(clips, counts_of(clips, weights={"human": weight}, size=size))
    for primary in ("human", "food", "animals"):
        of_primary = [total for (name, _), total in totals.items() if name == primary]
        share = (weight if primary == "human" else 1.0) / (2 + weight)
        assert abs(sum(of_primary) - size * share) <= 0.5 + 1.5 * share
        assert max(of_primary) - min(of_primary) <= 1


def test_rare_classes_are_repeated_and_common_ones_thinned_out():
    clips = [("human", "kid")] * 10 + [("human", "dance")] * 990 + [("food", "dinner")] * 1000
    counts = counts_of(clips, size=1600)
    assert per_class(clips, counts) == {("human", "kid"): 40, ("human", "dance"): 760, ("food", "dinner"): 800}
    assert set(counts[:10]) == {4} and set(counts[10:]) == {0, 1}


def test_what_a_small_class_cannot_fill_the_others_share_by_weight():
    clips = [("human", "a")] * 10 + [("food", "a")] * 1000 + [("animals", "a")] * 1000
    totals = per_class(clips, counts_of(clips, weights={"human": 5.0, "food": 2.0}, size=940))
    assert totals == {("human", "a"): 40, ("food", "a"): 600, ("animals", "a"): 300}


def test_seeds_take_other_clips_in_the_same_shares():
    clips = [("human", "a")] * 500 + [("food", "a")] * 500
    sets = [counts_of(clips, size=300, seed=seed) for seed in range(3)]
    assert len({counts.tobytes() for counts in sets}) == 3
    assert all(per_class(clips, counts) == {("human", "a"): 150, ("food", "a"): 150} for counts in sets)


def test_no_clips_make_an_empty_set():
    assert balance([], [], [], weights={}, max_repeat=4, size=10).shape == (0,)


@given(st.integers(0, 3000), CAPS)
def test_apportioning_equals_handing_out_one_by_one(total, classes):
    weights, caps = zip(*classes, strict=True)
    counts = [0] * len(classes)
    for _ in range(total):
        open_claims = [
            ((count + 0.5) / weight, number)
            for number, (count, weight, cap) in enumerate(zip(counts, weights, caps, strict=True))
            if weight > 0 and count < cap
        ]
        if not open_claims:
            break
        counts[min(open_claims)[1]] += 1
    assert apportion(total, weights, caps) == counts


@settings(max_examples=20)
@given(st.integers(0, 10**12), st.lists(st.integers(0, 10**11), min_size=1, max_size=86))
def test_large_sets_are_exact(total, caps):
    counts = apportion(total, [1.0] * len(caps), caps)
    assert sum(counts) == min(total, sum(caps))
    assert all(0 <= count <= cap for count, cap in zip(counts, caps, strict=True))
    below = [count for count, cap in zip(counts, caps, strict=True) if count < cap]
    assert not below or (max(below) - min(below) <= 1 and min(below) + 1 >= max(counts))


def test_weights_are_read_from_text():
    assert parse_weights(" human=1.5, urban life=2 ,", ("human", "urban life")) == {"human": 1.5, "urban life": 2.0}
    assert parse_weights("", ("human",)) == {}


@pytest.mark.parametrize(
    ("text", "words"), [("humans=2", "no class 'humans'.*human, food"), ("food=1,food=2", "twice")]
)
def test_weights_of_unknown_and_doubled_classes_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_weights(text, ("human", "food"))
