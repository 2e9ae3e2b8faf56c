"""The live table: what each stage did, how fast, and how long it will still take."""

import pytest

from goku_mega.curate.engine import Finished, Found, SetAside
from goku_mega.curate.progress import Progress


def test_every_stage_has_its_rate_and_the_time_it_still_takes_by_it():
    progress = Progress("curate", total=10, workers=2)
    for number in range(4):
        progress.hear(Found(number, "ocr", f"k{number}", {}, seconds=3.0))
        progress.hear(Found(number, "motion", f"k{number}", {}, seconds=0.5))
        progress.hear(Finished(number))
    progress.hear(SetAside(4, "media", "probe", "damaged"))
    rows = {name: (scores, rate, left_s) for name, scores, rate, left_s in progress.rows()}
    assert list(rows) == ["motion", "ocr"]  # the dearest last
    assert rows["ocr"] == (4, pytest.approx(1 / 3), pytest.approx(12.0 * (5 / 5) / 2))
    assert rows["motion"] == (4, pytest.approx(2.0), pytest.approx(1.0))
    assert "curate: 5 of 10 sources" in progress.line() and "1 set aside" in progress.line()


def test_before_anything_is_done_nothing_is_forecast():
    progress = Progress("curate", total=10, workers=2)
    progress.hear(Found(0, "ocr", "k", {}, seconds=3.0))
    assert progress.line().startswith("curate: 0 of 10 sources") and "left" not in progress.line()
    assert progress._table().row_count == 1
