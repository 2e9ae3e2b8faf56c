"""What a curation has kept and why, as numbers in report.json and as three pictures. Knows nothing of manifests.

funnel.png: what each rule has left, a column a tier. scores.png: how scores are spread, and where thresholds cut.
classes.png: how often each class is there before and after the balance.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BINS = 60
SHOWN_PERCENTILES = (0.2, 99.8)
"""That a histogram reaches from and to: one wild value must not press all others into one bar."""
LOGARITHMIC_SPAN = (100.0, 1e5)
"""Largest over smallest shown value between which bars are even in the logarithm; above, it is about zero."""
LOGARITHMIC_ABOVE = 30
"""Times the median bar's height that the highest may have on a linear axis."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)

INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BEFORE, AFTER = "#bcccdc", "#2f6f9f"
CUTS = ("#d64545", "#e8871e", "#2b8a3e", "#7048a8")
"""Of threshold lines, by their order; tiers, the lowest first."""
DPI = 130

Counts = Mapping[tuple[str, str], int]
"""(primary class, subclass) -> clips."""


@dataclass(frozen=True)
class ReportData:
    """What a report is made of; what is empty has no picture."""

    funnel: Mapping[str, Sequence[tuple[str, int]]]
    """Tier -> (step, what is left after it), in the order of the steps."""
    scores: Mapping[str, NDArray[np.floating[Any]]]
    """Score -> its values over all clips that have one, [clips]; NaN: not scored."""
    thresholds: Mapping[str, Sequence[tuple[str, float]]] = field(default_factory=dict)
    """Score -> (label, value): `("480p", 4.3)`."""
    classes_before: Counts = field(default_factory=dict)
    classes_after: Counts = field(default_factory=dict)
    """Repeats counted."""


@dataclass(frozen=True)
class Histogram:
    """Values in bars."""

    edges: NDArray[np.float64]
    """[bars + 1]"""
    counts: NDArray[np.int64]
    """[bars]"""
    beyond: int
    """Values outside of the edges."""
    missing: int
    """Values that are NaN or infinite."""
    is_logarithmic: bool = False
    """The bars are as wide as each other in the values' logarithm, not in the values."""


def write_report(folder: Path, data: ReportData) -> None:
    """Write report.json and the pictures into a folder.

    Raises:
        MissingExtra: matplotlib is not installed; report.json is written nevertheless.
    """
    folder.mkdir(parents=True, exist_ok=True)
    histograms = {
        name: histogram(values, [value for _, value in data.thresholds.get(name, ())])
        for name, values in data.scores.items()
    }
    numbers = _numbers(data, histograms)
    (folder / "report.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _require_matplotlib()
    histograms = {name: bars for name, bars in histograms.items() if bars.counts.any()}
    if data.funnel:
        _save(_draw_funnel(data.funnel), folder / "funnel.png")
    if histograms:
        _save(_draw_scores(histograms, data.thresholds), folder / "scores.png")
    if data.classes_before:
        _save(_draw_classes(data.classes_before, data.classes_after), folder / "classes.png")


def histogram(values: NDArray[np.floating[Any]], marks: Sequence[float] = ()) -> Histogram:
    """Bars over nearly all values and over all marks; in the logarithm where values span more than two decades."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    missing = len(values) - len(known)
    if not len(known):
        return Histogram(np.linspace(0, 1, BINS + 1), np.zeros(BINS, np.int64), 0, missing)
    ends = [float(end) for end in np.percentile(known, SHOWN_PERCENTILES)]
    low, high = min(*ends, *marks), max(*ends, *marks)
    if high - low < 1e-6 * max(1.0, abs(low)):  # bars of no width
        low, high = low - 0.5, high + 0.5
    is_logarithmic = low > 0 and LOGARITHMIC_SPAN[0] < high / low < LOGARITHMIC_SPAN[1]
    edges = (np.geomspace if is_logarithmic else np.linspace)(low, high, BINS + 1)
    counts = np.histogram(known, edges)[0].astype(np.int64)
    return Histogram(edges, counts, len(known) - int(counts.sum()), missing, is_logarithmic)


def _numbers(data: ReportData, histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    tags = sorted({*data.classes_before, *data.classes_after})
    return {
        "funnel": {
            tier: [{"step": step, "left": int(count)} for step, count in steps] for tier, steps in data.funnel.items()
        },
        "scores": {
            name: _score_numbers(np.asarray(values, np.float64), histograms[name], data.thresholds.get(name, ()))
            for name, values in data.scores.items()
        },
        "classes": [
            {
                "primary": primary,
                "subclass": subclass,
                "before": int(data.classes_before.get((primary, subclass), 0)),
                "after": int(data.classes_after.get((primary, subclass), 0)),
            }
            for primary, subclass in tags
        ],
    }


def _score_numbers(
    values: NDArray[np.float64], bars: Histogram, thresholds: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    numbers: dict[str, Any] = {"count": len(known), "missing": bars.missing}
    if not len(known):
        return numbers
    cuts = [
        {
            "label": label,
            "value": float(value),
            "below": int((known < value).sum()),
            "above": int((known > value).sum()),
        }
        for label, value in thresholds
    ]
    return numbers | {
        "mean": float(known.mean()),
        "min": float(known.min()),
        "max": float(known.max()),
        "percentiles": dict(zip(map(str, PERCENTILES), map(float, np.percentile(known, PERCENTILES)), strict=True)),
        "thresholds": cuts,
        "histogram": {"edges": bars.edges.tolist(), "counts": bars.counts.tolist(), "beyond": bars.beyond},
    }


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra(
            "the report's pictures need matplotlib, which is not installed; pip install goku-mega[curate]"
        ) from None


def _draw_funnel(funnel: Mapping[str, Sequence[tuple[str, int]]]) -> "Figure":
    most_steps = max(len(steps) for steps in funnel.values())
    figure = _figure(4.6 * len(funnel), 1.2 + 0.42 * most_steps)
    grid = figure.subplots(1, len(funnel), squeeze=False).flat
    for axes, (tier, steps) in zip(grid, funnel.items(), strict=True):
        counts = [count for _, count in steps]
        bars = axes.barh(range(len(steps)), counts, color=AFTER, height=0.72)
        axes.bar_label(bars, _funnel_labels(counts), padding=4, fontsize=8, color=INK)
        axes.set_yticks(range(len(steps)), [step for step, _ in steps], fontsize=8.5)
        axes.set_ylim(most_steps - 0.4, -0.6)
        axes.set_xlim(0, 1.5 * max(counts, default=0) or 1)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(QUIET)
        axes.set_title(tier, fontsize=11, loc="left", fontweight="bold")
    figure.suptitle("What each step leaves, and its share of the step before", fontsize=12, x=0.01, ha="left")
    return figure


def _funnel_labels(counts: Sequence[int]) -> list[str]:
    """Counts, and against the step before: a share where it is less, a factor where a source became many clips."""
    labels = [f"{count:,}" for count in counts]
    for number, (before, count) in enumerate(itertools.pairwise(counts), start=1):
        if before and count != before:
            labels[number] += f"  ({_percent(count / before)})" if count < before else f"  (\u00d7{count / before:.1f})"
    return labels


def _percent(share: float) -> str:
    """Whole percents, but neither all nor nothing for what is not."""
    if 0 < share < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def _draw_scores(
    histograms: Mapping[str, Histogram], thresholds: Mapping[str, Sequence[tuple[str, float]]]
) -> "Figure":
    columns = min(3, len(histograms))
    rows = math.ceil(len(histograms) / columns)
    figure = _figure(4.6 * columns, 0.5 + 3.1 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, bars) in zip(grid, histograms.items(), strict=False):
        axes.stairs(bars.counts, bars.edges, fill=True, color=BEFORE, edgecolor=QUIET, linewidth=0.6)
        if bars.counts.max() > LOGARITHMIC_ABOVE * np.median(bars.counts[bars.counts > 0]):
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7)
        _draw_cuts(axes, thresholds.get(name, ()))
        if bars.is_logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(name, fontsize=11, loc="left", fontweight="bold")
        axes.set_title(_score_note(bars), fontsize=8.5, loc="right", color=QUIET)
        _quieten(axes, axes.yaxis)
    for axes in grid[len(histograms) :]:
        axes.set_visible(False)
    return figure


def _score_note(bars: Histogram) -> str:
    scored = int(bars.counts.sum()) + bars.beyond
    beyond = f", {_percent(bars.beyond / scored)} beyond" if bars.beyond else ""
    missing = f", {bars.missing:,} not scored" if bars.missing else ""
    return f"{scored:,} clips{beyond}{missing}"


def _draw_cuts(axes: "Axes", thresholds: Sequence[tuple[str, float]]) -> None:
    """A line for each value, with the labels of all thresholds that have it."""
    labels: dict[float, list[str]] = {}
    for label, value in thresholds:
        labels.setdefault(float(value), []).append(label)
    for number, (value, names) in enumerate(sorted(labels.items())):
        style = ("-", "--", ":")[number // len(CUTS) % 3]
        axes.axvline(value, color=CUTS[number % len(CUTS)], linewidth=1.4, linestyle=style,
                     label=f"{', '.join(names)}: {value:g}")  # fmt: skip
    if labels:
        axes.legend(fontsize=7.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best")


def _draw_classes(before: Counts, after: Counts) -> "Figure":
    primaries: dict[str, list[str]] = {}
    for primary, subclass in sorted({*before, *after}):
        primaries.setdefault(primary, []).append(subclass)
    columns = min(3, len(primaries))
    rows = [list(primaries)[at : at + columns] for at in range(0, len(primaries), columns)]
    heights = [
        _pairs_height(len(primaries)),
        *(_pairs_height(max(len(primaries[name]) for name in row)) for row in rows),
    ]
    figure = _figure(4.6 * columns, sum(heights))
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    total = figure.add_subplot(grid[0, :])
    sums = ([sum(counts.get((name, sub), 0) for sub in subs) for name, subs in primaries.items()]
            for counts in (before, after))  # fmt: skip
    _draw_pairs(total, "primary classes", list(primaries), *sums)
    total.legend(fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    for number, (name, subs) in enumerate(primaries.items()):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        _draw_pairs(axes, name, subs, *([counts.get((name, sub), 0) for sub in subs] for counts in (before, after)))
    return figure


def _pairs_height(names: int) -> float:
    """Inches."""
    return 0.8 + 0.25 * names


def _draw_pairs(axes: "Axes", title: str, names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> None:
    """Two bars for each name."""
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    places = np.arange(len(names))
    axes.barh(places - 0.2, before, height=0.38, color=BEFORE, label="before the balance")
    axes.barh(places + 0.2, after, height=0.38, color=AFTER, label="after it")
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _quieten(axes, axes.xaxis)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of this many inches, apart from pyplot's state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: "Figure", file: Path) -> None:
    figure.savefig(file, format="png", dpi=DPI)


def _quieten(axes: "Axes", counted: "Axis") -> None:
    """Little ink beside the data; `counted` is the axis with numbers of clips: 1k, 1M."""
    from matplotlib.ticker import EngFormatter

    counted.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=8, color=QUIET, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.set_axisbelow(True)
    counted.grid(True, color=GRID, linewidth=0.8)
