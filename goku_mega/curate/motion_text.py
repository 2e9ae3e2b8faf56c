"""The motion score at the end of a caption, which prompts may set too (paper 4.2), and back out of it."""

import math
import re

MOTION_TEXT = re.compile(r"(?:(?P<caption>.+) )?Motion score: (?P<motion>(?:0|[1-9][0-9]*)\.[0-9])\.", re.DOTALL)


def with_motion(caption: str, motion_px: float) -> str:
    """The caption with its motion behind it: `A cat jumps. Motion score: 3.2.`

    Args:
        motion_px: mean length of the optical flow, px; written with one decimal.

    Raises:
        ValueError: the motion is no number of 0 or more.
    """
    if not (math.isfinite(motion_px) and motion_px >= 0):
        raise ValueError(f"the motion is {motion_px}; it must be 0 px or more")
    motion = f"Motion score: {motion_px + 0.0:.1f}."  # no minus before a zero
    return f"{caption} {motion}" if caption else motion


def split_motion(caption: str) -> tuple[str, float | None]:
    """The caption and its motion, px; of a caption without one, the same caption and None.

    The inverse of `with_motion`, to the letter: a full stop is neither added nor taken away.
    """
    match = MOTION_TEXT.fullmatch(caption)
    return (match["caption"] or "", float(match["motion"])) if match else (caption, None)
