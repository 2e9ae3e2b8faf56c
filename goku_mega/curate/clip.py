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
    """One source, shared by its clips: a video, or an image, which is one frame. Opened when it is first read.

    Reading raises MediaError where the file cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_image = is_image(path)

    def close(self) -> None:
        if "_video" in self.__dict__:
            self._video.close()
            del self._video

    @property
    def frames(self) -> int:
        return 1 if self.is_image else self._video.frames

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), px."""
        if self.is_image:
            return self._image.shape[1], self._image.shape[2]
        return self._video.size

    def read(self, numbers: Sequence[int]) -> Frames:
        """Frames by number, [numbers, height, width, 3]."""
        return self._image[list(numbers)] if self.is_image else self._video.read(numbers)

    def stream(self, first: int, count: int, *, size: tuple[int, int] | None = None) -> Iterator[Frames]:
        """`count` frames of a video from `first` on, one at a time, [height, width, 3], scaled to `size`."""
        return self._video.stream(first, count, size=size)

    @functools.cached_property
    def _video(self) -> PyAvVideo:
        return PyAvVideo(self.path)

    @functools.cached_property
    def _image(self) -> Frames:
        return decode_image(self.path)


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
