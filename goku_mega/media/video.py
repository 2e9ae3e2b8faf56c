"""What every decoder offers: frames of one video by number, exact to the frame. Not how they are decoded."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from goku_mega.errors import MediaError

Frames = NDArray[np.uint8]

BACKEND_TOLERANCE = 3.0
"""Mean absolute difference, of 255 levels, that one frame may have between two backends, of pictures whose
finest detail is 8 px.

They decode the same picture and differ in the way to RGB: PyAV's (FFmpeg's quick one) is about 1.2 levels darker
than the truth, DALI's 0.3, and colour is stored at half the size, which DALI smooths and FFmpeg repeats. Measured:
torchcodec 0 at the video's own size, DALI 1.4; scaled 0.6 to 1.0 and 1.8 to 2.3, where the next frame of a pan of
3 px is 30 away. Detail of 1 px is where they differ most: 9 of 58 levels on noise.
"""


class Video(Protocol):
    """One open video file. Frames are numbered as they are shown, from 0; pictures stand upright."""

    path: Path
    frames: int
    """How many frames the file shows."""
    times_s: NDArray[np.float64]
    """When each frame is shown, seconds from the first, [frames]."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px as shown: after the rotation that the file states."""

    def read(self, numbers: Sequence[int], size: tuple[int, int] | None = None) -> Frames:
        """The frames of these numbers, in this order, [numbers, height, width, 3].

        Args:
            size: (height, width) to scale to.

        Raises:
            MediaError: a number that the video does not have, or a picture that cannot be decoded.
        """

    def stream(
        self, first: int = 0, count: int | None = None, *, step: int = 1, size: tuple[int, int] | None = None
    ) -> Iterator[Frames]:
        """Every `step`-th frame [height, width, 3] of the `count` (all without it) from `first` on, one at a time.

        Memory does not grow with the count. Other reads may come between two frames.

        Raises:
            MediaError: as `read`.
        """

    def close(self) -> None:
        """Give back file and decoder."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def streamed_numbers(path: Path, frames: int, first: int, count: int | None, step: int) -> range:
    """The numbers that `Video.stream` yields.

    Raises:
        MediaError: a number that the video does not have, or a step below 1.
    """
    if step < 1:
        raise MediaError(f"{path}: cannot step through the video by {step} frames; use 1 or more")
    numbers = range(first, frames if count is None else first + count, step)
    check_numbers(path, frames, numbers)
    return numbers


def check_numbers(path: Path, frames: int, numbers: Sequence[int]) -> None:
    """
    Raises:
        MediaError: a number that the video does not have.
    """
    for number in (min(numbers), max(numbers)) if len(numbers) else ():
        if not 0 <= number < frames:
            raise MediaError(f"{path}: has no frame {number}; its frames are 0 to {frames - 1}")


def one_line(error: BaseException, path: Path) -> str:
    """Why a file could not be decoded, as the library that failed says it."""
    return "no such file" if not path.exists() else (str(error).strip().splitlines() or [type(error).__name__])[0]
