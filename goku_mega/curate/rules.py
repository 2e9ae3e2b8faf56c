"""Scores and thresholds to verdicts (paper tables 3 and 4): pure, for a million clips at once or for one.

Every tier is judged by itself; a clip's tier is the highest that it passes. The reason is the first rule that it
breaks, in the order of the tables. Ends are included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.curation import RawThresholds, Thresholds, TierThresholds

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Codes = NDArray[np.int16]

NOT_SCORED = "not scored yet"
VIDEO_ONLY = frozenset({"duration_s", "bitrate_bps", "frame_rate", "similarity", "motion_px"})
PASSES = 0
"""Code of the empty reason."""


@dataclass(frozen=True)
class Rule:
    """A bound on one column."""

    column: str
    bound: float
    is_minimum: bool

    @property
    def reason(self) -> str:
        """What is wrong with who breaks it: `motion_px > 20.0`."""
        return f"{self.column} {'<' if self.is_minimum else '>'} {self.bound:g}"

    def breaks(self, values: Floats) -> Bools:
        """NaN breaks no rule: it stands for what does not apply."""
        return values < self.bound if self.is_minimum else values > self.bound


@dataclass(frozen=True)
class Reasons:
    """A reason for every row, empty where nothing is broken."""

    codes: Codes
    """[rows]"""
    texts: tuple[str, ...]
    """By code; the first is empty."""

    @property
    def passes(self) -> Bools:
        return self.codes == PASSES

    def text(self, row: int) -> str:
        return self.texts[self.codes[row]]


def raw_rules(thresholds: RawThresholds) -> list[Rule]:
    """Table 3. The frame rate's bound is lowered by its tolerance, so that rounded time stamps do not matter."""
    return [
        Rule("duration_s", thresholds.duration_min_s, True),
        Rule("short_side_px", thresholds.short_side_min_px, True),
        Rule("bitrate_bps", thresholds.bitrate_min_bps, True),
        Rule("frame_rate", thresholds.frame_rate_min - thresholds.frame_rate_tolerance, True),
    ]


def tier_rules(tier: TierThresholds, thresholds: Thresholds) -> list[Rule]:
    """A column of table 4, and the filters of figure 2."""
    return [
        *size_rules(tier, thresholds.long_side_tolerance),
        Rule("similarity", tier.similarity_min, True),
        Rule("motion_px", tier.motion_min_px, True),
        Rule("motion_px", tier.motion_max_px, False),
        Rule("ocr", tier.ocr_max, False),
        Rule("aesthetic", tier.aesthetic_min, True),
        Rule("nsfw", thresholds.nsfw_max, False),
        Rule("watermark", thresholds.watermark_max, False),
    ]


def size_rules(tier: TierThresholds, long_side_tolerance: float) -> list[Rule]:
    """Sides are compared shorter with shorter, whichever way a picture stands (A11)."""
    return [
        Rule("short_side_px", tier.short_side_min_px, True),
        Rule("long_side_px", tier.long_side_min_px * (1 - long_side_tolerance), True),
    ]


def judge(columns: Mapping[str, Floats], rules: Sequence[Rule], *, is_image: Bools, missing: Bools) -> Reasons:
    """The first broken rule of every row.

    Args:
        columns: [rows] each, by name; a rule whose column is not there is not asked about.
        is_image: [rows]; no rule about time is asked of an image.
        missing: [rows]; a score that was asked for is not there yet.
    """
    texts = ["", *(rule.reason for rule in rules), NOT_SCORED]
    codes = np.full(len(is_image), PASSES, dtype=np.int16)
    for number, rule in enumerate(rules, start=1):
        if rule.column in columns:
            broken = rule.breaks(columns[rule.column])
            if rule.column in VIDEO_ONLY:
                broken &= ~is_image
            codes[broken & (codes == PASSES)] = number
    codes[missing & (codes == PASSES)] = len(texts) - 1
    return Reasons(codes, tuple(texts))


def raw_reason(facts: Mapping[str, Any], thresholds: RawThresholds) -> str:
    """Why table 3 refuses a source; empty where it does not."""
    columns = {name: np.array([facts[name]], dtype=np.float64) for name in ("duration_s", "bitrate_bps", "frame_rate")}
    columns["short_side_px"] = np.array([min(facts["height"], facts["width"])], dtype=np.float64)
    is_image = np.array([facts["kind"] == "image"])
    return judge(columns, raw_rules(thresholds), is_image=is_image, missing=np.array([False])).text(0)


def split_threshold(height: int, width: int, at: str, thresholds: Thresholds) -> float:
    """The cosine below which neighbouring samples are parted (A4): of the highest tier that the size reaches."""
    tiers = list(thresholds.tiers.values())
    columns = {"short_side_px": np.array([min(height, width)]), "long_side_px": np.array([max(height, width)])}
    reached = [
        tier
        for tier in tiers
        if not any(rule.breaks(columns[rule.column])[0] for rule in size_rules(tier, thresholds.long_side_tolerance))
    ]
    return (reached[-1] if reached and at == "source" else tiers[0]).similarity_min


def duplicates(kept: Bools, ones: NDArray[np.int64], others: NDArray[np.int64], aesthetic: Floats) -> dict[int, int]:
    """Kept clips that give way to an alike clip of their source, each with that clip (paper 4.2, A7).

    The clip with the higher aesthetic score stays; of equals, the one that comes first.

    Args:
        kept: [clips]; what other rules refuse takes nobody's place.
        ones, others: [pairs] of alike clips, by their numbers.
        aesthetic: [clips]; NaN where there is none.
    """
    alive = kept[ones] & kept[others]
    neighbours: dict[int, list[int]] = {}
    for one, other in zip(ones[alive].tolist(), others[alive].tolist(), strict=True):
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
    score = np.nan_to_num(aesthetic, nan=-np.inf)
    gone: dict[int, int] = {}
    for clip in sorted(neighbours, key=lambda number: (-score[number], number)):
        if clip not in gone:
            for other in neighbours[clip]:
                gone.setdefault(other, clip)
    return gone
