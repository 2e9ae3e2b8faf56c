"""Video frames by number through PyAV, on the CPU: the default, and what the other backends are held against."""

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from goku_mega.errors import MediaError
from goku_mega.media.orientation import AS_STORED, DisplayMatrix, display_matrix, is_mirrored, stored_size, upright
from goku_mega.media.video import Frames, check_numbers, one_line, streamed_numbers

SEEK_ABOVE_FRAMES = 12
"""Frames to the wanted one that are decoded and dropped rather than sought over, where a key frame allows both."""
SHORT_BY_S = 0.25
"""How much earlier than the file states its pictures may end before it counts as cut short."""
TIMED_FORMATS = frozenset({"mov", "matroska", "mpegts", "flv"})
"""Containers that store when each frame is shown. AVI and raw streams do not: there FFmpeg guesses."""
PLAIN_FORMATS = frozenset({"mov", "matroska"})
"""Containers that seek to exactly the frame that is asked for."""
ONE_FRAME_A_PACKET = frozenset({"h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg", "ffv1", "prores"})
"""Codecs whose packets each show one frame. VP8, for one, has packets that show none."""


@dataclass(frozen=True)
class PacketIndex:
    """What the packets of a video stream say, without decoding any.

    Only they say when frames are shown: PyAV's `index_entries` hold decoding times in mp4 and key frames alone
    in Matroska, so they cannot number frames where B-frames are shown in another order than they are stored.
    """

    pts: list[int]
    """Of shown frames, ascending; some are missing or alike where `has_own_times` is false."""
    key_pts: list[int]
    hidden: int
    """Frames that an edit list hides."""
    repeats: int
    """Empty packets, by which AVI lets the last picture stand."""
    packets: int
    """Of shown frames."""
    end_pts: int

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        return {pts: number for number, pts in enumerate(self.pts)}

    def has_own_times(self) -> bool:
        """Whether every shown frame has a time of its own."""
        return len(self.numbers) == len(self.pts) == self.packets

    def key_before(self, pts: int) -> int:
        place = bisect_right(self.key_pts, pts) - 1
        return self.key_pts[place] if place >= 0 else self.pts[0]


@dataclass
class Run:
    """Decoding from one place of a file on."""

    frames: Iterator[Any]
    is_from_start: bool
    at: int = -1
    """Number of the frame decoded last."""


class PyAvVideo:
    """One open video file (`goku_mega.media.video.Video`).

    A frame is found by the time at which it is shown. Where a file does not store these times, or two frames
    share one, frames are counted from the start instead: as exact, but the file is decoded once at opening,
    and every step back starts over.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """
        Raises:
            MediaError: the file is missing, damaged, cut short or holds no video.
        """
        import av

        self.path = path
        self._threads = threads
        self._errors = (av.FFmpegError, OSError, ValueError, ArithmeticError)
        self._container: Any = None
        self._run: Run | None = None
        self._orientation: DisplayMatrix | None = None
        try:
            self._open()
            self._read_index()
        except self._errors as error:
            self.close()
            raise self._failure(error) from error
        except MediaError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._run = None
        if self._container is not None:
            self._container.close()

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in px as shown: after the rotation that the file states."""
        height, width = self.read([0]).shape[1:3]
        return height, width

    @property
    def orientation(self) -> DisplayMatrix:
        if self._orientation is None:
            self.read([0])
        return self._orientation or AS_STORED

    @property
    def start_s(self) -> float:
        """The file's own time of the first frame, seconds."""
        return self.index.pts[0] * self._tick_s if self.index.pts else 0.0

    @property
    def codec(self) -> str:
        """FFmpeg's name: h264, hevc, vp9, ..."""
        name: str = self._stream.codec_context.codec.canonical_name
        return name

    @property
    def is_plain(self) -> bool:
        """Whether frames stand in the file as they are shown: from time 0 on, none hidden, none mirrored."""
        if not self._is_timed or self._format not in PLAIN_FORMATS:
            return False
        return self.index.pts[0] >= 0 and not self.index.hidden and not is_mirrored(self.orientation)

    def read(self, numbers: Sequence[int], size: tuple[int, int] | None = None) -> Frames:
        """The frames of these numbers, in this order, [numbers, height, width, 3]; see `Video.read`."""
        check_numbers(self.path, self.frames, numbers)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(number, []).append(place)
        wanted = sorted(places)
        frames: Frames | None = None
        for number, picture in zip(wanted, self._pictures(wanted, size), strict=True):
            if frames is None:
                frames = np.empty((len(numbers), *picture.shape), dtype=np.uint8)
            frames[places[number]] = picture
        return np.empty((0, *(size or self.size), 3), dtype=np.uint8) if frames is None else frames

    def stream(
        self, first: int = 0, count: int | None = None, *, step: int = 1, size: tuple[int, int] | None = None
    ) -> Iterator[Frames]:
        """Every `step`-th frame [height, width, 3] from `first` on; see `Video.stream`."""
        return self._pictures(streamed_numbers(self.path, self.frames, first, count, step), size)

    def _open(self) -> None:
        """From the start; whatever was open before is closed."""
        import av

        self.close()
        self._container = av.open(str(self.path))
        self._format = self._container.format.name.split(",")[0]
        stream = video_stream(self._container)
        if stream is None:
            raise MediaError(f"{self.path}: has no video stream")
        self._stream = stream
        if self._stream.codec_context is None:
            raise MediaError(f"{self.path}: cannot decode the video (there is no decoder for it)")
        self._stream.codec_context.thread_count = self._threads
        for stream in self._container.streams:
            if stream is not self._stream:
                stream.discard = av.stream.Discard.all

    def _read_index(self) -> None:
        self.index = _packet_index(self._container, self._stream)
        self._tick_s = float(self._stream.time_base or 0)
        stated = self._stated_frames() - self.index.hidden - self.index.repeats
        if not self.index.packets or self.index.packets < stated:
            raise MediaError(
                f"{self.path}: the video is cut short: it has {self.index.packets} of {max(stated, 1)} frames"
            )
        self._check_end()
        timed = self._format in TIMED_FORMATS
        self._is_timed = timed and self.codec in ONE_FRAME_A_PACKET and self.index.has_own_times()
        self.frames = len(self.index.pts) if self._is_timed else self._counted()
        if timed and self.frames == self.index.packets == len(self.index.pts):
            self.times_s = (np.array(self.index.pts) - self.index.pts[0]) * self._tick_s
        else:
            self.times_s = np.arange(self.frames) / self._stated_rate()

    def _stated_frames(self) -> int:
        """As the file's head says; 0 where it says nothing."""
        if self._format == "mov" and self._stream.frames:
            return len(self._stream.index_entries)  # less the groups of pictures that an edit list leaves out whole
        frames: int = self._stream.frames
        return frames

    def _stated_rate(self) -> float:
        """Frames a second."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        if not rate:
            raise MediaError(f"{self.path}: the video states neither times nor a frame rate")
        return float(rate)

    def _check_end(self) -> None:
        """Matroska states no number of frames, but when the last one ends."""
        stated_s = self._format == "matroska" and _seconds(self._stream.metadata.get("DURATION", ""))
        ends_s = self.index.end_pts * self._tick_s
        if stated_s and ends_s < stated_s - SHORT_BY_S:
            raise MediaError(f"{self.path}: the video is cut short: it ends after {ends_s:.2f} of {stated_s:.2f} s")

    def _counted(self) -> int:
        self._open()
        count = 0
        for frame in self._container.decode(self._stream):
            if frame.is_corrupt:
                raise MediaError(f"{self.path}: frame {count} of the video is damaged")
            count += 1
        if not count:
            raise MediaError(f"{self.path}: has no picture that can be decoded")
        return count

    def _pictures(self, numbers: Sequence[int], size: tuple[int, int] | None) -> Iterator[Frames]:
        shape: tuple[int, ...] | None = None
        for number, frame in zip(numbers, self._frames(numbers), strict=True):
            try:
                if self._orientation is None:
                    self._orientation = display_matrix(frame)
                picture = _picture(frame, size, self._orientation)
            except self._errors as error:
                raise self._failure(error) from error
            if picture.shape != (shape or picture.shape):
                raise MediaError(f"{self.path}: the video's size changes at frame {number}; read it with a size")
            shape = picture.shape
            yield picture

    def _frames(self, numbers: Sequence[int]) -> Iterator[Any]:
        """Decoded frames of ascending numbers, sought where that is shorter than decoding on."""
        for number in numbers:
            try:
                frame = self._frame(number)
            except self._errors as error:
                self._run = None
                raise self._failure(error) from error
            except MediaError:
                self._run = None
                raise
            yield frame

    def _frame(self, number: int) -> Any:
        run, key = self._run, self._key_number(number)
        if run is None or run.at >= number or key > run.at + SEEK_ABOVE_FRAMES:
            run = self._run = self._run_to(number)
        frame = self._advance(run, number)
        if frame is None and not run.is_from_start:  # not every key frame gives all that follows: intra refresh
            run = self._run = self._run_from_start()
            frame = self._advance(run, number)
        if frame is None:
            raise MediaError(f"{self.path}: frame {number} of the video cannot be decoded; it is damaged or cut short")
        return frame

    def _key_number(self, number: int) -> int:
        """Number of the first frame shown from the key frame before a frame on."""
        if not self._is_timed:
            return 0
        return max(bisect_right(self.index.pts, self.index.key_before(self.index.pts[number])) - 1, 0)

    def _run_to(self, number: int) -> Run:
        """From a key frame before a frame on, else from the start."""
        if self._is_timed and number > 0:
            pts = self.index.pts[number]
            key = self.index.key_before(pts)
            for target in dict.fromkeys((key, self.index.key_before(key - 1))):
                self._container.seek(target, stream=self._stream)
                packets = self._container.demux(self._stream)
                first = next(packets)
                # A file's own index may lead behind the frame, or between key frames.
                if first.is_keyframe and first.pts is not None and first.pts <= pts:
                    return Run(_decoded(chain((first,), packets)), is_from_start=False)
        return self._run_from_start()

    def _run_from_start(self) -> Run:
        self._open()
        return Run(_decoded(self._container.demux(self._stream)), is_from_start=True)

    def _advance(self, run: Run, number: int) -> Any:
        """The frame of a number, out of frames that come before it; None if it does not come."""
        key = self._key_number(number)
        for frame in run.frames:
            at = self.index.numbers.get(frame.pts) if self._is_timed else run.at + 1
            if at is None:
                continue
            run.at = at
            if frame.is_corrupt and key <= at <= number:  # FFmpeg guesses the rest
                raise MediaError(f"{self.path}: frame {at} of the video is damaged")
            if at >= number:
                return frame if at == number else None
        return None

    def _failure(self, error: BaseException) -> MediaError:
        return MediaError(f"{self.path}: cannot decode the video ({one_line(error, self.path)})")


def video_stream(container: Any) -> Any:
    """The first stream of moving pictures, and not the cover of an album; None if there is none."""
    import av

    covers = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & covers), None)


def _decoded(packets: Iterator[Any]) -> Iterator[Any]:
    return (frame for packet in packets for frame in packet.decode())


def _packet_index(container: Any, stream: Any) -> PacketIndex:
    pts, key_pts, hidden, repeats, packets, end_pts = [], [], 0, 0, 0, 0
    for packet in container.demux(stream):
        if not packet.size:
            repeats += packet.dts is not None
            continue
        if packet.is_keyframe and packet.pts is not None:
            key_pts.append(packet.pts)
        if packet.is_discard:
            hidden += 1
            continue
        packets += 1
        if packet.pts is not None:
            pts.append(packet.pts)
            end_pts = max(end_pts, packet.pts + (packet.duration or 0))
    return PacketIndex(sorted(pts), sorted(key_pts), hidden, repeats, packets, end_pts)


def _seconds(duration: str) -> float:
    """Of Matroska's "hours:minutes:seconds"; 0 where it is none."""
    try:
        hours, minutes, seconds = duration.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


def _picture(frame: Any, size: tuple[int, int] | None, matrix: DisplayMatrix) -> Frames:
    """An upright picture [height, width, 3] in RGB of 8 bits."""
    height, width = stored_size(size, matrix) if size else (frame.height, frame.width)
    # One thread: for pictures of this size others cost more than they give.
    pixels: Frames = frame.reformat(width=width, height=height, format="rgb24", threads=1).to_ndarray()
    return upright(pixels, matrix)
