"""A clip as the stages see it: frames of a standardised source, decoded when they are asked for."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from goku_mega.media.decode import PyAvVideo, decode_image, is_image

Frames = NDArray[np.uint8]


class Footage:
    """One open source, shared by its clips: a video, or an image, which is one frame."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            MediaError: the file cannot be decoded.
        """
        self.path = path
        self.is_image = is_image(path)
        self._image = decode_image(path) if self.is_image else None
        self._video = None if self.is_image else PyAvVideo(path)

    def close(self) -> None:
        if self._video is not None:
            self._video.close()

    @property
    def frames(self) -> int:
        return 1 if self._video is None else self._video.frames

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        if self._video is not None:
            return self._video.size
        assert self._image is not None
        return self._image.shape[1], self._image.shape[2]

    def read(self, numbers: Sequence[int]) -> Frames:
        """Frames by number, [numbers, height, width, 3]."""
        if self._video is not None:
            return self._video.read(numbers)
        assert self._image is not None
        return self._image[list(numbers)]

    def stream(self, first: int, count: int, step: int = 1) -> Iterator[Frames]:
        """Every `step`-th of `count` frames from `first` on, one at a time, [height, width, 3]."""
        if self._video is not None:
            return self._video.stream(first, count, step=step)
        assert self._image is not None
        return iter(self._image)


@dataclass(frozen=True)
class Clip:
    """Frames `first` to `first + frames` of a source."""

    key: str
    """Content key of the source, first frame, number of frames."""
    footage: Footage
    first: int
    frames: int
    frame_rate: float
    """Frames a second."""
    key_frame_numbers: tuple[int, ...]
    """Frames of the source that stand for the clip."""

    @property
    def is_image(self) -> bool:
        return self.footage.is_image

    @property
    def duration_s(self) -> float:
        return self.frames / self.frame_rate

    @functools.cached_property
    def key_frames(self) -> Frames:
        """[key frames, height, width, 3]"""
        return self.footage.read(self.key_frame_numbers)

    def spread(self, count: int) -> Frames:
        """`count` frames evenly spread over the clip, each once, from the middle of equal parts."""
        numbers = sorted({self.first + (2 * part + 1) * self.frames // (2 * count) for part in range(count)})
        return self.footage.read(numbers)
