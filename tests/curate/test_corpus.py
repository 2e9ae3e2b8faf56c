"""The made corpus: each clip breaks one rule or stands on either side of a bound, and gets the verdict it must get.

A part of every family here; `python -m benchmarks.curate_corpus` takes all of them.
"""

import pytest
from corpus_verdicts import differences
from made_aesthetics import write_aesthetics
from made_corpus import bright_corpus, make_corpus, whole_corpus

from goku_mega.config.curation import CurateConfig, OcrConfig
from goku_mega.curate.curate import curate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PART = (
    "duration-24.000-95.mp4", "duration-23.976-96.mp4", "duration-25.000-100.mp4", "size-480x854.mp4",
    "size-480x846.mp4", "size-1280x720.mp4", "size-478x854.mp4", "bitrate-499999.mp4", "bitrate-500000.mp4",
    "bitrate-499999.mkv", "rate-23.97602.mp4", "rate-23.97000.mkv", "rate-30.00000.mkv", "codec-av1.mp4",
    "codec-turned.mp4", "codec-varying.mkv", "broken-cut-0.9.mp4", "broken-empty.mp4", "motion-480-0.29.mp4",
    "motion-480-0.30.mp4", "motion-480-20.00.mp4", "motion-480-20.10.mp4", "motion-720-15.10.mp4",
    "motion-1080-8.00.mp4",
    "text-480-0.018.mp4", "text-480-0.0225.mp4", "text-720-0.0113.mp4", "cuts-1.mp4", "cuts-4.mp4", "length-288.mp4",
    "length-287.mp4", "repeated-ABAB.mp4", "image-480x854.png", "image-600x800.jpg",
)  # fmt: skip


def test_a_part_of_every_family_gets_the_verdicts_that_it_must_get(tmp_path):
    made = [source for source in whole_corpus() if source.name in PART]
    assert len(made) == len(PART)
    make_corpus(tmp_path / "raw", made)
    curate(CurateConfig(videos=str(tmp_path / "raw"), output=str(tmp_path / "out")))
    assert differences(tmp_path / "out", tmp_path / "raw", made) == []


def test_clips_of_like_scenes_are_told_apart_by_their_aesthetic_score(tmp_path):
    made = bright_corpus()
    make_corpus(tmp_path / "raw", made)
    config = CurateConfig(
        videos=str(tmp_path / "raw"), output=str(tmp_path / "out"), aesthetic=write_aesthetics(tmp_path),
        ocr=OcrConfig(enabled=False),
    )  # fmt: skip
    curate(config)
    assert differences(tmp_path / "out", tmp_path / "raw", made) == []


def test_the_whole_corpus_has_two_hundred_sources_of_different_names():
    names = [source.name for source in whole_corpus()]
    assert len(names) == len(set(names)) >= 200
