"""Clips of frames at hand, for tests of stages."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from made_media import Encoding, write_clip

from goku_mega.curate.clip import Clip, Footage

FRAME_RATE = 24


def write_and_open(
    path: Path, frames: Iterator[np.ndarray], *, key_frames: Sequence[int] = (0,), crf: int | None = None
) -> Clip:
    """All frames of a file, through H.264: by default of the quality of standardised sources."""
    write_clip(path, frames, Encoding(rate=FRAME_RATE, options={"crf": str(18 if crf is None else crf), "g": "48"}))
    footage = Footage(path)
    return Clip("clip", footage, 0, footage._video.frames, float(FRAME_RATE), tuple(key_frames))


def pictures_as_clip(path: Path, frames: np.ndarray) -> Clip:
    """Key frames [frames, height, width, 3] that no encoder has touched."""
    clip = Clip("clip", Footage(path), 0, len(frames), float(FRAME_RATE), tuple(range(len(frames))))
    clip.__dict__["key_frames"] = frames
    return clip
