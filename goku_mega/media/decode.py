"""Video and image files to frames, exact to the frame, on the CPU (PyAV)."""

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.errors import MediaError

Frames = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
SEEK_ABOVE_FRAMES = 12
"""Frames to the wanted one that are decoded and dropped rather than sought over, where a key frame allows both."""


def decode_media(path: Path, *, max_frames: int | None = None) -> Frames:
    """An image or a video as [frames, height, width, 3], by suffix; an image is one frame.

    Raises:
        MediaError: the file is missing, damaged or holds no picture.
    """
    return decode_image(path) if is_image(path) else decode_video(path, max_frames=max_frames)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def decode_image(path: Path) -> Frames:
    """[1, height, width, 3], upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot decode the image ({_reason(error, path)})") from error


def decode_video(path: Path, *, max_frames: int | None = None) -> Frames:
    """The first `max_frames` frames (all without it), [frames, height, width, 3].

    Raises:
        MediaError: as `decode_media`; also for a file with damaged pictures, and for one cut short:
            it states more frames than it holds.
    """
    with PyAvVideo(path) as video:
        return np.stack(list(islice(video.stream(), max_frames)))


class PyAvVideo:
    """One open video file. Frames are numbered as they are shown, from 0; pictures stand upright.

    Attributes:
        frames: how many frames the file shows.
        times_s: when each frame is shown, seconds from the first, [frames] float64.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """
        Raises:
            MediaError: the file is missing, damaged or holds no video.
        """
        import av

        self.path = path
        self._errors = (av.FFmpegError, OSError, ValueError)
        try:
            self._container = av.open(str(path))
        except self._errors as error:
            raise self._failure(error) from error
        try:
            self._stream = self._video_stream()
            self._stream.codec_context.thread_count = threads
            self._read_index()
        except self._errors as error:
            self.close()
            raise self._failure(error) from error
        except MediaError:
            self.close()
            raise

    def __enter__(self) -> "PyAvVideo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in px as shown: after the rotation that the file states."""
        height, width = self.read([0]).shape[1:3]
        return height, width

    def read(self, numbers: Sequence[int], size: tuple[int, int] | None = None) -> Frames:
        """The frames of these numbers, in this order, [numbers, height, width, 3].

        Args:
            size: (height, width) to scale to.

        Raises:
            MediaError: a number that the video does not have, or a damaged picture on the way.
        """
        wanted = sorted(set(numbers))
        pictures = dict(zip(wanted, self._pictures(wanted, size), strict=True))
        return np.stack([pictures[number] for number in numbers])

    def stream(
        self, first: int = 0, count: int | None = None, *, step: int = 1, size: tuple[int, int] | None = None
    ) -> Iterator[Frames]:
        """Every `step`-th frame [height, width, 3] of the `count` (all without it) from `first` on, one at a time.

        Raises:
            MediaError: as `read`.
        """
        return self._pictures(range(first, self.frames if count is None else first + count, step), size)

    def _video_stream(self) -> Any:
        if not self._container.streams.video:
            raise MediaError(f"{self.path}: has no video stream")
        stream = self._container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError(f"{self.path}: cannot decode the video (there is no decoder for it)")
        return stream

    def _read_index(self) -> None:
        """When every frame is shown, from the packets alone; those that an edit list hides are not shown."""
        hidden, shown, keys = 0, set(), set()
        for packet in self._container.demux(self._stream):
            if packet.is_discard:
                hidden += 1
            elif packet.pts is not None:
                shown.add(packet.pts)
                if packet.is_keyframe:
                    keys.add(packet.pts)
        stated = self._stream.frames - hidden
        if not shown or len(shown) < stated:
            raise MediaError(
                f"{self.path}: the video is cut short: {len(shown)} of {max(stated, 1)} frames can be decoded"
            )
        self._pts, self._keys = sorted(shown), sorted(keys)
        self.frames = len(self._pts)
        self.times_s = (np.array(self._pts) - self._pts[0]) * float(self._stream.time_base)

    def _pictures(self, numbers: Sequence[int], size: tuple[int, int] | None) -> Iterator[Frames]:
        """The pictures of ascending numbers, sought where that is shorter than decoding on."""
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < self.frames:
            wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
            raise MediaError(f"{self.path}: has no frame {wrong}; its frames are 0 to {self.frames - 1}")
        decoded, at = iter(()), -1
        try:
            for number in numbers:
                key = bisect_right(self._pts, self._key_before(self._pts[number])) - 1
                if at < 0 or key > at + SEEK_ABOVE_FRAMES:
                    decoded = self._decode_from(self._pts[number])
                yield _picture(self._next(decoded, number), size)
                at = number
        except self._errors as error:
            raise self._failure(error) from error

    def _key_before(self, pts: int) -> int:
        place = bisect_right(self._keys, pts) - 1
        return self._keys[place] if place >= 0 else self._pts[0]

    def _decode_from(self, pts: int) -> Iterator[Any]:
        """Decoded frames from the key frame before `pts` on."""
        key = self._key_before(pts)
        for target in (key, self._pts[0]):
            self._container.seek(target, stream=self._stream)
            decoded = self._container.decode(self._stream)
            first = next(decoded, None)
            if first is not None and first.pts is not None and first.pts <= pts:
                break  # a file's index may lead behind the frame; then from the start
        return chain(() if first is None else (first,), decoded)

    def _next(self, decoded: Iterator[Any], number: int) -> Any:
        """The frame of a number, out of frames that come before it."""
        pts, key = self._pts[number], self._key_before(self._pts[number])
        for frame in decoded:
            if frame.is_corrupt and frame.pts is not None and key <= frame.pts <= pts:  # FFmpeg guesses the rest
                raise MediaError(f"{self.path}: frame {bisect_right(self._pts, frame.pts) - 1} of the video is damaged")
            if frame.pts == pts:
                return frame
            if frame.pts is not None and frame.pts > pts:
                break
        raise MediaError(f"{self.path}: the video is cut short: {number} of {self.frames} frames can be decoded")

    def _failure(self, error: BaseException) -> MediaError:
        return MediaError(f"{self.path}: cannot decode the video ({_reason(error, self.path)})")


def _picture(frame: Any, size: tuple[int, int] | None) -> Frames:
    """An upright picture [height, width, 3] in RGB of 8 bits."""
    turns = round(frame.rotation / 90) % 4
    if size is not None:
        height, width = size if turns % 2 == 0 else size[::-1]
        frame = frame.reformat(width=width, height=height, format="rgb24")
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _reason(error: BaseException, path: Path) -> str:
    return "no such file" if not path.exists() else (str(error).splitlines() or [type(error).__name__])[0]
