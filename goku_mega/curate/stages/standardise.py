"""Sources to H.264 with short groups and a constant rate (paper 4.2), so that every later stage reads alike files."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.curation import StandardiseConfig
from goku_mega.curate.stages.probe import ProbeScore
from goku_mega.media.decode import PyAvVideo
from goku_mega.media.write import write_h264

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class StandardScore:
    """The file that later stages read."""

    as_it_is: bool
    """The source itself is such a file."""
    frames: int
    frame_rate: float
    """Frames a second, constant."""
    height: int
    width: int


def is_standard(facts: ProbeScore, config: StandardiseConfig) -> bool:
    """Whether a source needs no other encoding."""
    return (
        facts.codec in ("h264", "libx264")
        and facts.pixel_format in ("yuv420p", "yuvj420p")
        and facts.gop_frames <= config.gop_frames
        and not facts.varying_rate
        and not facts.turned
        and facts.height % 2 == facts.width % 2 == 0
    )


def standardise(source: Path, target: Path, facts: ProbeScore, config: StandardiseConfig) -> StandardScore:
    """Write `target`, whole, unless the source is standard already.

    Raises:
        MediaError: the source cannot be decoded to its end.
    """
    rate = Fraction(facts.rate_numerator, facts.rate_denominator)
    height, width = facts.height, facts.width
    if is_standard(facts, config):
        return StandardScore(True, facts.frames, float(rate), height, width)
    height, width = height - height % 2, width - width % 2
    count = itertools.count()
    with PyAvVideo(source) as video:
        frames = _constant_rate(video, rate) if facts.varying_rate else video.stream()
        even = (frame[:height, :width] for frame in frames)
        counted = (frame for frame, _ in zip(even, count, strict=False))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_h264(target, counted, rate, crf=config.crf, gop_frames=config.gop_frames, preset=config.preset)
    return StandardScore(False, next(count), float(rate), height, width)


def _constant_rate(video: PyAvVideo, rate: Fraction) -> Iterator[Frames]:
    """The frame that is shown at each tick of a constant rate."""
    times_s = video.times_s
    ticks = np.arange(max(1, round(float(times_s[-1] * float(rate))) + 1)) / float(rate)
    shown = np.clip(np.searchsorted(times_s, ticks + 1e-6, side="right") - 1, 0, len(times_s) - 1)
    repeats = np.bincount(shown, minlength=len(times_s))
    for frame, times in zip(video.stream(), repeats, strict=True):
        for _ in range(times):
            yield frame
