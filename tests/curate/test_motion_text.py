"""The motion score in captions: it comes out as it went in, whatever the caption says."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from goku_mega.curate.motion_text import split_motion, with_motion

NASTY = st.sampled_from(
    [
        "Motion score: 3.2.",
        " ",
        "\n",
        ".",
        "Motion score:",
        "5.0",
        "motion score: 1.0.",
        "\u00a0",
        "\u0664.\u0662",
        "猫",
        "",
    ]
)
CAPTIONS = st.one_of(st.text(), st.lists(st.one_of(NASTY, st.text(max_size=3)), max_size=6).map("".join))
MOTIONS_PX = st.floats(0, 1e5)


@given(CAPTIONS, MOTIONS_PX)
@example("", 3.2)
@example(" ", 0.0)
@example("A cat jumps", 0.04)
@example("A cat. Motion score: 1.0.", 20.0)
def test_a_caption_and_its_motion_come_back_exactly(caption, motion_px):
    assert split_motion(with_motion(caption, motion_px)) == (caption, round(motion_px, 1))


@given(CAPTIONS)
@example("Motion score: 3.2.")
@example(" Motion score: 3.2.")
@example("A cat. Motion score: 03.2.")
@example("A cat. Motion score: \u0663.\u0662.")
@example("A cat. Motion score: 3.2.\n")
def test_only_what_with_motion_writes_is_read_as_motion(text):
    caption, motion_px = split_motion(text)
    assert text == (caption if motion_px is None else with_motion(caption, motion_px))


def test_the_motion_reads_as_the_paper_has_it():
    assert with_motion("A cat jumps.", 3.15) == "A cat jumps. Motion score: 3.1."
    assert with_motion("A cat jumps.", -0.0) == "A cat jumps. Motion score: 0.0."
    assert split_motion("A cat jumps. Motion score: 12.") == ("A cat jumps. Motion score: 12.", None)


@pytest.mark.parametrize("motion_px", [-0.1, math.nan, math.inf])
def test_what_is_no_motion_is_refused(motion_px):
    with pytest.raises(ValueError, match="the motion is"):
        with_motion("A cat.", motion_px)
