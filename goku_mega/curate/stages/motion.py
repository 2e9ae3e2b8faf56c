"""Motion of a clip: mean length of its optical flow between frames a fixed time apart, at a fixed size (paper 4.2).

A pan of v px a gap scores v; in footage compressed as usual the error is a few thousandths of a pixel, so scores are
given to the hundredth. OpenCV's DIS and a fit by default (`flow`), or RAFT with weights (`networks.raft`).
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.curation import MotionConfig
from goku_mega.curate.clip import Clip, Frames
from goku_mega.curate.stages.flow import cell_flow
from goku_mega.errors import MissingExtra

WORKING_SHARE = 0.5
"""Of `short_side_px`, at which flow without weights is found: as exact there, in a quarter of the time."""
SMALLEST_SIDE_PX = 96
ANTIALIAS_PX = 0.6
DECIMALS = 2
STEADY_PX, STEADY_SHARE = 0.05, 0.02
"""How far the length of a pair may be from the median of all for the motion to be called steady."""

Array = NDArray[np.float32]
Length = Callable[[Frames, Frames, int], float]
"""Mean length of the flow from one frame [height, width, 3] to another, px of frames of that short side."""


@dataclass(frozen=True)
class MotionScore:
    """
    Attributes:
        mean_px: mean length of the flow over pairs of frames, px a gap, to the hundredth.
        per_pair: of each pair.
    """

    mean_px: float
    per_pair: tuple[float, ...]


class Motion:
    def __init__(self, config: MotionConfig) -> None:
        """
        Raises:
            ConfigError: RAFT's weights cannot be loaded.
            MissingExtra: OpenCV is not installed.
        """
        self._config = config
        if config.engine == "raft":
            from goku_mega.curate.networks.raft import FlowByRaft

            self._length: Length = FlowByRaft(Path(config.weights), config.device).mean_length
        else:
            require_opencv()
            self._length = mean_length

    def score(self, clip: Clip) -> MotionScore:
        """
        Raises:
            MediaError: the clip's frames cannot be decoded.
        """
        config = self._config
        gap, stride = frame_steps(clip.frame_rate, clip.frames, config.gap_s, 1 / config.pairs_per_second)
        if clip.is_image or gap == 0:
            return MotionScore(0.0, ())
        to_gap = config.gap_s * clip.frame_rate / gap
        lengths = tuple(
            to_gap * self._length(first, second, config.short_side_px) for first, second in _pairs(clip, gap, stride)
        )
        return MotionScore(round(steady_mean(lengths), DECIMALS), lengths)


def steady_mean(lengths: Sequence[float]) -> float:
    """The mean, to which lengths that lie about their median count as the median.

    The first frames after a key frame shift a little until the codec has filled in their detail: by up to 0.04 px
    where all frames move alike. Lengths that differ by more than that are motion.
    """
    middle = statistics.median(lengths)
    near = STEADY_PX + STEADY_SHARE * middle
    return math.fsum(middle if abs(length - middle) <= near else length for length in lengths) / len(lengths)


def frame_steps(frame_rate: float, frames: int, gap_s: float, stride_s: float) -> tuple[int, int]:
    """Frames from the first to the second of a pair, 0 where there is no second, and from one pair to the next."""
    return min(max(1, round(gap_s * frame_rate)), frames - 1), max(1, round(stride_s * frame_rate))


def pair_starts(frames: int, gap: int, stride: int) -> list[int]:
    """Numbers of the pairs' first frames, from the clip's own: as many as fit, in its middle."""
    count = (frames - 1 - gap) // stride + 1
    offset = (frames - 1 - gap - (count - 1) * stride) // 2
    return [offset + stride * number for number in range(count)]


def mean_length(first: Frames, second: Frames, short_side_px: int) -> float:
    """By `flow.cell_flow`, px of frames brought to `short_side_px`."""
    side = max(round(short_side_px * WORKING_SHARE), SMALLEST_SIDE_PX)
    small = [_grey(frame, side) for frame in (first, second)]
    flow, pixels = cell_flow(*small)
    scale = short_side_px / min(first.shape[:2])
    to_px = np.array([first.shape[1] / small[0].shape[1], first.shape[0] / small[0].shape[0]]) * scale
    return float((np.linalg.norm(flow * to_px, axis=-1) * pixels).sum() / pixels.sum())


def require_opencv() -> None:
    """
    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise MissingExtra("OpenCV is not installed; run: pip install goku-mega[curate]") from error


def _grey(frame: Frames, short_side_px: int) -> Array:
    """[height, width] levels of 255, the shorter of this many pixels."""
    import cv2

    scale = short_side_px / min(frame.shape[:2])
    size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY).astype(np.float32)
    if scale < 1:  # details too fine for the smaller size would move in it as they do not in the frame
        grey = np.asarray(cv2.GaussianBlur(grey, (0, 0), ANTIALIAS_PX / scale))
    return np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR))


def _pairs(clip: Clip, gap: int, stride: int) -> Iterator[tuple[Frames, Frames]]:
    """Pairs in order; no more frames are held at a time than lie open."""
    starts = pair_starts(clip.frames, gap, stride)
    step = math.gcd(gap, stride)
    last = starts[-1] + gap
    seconds = {start + gap for start in starts}
    opened: dict[int, Frames] = {}
    stream = clip.footage.stream(clip.first + starts[0], last - starts[0] + 1)
    for number, frame in zip(range(starts[0], last + 1, step), islice(stream, 0, None, step), strict=True):
        if number in seconds:
            yield opened.pop(number - gap), frame
        if (number - starts[0]) % stride == 0:
            opened[number] = frame
