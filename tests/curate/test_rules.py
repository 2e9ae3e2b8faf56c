"""Verdicts: every bound of tables 3 and 4, from both sides; one clip is judged as a million are."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goku_mega.config.curation import RawThresholds, Thresholds, TierThresholds
from goku_mega.curate.rules import NOT_SCORED, duplicates, judge, raw_reason, split_threshold, tier_rules

FACTS = {
    "kind": "video", "height": 480, "width": 864, "duration_s": 4.0, "bitrate_bps": 500_000.0,
    "frame_rate": 24000 / 1001,
}  # fmt: skip
GOOD = {
    "short_side_px": 1080.0, "long_side_px": 1920.0, "similarity": 0.9, "motion_px": 8.0, "ocr": 0.01,
    "aesthetic": 4.5, "nsfw": 0.5, "watermark": 0.5,
}  # fmt: skip


def reason(tier: str, *, image: bool = False, missing: bool = False, without: tuple[str, ...] = (), **changes) -> str:
    thresholds = Thresholds()
    columns = {name: np.array([value]) for name, value in (GOOD | changes).items() if name not in without}
    rules = tier_rules(thresholds.tiers[tier], thresholds)
    return judge(columns, rules, is_image=np.array([image]), missing=np.array([missing])).text(0)


@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [
        ("duration_s", 4.0, 3.999),
        ("bitrate_bps", 500_000.0, 499_999.0),
        ("frame_rate", 23.976, 23.97),
        ("frame_rate", 24000 / 1001, 23.974),
        ("height", 480, 478),
        ("width", 480, 479),
    ],
)
def test_a_source_on_a_bound_of_table_3_passes_and_one_below_does_not(name, passes, fails):
    thresholds = RawThresholds()
    assert raw_reason(FACTS | {name: passes}, thresholds) == ""
    column = {"height": "short_side_px", "width": "short_side_px"}.get(name, name)
    assert raw_reason(FACTS | {name: fails}, thresholds).startswith(f"{column} < ")


def test_an_image_is_asked_for_its_size_alone():
    image = FACTS | {"kind": "image", "duration_s": 0.0, "bitrate_bps": 0.0, "frame_rate": 0.0}
    assert raw_reason(image, RawThresholds()) == ""
    assert raw_reason(image | {"height": 479}, RawThresholds()) == "short_side_px < 480"
    assert reason("480p", image=True, motion_px=math.nan, similarity=0.0) == ""


@pytest.mark.parametrize(
    ("tier", "name", "passes", "fails"),
    [
        (tier, name, *values)
        for tier, bounds in {
            "480p": {"similarity": (0.85, 0.8499), "aesthetic": (4.3, 4.29), "ocr": (0.02, 0.0201)},
            "720p": {"similarity": (0.9, 0.8999), "aesthetic": (4.5, 4.49), "ocr": (0.01, 0.0101)},
            "1080p": {"similarity": (0.9, 0.8999), "aesthetic": (4.5, 4.49), "ocr": (0.01, 0.0101)},
        }.items()
        for name, values in bounds.items()
    ]
    + [
        (tier, "motion_px", *values)
        for tier, (low, high) in {"480p": (0.3, 20.0), "720p": (0.5, 15.0), "1080p": (0.5, 8.0)}.items()
        for values in ((low, low - 0.01), (high, high + 0.1))
    ]
    + [("480p", "short_side_px", 480.0, 479.0), ("480p", "long_side_px", 847.0, 846.0)]
    + [("720p", "short_side_px", 720.0, 719.0), ("1080p", "long_side_px", 1882.0, 1881.0)],
)
def test_a_clip_on_a_bound_of_table_4_passes_and_one_beyond_it_does_not(tier, name, passes, fails):
    assert reason(tier, **{name: passes}) == ""
    assert reason(tier, **{name: fails}).startswith(f"{name} ")


def test_the_usual_480p_passes_for_480x864_unless_it_must_be_exact():
    assert reason("480p", short_side_px=480.0, long_side_px=854.0) == ""
    strict = Thresholds(long_side_tolerance=0.0)
    columns = {name: np.array([value]) for name, value in (GOOD | {"long_side_px": 854.0}).items()}
    rules = tier_rules(strict.p480, strict)
    assert judge(columns, rules, is_image=np.array([False]), missing=np.array([False])).text(0) == "long_side_px < 864"


def test_a_stage_that_is_off_refuses_nobody_and_a_score_that_is_missing_keeps_nobody():
    assert reason("1080p", without=("aesthetic", "ocr"), aesthetic=0.0) == ""
    assert reason("480p", missing=True) == NOT_SCORED
    assert reason("480p", missing=True, ocr=0.5) == "ocr > 0.02"


def test_the_first_broken_rule_is_the_reason():
    assert reason("720p", ocr=0.5, aesthetic=1.0, motion_px=0.1) == "motion_px < 0.5"


@given(
    st.lists(
        st.fixed_dictionaries({name: st.floats(0, 2 * value + 1) for name, value in GOOD.items()}),
        min_size=1, max_size=20,
    )
)  # fmt: skip
def test_many_are_judged_as_each_alone_and_higher_tiers_take_no_more(rows):
    thresholds = Thresholds()
    together = {}
    for name, tier in thresholds.tiers.items():
        rules = tier_rules(tier, thresholds)
        columns = {column: np.array([row[column] for row in rows]) for column in GOOD}
        none = np.zeros(len(rows), dtype=bool)
        together[name] = judge(columns, rules, is_image=none, missing=none)
        assert [together[name].text(n) for n in range(len(rows))] == [reason(name, **row) for row in rows]
    assert not (together["1080p"].passes & ~together["720p"].passes).any()
    assert not (together["720p"].passes & ~together["480p"].passes).any()


def test_a_source_is_split_at_the_threshold_of_the_highest_tier_that_it_reaches():
    thresholds = Thresholds()
    sizes = {(480, 854): 0.85, (1280, 720): 0.90, (719, 1280): 0.85, (1080, 1920): 0.90, (240, 320): 0.85}
    assert {size: split_threshold(*size, "source", thresholds) for size in sizes} == sizes
    assert split_threshold(1080, 1920, "lowest", thresholds) == 0.85


def winners(kept, pairs, aesthetic) -> set[int]:
    ones, others = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in range(2))
    mask = np.array(kept)
    gone = duplicates(mask, ones, others, np.array(aesthetic, dtype=float))
    return {number for number in range(len(kept)) if mask[number] and number not in gone}


def test_of_alike_clips_the_one_with_the_higher_score_stays_and_of_equals_the_first():
    assert winners([True] * 3, [(0, 1)], [4.0, 5.0, 1.0]) == {1, 2}
    assert winners([True] * 2, [(0, 1)], [5.0, 5.0]) == {0}
    assert winners([True] * 2, [(0, 1)], [math.nan, math.nan]) == {0}


def test_a_clip_that_is_refused_takes_nobodys_place():
    assert winners([True, False], [(0, 1)], [4.0, 9.0]) == {0}


def test_likeness_does_not_run_through_a_clip_that_is_gone():
    """1 gives way to 0; 2 is alike 1 alone, so it stays."""
    assert winners([True] * 3, [(0, 1), (1, 2)], [9.0, 5.0, 1.0]) == {0, 2}


@given(st.data())
def test_nobody_that_stays_is_alike_another_and_whoever_gives_way_has_a_better_one(data):
    count = data.draw(st.integers(1, 8))
    pairs = data.draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))))
    pairs = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
    score = data.draw(st.lists(st.floats(1, 10), min_size=count, max_size=count))
    kept = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    staying = winners(kept, pairs, score)
    assert not any(one in staying and other in staying for one, other in pairs)
    for number in range(count):
        if kept[number] and number not in staying:
            alike = [one + other - number for one, other in pairs if number in (one, other)]
            assert any(other in staying and (-score[other], other) < (-score[number], number) for other in alike)


def test_every_threshold_of_a_tier_is_a_rule():
    tier = TierThresholds(
        short_side_min_px=1, long_side_min_px=2, similarity_min=3, aesthetic_min=4, ocr_max=5, motion_min_px=6,
        motion_max_px=7,
    )  # fmt: skip
    bounds = {rule.bound for rule in tier_rules(tier, Thresholds(long_side_tolerance=0.0, nsfw_max=8, watermark_max=9))}
    assert bounds == {float(number) for number in range(1, 10)}
