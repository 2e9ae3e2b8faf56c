"""A video that PyAV numbers and another library decodes: what those backends have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from goku_mega.media.pyav import PyAvVideo
from goku_mega.media.video import Frames, check_numbers, streamed_numbers

STREAM_BYTES = 64 * 2**20
"""How much a stream decodes at once: such libraries begin anew at every call."""


class IndexedVideo(ABC):
    """One open video file (`goku_mega.media.video.Video`); number, times and size are PyAV's."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            MediaError: as `PyAvVideo`.
        """
        self.path = path
        self._known = PyAvVideo(path)
        self.frames = self._known.frames
        self.times_s = self._known.times_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._known.close()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px as shown: after the rotation that the file states."""
        return self._known.size

    def read(self, numbers: Sequence[int], size: tuple[int, int] | None = None) -> Frames:
        """The frames of these numbers, in this order, [numbers, height, width, 3]; see `Video.read`."""
        check_numbers(self.path, self.frames, numbers)
        if not len(numbers):
            return np.empty((0, *(size or self.size), 3), dtype=np.uint8)
        return self._decode(numbers, size)

    def stream(
        self, first: int = 0, count: int | None = None, *, step: int = 1, size: tuple[int, int] | None = None
    ) -> Iterator[Frames]:
        """Every `step`-th frame [height, width, 3] from `first` on; see `Video.stream`."""
        numbers = streamed_numbers(self.path, self.frames, first, count, step)
        height, width = size or self.size
        at_once = max(STREAM_BYTES // (3 * height * width), 1)
        return (frame for start in range(0, len(numbers), at_once)
                for frame in self._decode(numbers[start : start + at_once], size))  # fmt: skip

    @abstractmethod
    def _decode(self, numbers: Sequence[int], size: tuple[int, int] | None) -> Frames:
        """Upright frames of numbers that exist, [numbers, height, width, 3]."""
