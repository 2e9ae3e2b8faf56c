"""Real media for tests, made on the spot: pictures whose content says what they are, and one writer for every
codec, container, rate and defect. Frames are [height, width, 3] uint8; sizes are (height, width) in px."""

import functools
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, product
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

NTSC_FILM = Fraction(24000, 1001)
"""23.976... frames a second."""
BARS = tuple(product((235, 16), repeat=3))
NUMBER_BITS = 12
NUMBER_ROWS, NUMBER_COLUMNS = 3, 4
WAVES = 24
"""Sinusoids in a texture."""
FILLER_OVERHEAD_BYTES = 6
"""Length, header and end of a filler unit of H.264."""


# Pictures


def counting(count: int, size: tuple[int, int] = (48, 64), *, first: int = 0) -> Iterator[Picture]:
    """Pictures that carry their number, readable at any scale, and stand upright (see `is_upright`)."""
    for number in range(first, first + count):
        yield numbered(number, size)


def numbered(number: int, size: tuple[int, int]) -> Picture:
    """A red and blue strip above 12 bits in white and black, most significant first."""
    height, width = size
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[: height // 4, : width // 2] = (220, 30, 30)
    picture[: height // 4, width // 2 :] = (30, 30, 220)
    for bit in range(NUMBER_BITS):
        top, left, bottom, right = _bit_box(bit, size)
        picture[top:bottom, left:right] = 235 * (number >> (NUMBER_BITS - 1 - bit) & 1)
    return picture


def number_in(picture: Picture) -> int:
    """What `numbered` wrote; -1 where the picture is none of it."""
    number = 0
    for bit in range(NUMBER_BITS):
        top, left, bottom, right = _bit_box(bit, picture.shape[:2])
        inset_y, inset_x = (bottom - top) // 4, (right - left) // 4
        level = picture[top + inset_y : bottom - inset_y, left + inset_x : right - inset_x].mean()
        if 90 < level < 150:
            return -1
        number = 2 * number + int(level > 120)
    return number


def numbers_in(pictures: Iterable[Picture]) -> list[int]:
    return [number_in(picture) for picture in pictures]


def is_upright(picture: Picture) -> bool:
    """Whether red is at the upper left of a numbered picture and blue at its upper right."""
    height, width = picture.shape[:2]
    left = picture[height // 16 : height // 6, width // 8 : 3 * width // 8].reshape(-1, 3).mean(axis=0)
    right = picture[height // 16 : height // 6, 5 * width // 8 : 7 * width // 8].reshape(-1, 3).mean(axis=0)
    return bool(left[0] > left[2] + 80 and right[2] > right[0] + 80)


def _bit_box(bit: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of one bit: three quarters of the picture, in a grid."""
    height, width = size
    row, column = divmod(bit, NUMBER_COLUMNS)
    edges = [height // 4 + part * (height - height // 4) // NUMBER_ROWS for part in (row, row + 1)]
    return edges[0], column * width // NUMBER_COLUMNS, edges[1], (column + 1) * width // NUMBER_COLUMNS


@dataclass(frozen=True)
class Texture:
    """A smooth endless picture: sinusoids of random direction, so it can be sampled between pixels exactly."""

    seed: int = 0
    finest_px: float = 8
    """Shortest wave. Shorter is sharper; below 4 an encoder smears it."""
    contrast: float = 50
    """Standard deviation of the brightness, of 255."""
    tint: tuple[float, float, float] | None = None
    """Mean colour; drawn by the seed without it."""

    def at(self, size: tuple[int, int], offset: tuple[float, float] = (0, 0)) -> Picture:
        """The picture seen from `offset` (y, x) px: a detail at (y, x) appears at (y, x) - offset."""
        (along_y, along_x, phase, weight), tint = _waves(self.seed, self.finest_px), self.tint
        rows = np.exp(1j * (np.outer(np.arange(size[0]) + offset[0], along_y) + phase))  # [height, waves]
        columns = np.exp(1j * np.outer(along_x, np.arange(size[1]) + offset[1]))  # [waves, width]
        rows, columns = rows.astype(np.complex64), columns.astype(np.complex64)
        waves = (rows.real * weight) @ columns.real - (rows.imag * weight) @ columns.imag  # [height, width]
        mean = np.array(tint) if tint else np.random.default_rng(self.seed).uniform(90, 165, 3)
        colors = np.clip(np.arange(256)[:, None] - 128 + mean, 0, 255).astype(np.uint8)  # [levels, 3]
        return colors[np.clip(waves * np.float32(self.contrast) + 128, 0, 255).astype(np.uint8)]


@functools.cache
def _waves(seed: int, finest_px: float) -> tuple[NDArray[np.float32], ...]:
    rng = np.random.default_rng(seed)
    turn, length = rng.uniform(0, 2 * np.pi, WAVES), finest_px * np.exp(rng.uniform(0, 2, WAVES))
    weight = np.full(WAVES, np.sqrt(2 / WAVES))
    arrays = (2 * np.pi / length * np.sin(turn), 2 * np.pi / length * np.cos(turn), rng.uniform(0, 7, WAVES), weight)
    return tuple(array.astype(np.float32) for array in arrays)


def still(count: int, picture: Picture) -> Iterator[Picture]:
    """The same picture again and again."""
    return (picture for _ in range(count))


def solid(count: int, size: tuple[int, int], color: tuple[int, int, int] = (90, 120, 150)) -> Iterator[Picture]:
    return still(count, np.full((*size, 3), color, dtype=np.uint8))


def pan(
    count: int, size: tuple[int, int], speed: tuple[float, float], texture: Texture | None = None
) -> Iterator[Picture]:
    """A texture that moves by exactly `speed` (y, x) px a frame, downwards and to the right where positive."""
    texture = texture or Texture()
    if not all(float(part).is_integer() for part in speed):
        yield from (texture.at(size, (-number * speed[0], -number * speed[1])) for number in range(count))
        return
    along_y, along_x = (int(part) * (count - 1) for part in speed)
    canvas = texture.at((size[0] + abs(along_y), size[1] + abs(along_x)), (-max(along_y, 0), -max(along_x, 0)))
    for number in range(count):
        top = max(along_y, 0) - number * int(speed[0])
        left = max(along_x, 0) - number * int(speed[1])
        yield canvas[top : top + size[0], left : left + size[1]]


def test_pattern(count: int, size: tuple[int, int], seed: int = 0) -> Iterator[Picture]:
    """Colour bars, a ramp that walks, and noise: every frame differs from every other in fine detail."""
    height, width = size
    rng, bars = np.random.default_rng(seed), np.array(BARS, dtype=np.uint8)
    base = bars[np.arange(width) * len(bars) // width][None].repeat(height, axis=0)
    ramp = (np.arange(width) * 256 // width).astype(np.uint8)
    for number in range(count):
        picture = base.copy()
        picture[height // 2 : 3 * height // 4] = np.roll(ramp, 3 * number)[None, :, None]
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 4 + 1, 3), dtype=np.uint8)
        noise = coarse.repeat(2, axis=0).repeat(4, axis=1)
        picture[3 * height // 4 :] = noise[: height - 3 * height // 4, :width]
        yield picture


test_pattern.__test__ = False  # type: ignore[attr-defined]


def cross_fade(before: Iterable[Picture], after: Iterable[Picture], count: int) -> Iterator[Picture]:
    """`count` pictures from one scene to the other; `before` and `after` go on beneath."""
    pairs = islice(zip(before, after, strict=False), count)
    for number, (old, new) in enumerate(pairs, start=1):
        share = number / (count + 1)
        yield np.rint((1 - share) * old + share * new).astype(np.uint8)


@dataclass(frozen=True)
class Lettering:
    """Drawn lines of text, and the share of the picture that their boxes cover."""

    mask: Image.Image
    box_share: float
    """Area of the lines' tight boxes over the area of the picture."""

    def over(self, pictures: Iterable[Picture], color: tuple[int, int, int] = (250, 250, 250)) -> Iterator[Picture]:
        for picture in pictures:
            image = Image.fromarray(picture)
            image.paste(color, mask=self.mask)
            yield np.asarray(image)


def lettering(size: tuple[int, int], share: float, words: str = "BREAKING NEWS TONIGHT") -> Lettering:
    """One to eight equal lines whose boxes cover about `share` of a picture; the true share is in the result."""
    height, width = size
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    lines, font_px = _lines_and_font_px(size, share, words)
    font, top, area = ImageFont.load_default(size=font_px), height // 20, 0.0
    for _ in range(lines):
        left, upper, right, lower = draw.textbbox((width // 20, top), words, font=font)
        draw.text((width // 20, top), words, fill=255, font=font)
        area += (right - left) * (lower - upper)
        top += int(1.5 * (lower - upper))
    return Lettering(mask, area / (height * width))


def _lines_and_font_px(size: tuple[int, int], share: float, words: str) -> tuple[int, float]:
    """The fewest lines, of 10 px type or more, that come nearest to the share and fit in."""
    height, width = size
    draw, found = ImageDraw.Draw(Image.new("L", (1, 1))), []
    for font_px in np.arange(10, height / 6, 0.25):
        left, upper, right, lower = draw.textbbox((0, 0), words, font=ImageFont.load_default(size=float(font_px)))
        for lines in range(1, 9):
            if right - left < 0.9 * width and 1.5 * lines * (lower - upper) < 0.85 * height:
                off = abs(lines * (right - left) * (lower - upper) / (height * width) / share - 1)
                found.append((round(off, 2), lines, float(font_px)))
    if not found:
        raise ValueError(f"{words!r} does not fit into {size}")
    return min(found)[1:]


# Files


@dataclass(frozen=True)
class Encoding:
    """How pictures become a file. The suffix of the path chooses the container."""

    codec: str = "libx264"
    """libx264, libx265, libvpx-vp9, libvpx, libsvtav1, mpeg4, mjpeg, ffv1, ..."""
    rate: Fraction | int = 24
    """Frames a second."""
    gop: int = 48
    b_frames: int = 0
    pixel_format: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    bitrate: int | None = None
    """Bits a second of the video stream that the encoder aims at; for an exact one see `pad_to_bitrate`."""
    container_options: dict[str, str] = field(default_factory=dict)
    sound: bool = False
    """A second stream, silence in AAC or, in WebM, Opus."""


FAST = {
    "libx264": {"preset": "ultrafast", "crf": "20", "threads": "1"},
    "libx265": {"preset": "ultrafast", "crf": "20"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0", "threads": "1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "1M", "threads": "1"},
    "libsvtav1": {"preset": "8", "crf": "10"},
    "mpeg4": {"qscale": "3", "flags": "+qscale", "global_quality": str(3 * 118)},
    "mjpeg": {"flags": "+qscale", "global_quality": str(3 * 118)},
}


def write_clip(
    path: Path, pictures: Iterable[Picture], encoding: Encoding | None = None, *, ticks: Sequence[int] | None = None
) -> Path:
    """A file of these pictures.

    Args:
        ticks: when each picture is shown, in 1/1000 s; at the encoding's rate without it.
    """
    encoding = encoding or Encoding()
    pictures = iter(pictures)
    first = next(pictures)
    with av.open(str(path), "w", options=encoding.container_options) as container:
        stream = _video_stream(container, encoding, first.shape[:2], milliseconds=ticks is not None)
        sound = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000, layout="mono") \
            if encoding.sound else None  # fmt: skip
        count = 0
        last: Picture | None = None
        for number, picture in enumerate(_and_rest(first, pictures)):
            if picture is not last:  # the same picture again is converted once
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame, last = frame.reformat(format=encoding.pixel_format, threads=1), picture
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
            count = number + 1
        if sound is not None:
            _encode_silence(container, sound, count / Fraction(encoding.rate))
        container.mux(stream.encode())
    return path


def _video_stream(container, encoding: Encoding, size: tuple[int, int], *, milliseconds: bool):
    stream = container.add_stream(encoding.codec, rate=Fraction(encoding.rate))
    stream.height, stream.width, stream.pix_fmt = *size, encoding.pixel_format
    context = stream.codec_context
    context.gop_size, context.max_b_frames = encoding.gop, encoding.b_frames
    context.time_base = Fraction(1, 1000) if milliseconds else 1 / Fraction(encoding.rate)
    options = FAST.get(encoding.codec, {}) | {"flags": "+bitexact"}
    if encoding.codec in ("mpeg4", "mjpeg"):
        options["flags"] += "+qscale"
    if encoding.codec == "libx264":
        options |= {"bf": str(encoding.b_frames), "g": str(encoding.gop)}
    if encoding.bitrate is not None:
        options = {key: value for key, value in options.items() if key not in ("crf", "global_quality", "b")}
        context.bit_rate = encoding.bitrate
    stream.options = options | encoding.options
    return stream


def _encode_silence(container, sound, duration_s: Fraction) -> None:
    step = 960
    for number in range(int(duration_s * sound.rate) // step):
        silence = av.AudioFrame.from_ndarray(np.zeros((1, step), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts, silence.time_base = sound.rate, number * step, Fraction(1, sound.rate)
        container.mux(sound.encode(silence))
    container.mux(sound.encode())


def _and_rest(first: Picture, rest: Iterator[Picture]) -> Iterator[Picture]:
    yield first
    yield from rest


def pad_to_bitrate(path: Path, bits_per_second: int, duration_s: Fraction | int) -> Path:
    """Give an H.264 mp4 or mkv exactly this bitrate, by filler units spread over its pictures.

    Raises:
        ValueError: the pictures already take more, or the duration holds no whole number of bytes.
    """
    bits = bits_per_second * Fraction(duration_s)
    if bits % 8:
        raise ValueError(f"{bits} bits are no whole number of bytes")
    padded = path.with_name(f"padded-{path.name}")
    with av.open(str(path)) as source, av.open(str(padded), "w") as target:
        video = source.streams.video[0]
        copy = target.add_stream_from_template(video)
        packets = [packet for packet in source.demux(video) if packet.size]
        spare = int(bits) // 8 - sum(packet.size for packet in packets)
        if spare and spare < FILLER_OVERHEAD_BYTES:
            raise ValueError(f"the pictures take {-spare} bytes more than {bits_per_second} bits a second hold")
        shares = _shares(spare, len(packets))
        for packet, share in zip(packets, shares, strict=True):
            filled = av.Packet(bytes(packet) + _filler(share))
            filled.pts, filled.dts, filled.duration = packet.pts, packet.dts, packet.duration
            filled.time_base, filled.is_keyframe, filled.stream = packet.time_base, packet.is_keyframe, copy
            target.mux(filled)
    return padded.replace(path)


def _shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` nearly equal ones, each 0 or long enough for a filler unit."""
    parts_used = min(parts, total // FILLER_OVERHEAD_BYTES)
    shares = [total // parts_used + (part < total % parts_used) for part in range(parts_used)] if parts_used else []
    return shares + [0] * (parts - parts_used)


def _filler(length: int) -> bytes:
    return struct.pack(">IB", length - 4, 12) + b"\xff" * (length - FILLER_OVERHEAD_BYTES) + b"\x80" if length else b""


# Defects and oddities


QUARTER_TURNS = {
    0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0),
}  # fmt: skip
"""Degrees clockwise that a player turns the stored picture -> the matrix's a, b, c, d."""
MIRRORED = (-1, 0, 0, 1)


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Tell players of an mp4 or mov to turn or mirror the stored pictures, as a phone does."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def turned_for(pictures: Iterable[Picture], degrees: int) -> Iterator[Picture]:
    """Pictures stored so that they stand upright once a player turns them by `degrees` clockwise."""
    return (np.rot90(picture, degrees // 90) for picture in pictures)


def shift_times(
    path: Path, target: Path, shift_s: Fraction, *, container_options: dict[str, str] | None = None
) -> Path:
    """The same packets, all times later by `shift_s`; earlier than 0 becomes an edit list in mp4."""
    with av.open(str(path)) as source, av.open(str(target), "w", options=container_options or {}) as sink:
        video = source.streams.video[0]
        copy = sink.add_stream_from_template(video)
        shift = int(shift_s / video.time_base)
        for packet in source.demux(video):
            if packet.dts is not None and packet.pts is not None:
                packet.stream, packet.pts, packet.dts = copy, packet.pts + shift, packet.dts + shift
                sink.mux(packet)
    return target


def remux(path: Path, target: Path, *, container_options: dict[str, str] | None = None) -> Path:
    """The same packets in another container."""
    return shift_times(path, target, Fraction(0), container_options=container_options)


def truncate(path: Path, share: float) -> Path:
    """Keep the first `share` of a file's bytes."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def corrupt(path: Path, seed: int, changes: int = 40, *, after: float = 0.3) -> Path:
    """Change bytes at random in the part of a file behind `after` of its length."""
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for place in rng.integers(int(after * len(content)), len(content), changes):
        content[place] ^= int(rng.integers(1, 256))
    path.write_bytes(bytes(content))
    return path


def copy_of(path: Path, target: Path) -> Path:
    return Path(shutil.copyfile(path, target))


def retime(path: Path, target: Path, ticks: Sequence[int]) -> Path:
    """The same packets, shown at other times, in 1/1000 s; for files without B-frames. Times may repeat."""
    with av.open(str(path)) as source, av.open(str(target), "w") as sink:
        video = source.streams.video[0]
        copy = sink.add_stream_from_template(video)
        packets = [packet for packet in source.demux(video) if packet.size]
        for packet, tick in zip(packets, ticks, strict=True):
            packet.stream, packet.time_base, packet.pts, packet.dts = copy, Fraction(1, 1000), tick, tick
            sink.mux(packet)
    return target
