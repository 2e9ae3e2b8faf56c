"""What a source is, from its packets and its first picture: the facts that the rules of table 3 are about."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from goku_mega.errors import MediaError
from goku_mega.media.decode import PyAvVideo, decode_image, is_image
from goku_mega.media.pyav import video_stream

UNEVEN_S = 2e-3
"""A frame shown this much sooner or later than a constant rate asks for makes the rate a varying one; containers that
count milliseconds stay below it."""


@dataclass(frozen=True)
class ProbeScore:
    """Facts of a source; an image has the width and height alone."""

    kind: str
    """video or image."""
    height: int
    """px, upright."""
    width: int
    frames: int
    frame_rate: float
    """Average, frames a second."""
    rate_numerator: int
    rate_denominator: int
    """The same as a fraction."""
    varying_rate: bool
    duration_s: float
    """Of the video stream."""
    bitrate_bps: float
    """Of the video stream, bits a second (paper's kbps: 1,000 of them)."""
    codec: str
    pixel_format: str
    turned: bool
    """The file states a rotation."""
    gop_frames: int
    """Largest distance of key frames."""
    file_bytes: int


def probe(path: Path) -> ProbeScore:
    """
    Raises:
        MediaError: the file is missing, damaged or holds no picture.
    """
    return _probe_image(path) if is_image(path) else _probe_video(path)


def average_rate(times_s: np.ndarray, declared: Fraction | None, tick_s: float) -> Fraction:
    """Frames a second: what the container declares where its time stamps agree to their resolution, else their mean.

    Args:
        times_s: when each frame is shown, [frames].
        tick_s: resolution of the container's time stamps.
    """
    if len(times_s) == 1:
        return declared or Fraction(1)
    span = float(times_s[-1] - times_s[0])
    gaps = len(times_s) - 1
    if declared and abs(gaps / float(declared) - span) <= 1.5 * tick_s + 1e-9:
        return declared
    return Fraction(gaps / span).limit_denominator(1001 * 1000)


def _probe_image(path: Path) -> ProbeScore:
    height, width = decode_image(path).shape[1:3]
    return ProbeScore(
        kind="image", height=height, width=width, frames=1, frame_rate=0.0, rate_numerator=0, rate_denominator=1,
        varying_rate=False, duration_s=0.0, bitrate_bps=0.0, codec=path.suffix.lower().lstrip("."),
        pixel_format="rgb24", turned=False, gop_frames=1, file_bytes=path.stat().st_size,
    )  # fmt: skip


def _probe_video(path: Path) -> ProbeScore:
    with PyAvVideo(path) as video:
        times_s, (height, width) = video.times_s, video.size
    about = _packets(path)
    rate = average_rate(times_s, about.declared_rate, about.tick_s)
    even = times_s[0] + np.arange(len(times_s)) / float(rate)
    varying = bool(np.abs(times_s - even).max() > max(UNEVEN_S, 1.5 * about.tick_s))
    last_s = 1 / float(rate)
    duration_s = float(times_s[-1]) + last_s if varying else len(times_s) / float(rate)
    return ProbeScore(
        kind="video", height=height, width=width, frames=len(times_s), frame_rate=float(rate),
        rate_numerator=rate.numerator, rate_denominator=rate.denominator, varying_rate=varying, duration_s=duration_s,
        bitrate_bps=8 * about.video_bytes / duration_s, codec=about.codec, pixel_format=about.pixel_format,
        turned=(height, width) != about.coded_size or about.turned, gop_frames=about.gop_frames,
        file_bytes=path.stat().st_size,
    )  # fmt: skip


@dataclass(frozen=True)
class _Packets:
    """What the packets of a video stream say without being decoded."""

    video_bytes: int
    gop_frames: int
    declared_rate: Fraction | None
    tick_s: float
    codec: str
    pixel_format: str
    coded_size: tuple[int, int]
    turned: bool


def _packets(path: Path) -> _Packets:
    import av

    try:
        with av.open(str(path)) as container:
            stream = video_stream(container)
            video_bytes, keys = 0, []
            count = 0
            for packet in container.demux(stream):
                video_bytes += packet.size
                if packet.size:
                    keys += [count] if packet.is_keyframe else []
                    count += 1
            container.seek(0)
            first = next(container.decode(stream))
            return _Packets(
                video_bytes, int(np.diff([*keys, count]).max()) if keys else count, stream.average_rate,
                float(stream.time_base), stream.codec_context.name, first.format.name, (first.height, first.width),
                first.rotation % 360 != 0,
            )  # fmt: skip
    except (av.FFmpegError, OSError, ValueError, StopIteration) as error:
        raise MediaError(f"{path}: cannot read the video's packets ({error})") from error
