"""Clips of at most ten seconds (paper 4.2), and the frames that stand for each of them."""

import math

ROUNDING = 1e-6
"""Frames' worth of rounding that a length in seconds may be off by."""


def windows(first: int, frames: int, frame_rate: float, *, max_s: float, min_s: float) -> list[tuple[int, int]]:
    """Consecutive windows (first frame, frames) of a span: each as long as may be; a rest that is too short is dropped.

    Args:
        frame_rate: frames a second.
    """
    longest = max(1, math.floor(max_s * frame_rate + ROUNDING))
    shortest = min(longest, max(1, math.ceil(min_s * frame_rate - ROUNDING)))  # a whole window is no short rest
    starts = range(0, frames, longest)
    cut = [(first + start, min(longest, frames - start)) for start in starts]
    return [window for window in cut if window[1] >= shortest]


def key_frame_numbers(first: int, frames: int, frame_rate: float, per_second: float) -> tuple[int, ...]:
    """Frames at the middle of equal parts of a clip, about `per_second` of them a second, at least one."""
    count = min(frames, max(1, round(frames / frame_rate * per_second)))
    return tuple(first + (2 * part + 1) * frames // (2 * count) for part in range(count))
