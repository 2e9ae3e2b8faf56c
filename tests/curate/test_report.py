"""The report: its numbers are those of the clips, and its pictures are there and show something."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from goku_mega.curate.report import ReportData, histogram, write_report

SCORES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.floats(0, 1), st.just(float("nan"))), max_size=200).map(np.array)


def made(clips: int = 500) -> ReportData:
    random = np.random.default_rng(0)
    motion = random.lognormal(0.8, 1.2, clips)
    motion[:7] = np.nan
    return ReportData(
        funnel={"480p": (("sources", 90), ("clips", clips), ("motion", 300)), "720p": (("sources", 90), ("clips", 0))},
        scores={"motion, px": motion, "aesthetics": random.normal(5, 1, clips).astype(np.float32)},
        thresholds={"motion, px": (("480p min", 0.3), ("480p max", 20.0), ("720p max", 15.0))},
        classes_before={("human", "kid"): 400, ("food", "dinner"): 100},
        classes_after={("human", "kid"): 300, ("food", "dinner"): 200},
    )


def colors(path: Path) -> int:
    with Image.open(path) as picture:
        found = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        assert found is not None
        return len(found)


def test_the_pictures_are_drawn(tmp_path):
    write_report(tmp_path / "new", made())
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"report.json", "funnel.png", "scores.png", "classes.png"}
    assert all(colors(tmp_path / "new" / name) > 20 for name in names if name.endswith(".png"))


def test_the_numbers_are_those_of_the_clips(tmp_path):
    data = made()
    write_report(tmp_path, data)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["funnel"]["480p"][1] == {"step": "clips", "left": 500}
    motion = data.scores["motion, px"][7:]
    numbers = report["scores"]["motion, px"]
    assert (numbers["count"], numbers["missing"]) == (493, 7)
    assert numbers["max"] == motion.max() and numbers["percentiles"]["50"] == np.median(motion)
    assert [cut["below"] for cut in numbers["thresholds"]] == [int((motion < value).sum()) for value in (0.3, 20, 15)]
    assert [cut["above"] for cut in numbers["thresholds"]] == [int((motion > value).sum()) for value in (0.3, 20, 15)]
    assert {"primary": "food", "subclass": "dinner", "before": 100, "after": 200} in report["classes"]


def test_thresholds_are_seen_in_the_picture(tmp_path):
    data = made()
    write_report(tmp_path / "with", data)
    write_report(tmp_path / "without", ReportData(data.funnel, data.scores))
    red = [
        int((np.asarray(Image.open(tmp_path / name / "scores.png").convert("RGB")) == (0xD6, 0x45, 0x45)).all(-1).sum())
        for name in ("with", "without")
    ]
    assert red[0] > 100 and red[1] == 0


@pytest.mark.parametrize(
    "data",
    [
        ReportData({}, {}),
        ReportData({"480p": ()}, {"motion": np.array([])}),
        ReportData({"480p": (("sources", 0), ("clips", 0))}, {"motion": np.full(3, np.nan)}),
        ReportData({"480p": (("sources", 1),)}, {"motion": np.zeros(5)}, {"motion": (("min", 0.0),)}),
        ReportData({}, {f"score {number}": np.arange(3.0) for number in range(4)}),
        ReportData({}, {}, classes_before={("other", "other"): 3}),
    ],
)
def test_little_or_nothing_makes_a_report_too(tmp_path, data):
    write_report(tmp_path, data)
    assert json.loads((tmp_path / "report.json").read_text()).keys() == {"funnel", "scores", "classes"}


@given(SCORES, st.lists(st.floats(0, 100), max_size=3))
@example(np.array([0.0, 2e-194]), [])
def test_every_value_is_in_a_bar_or_beyond_or_missing(values, marks):
    bars = histogram(values, marks)
    assert bars.counts.sum() + bars.beyond + bars.missing == len(values)
    assert bars.beyond <= 0.02 * len(values) + 2
    assert (np.diff(bars.edges) > 0).all()
    if not np.isnan(values).all():
        assert all(bars.edges[0] <= mark <= bars.edges[-1] * (1 + 1e-12) for mark in marks)


def test_one_wild_value_does_not_press_the_others_into_one_bar():
    bars = histogram(np.append(np.linspace(0, 1, 10_000), 1e9))
    assert (bars.counts > 0).all() and bars.beyond < 50


def test_scores_over_decades_are_spread_by_their_logarithm():
    random = np.random.default_rng(0)
    assert histogram(random.lognormal(0, 1.5, 5000)).is_logarithmic
    assert not histogram(random.normal(5, 1, 5000)).is_logarithmic
    assert not histogram(np.append(random.lognormal(0, 1.5, 5000), np.zeros(100))).is_logarithmic


def test_without_matplotlib_the_numbers_are_written_and_the_command_to_get_it_is_told(tmp_path):
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from goku_mega.curate.report import ReportData, write_report\n"
        "from goku_mega.errors import MissingExtra\n"
        "try: write_report(Path(sys.argv[1]), ReportData({'480p': (('sources', 1),)}, {}))\n"
        "except MissingExtra as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "pip install goku-mega[curate]" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
