"""A corpus of made clips, each breaking one rule or standing on either side of a bound, with the verdict it must get.

The motion of a pan is written down in the units of table 4 as this project reads it: px in 1/8 s at a short side of
480 px. Every scene but those about text, bit rate or brightness is a smooth texture in steady motion.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import numpy as np
from made_media import (
    Encoding,
    Picture,
    Texture,
    cross_fade,
    pad_to_bitrate,
    pan,
    set_display_matrix,
    truncate,
    turned_for,
    write_clip,
)  # fmt: skip
from PIL import Image, ImageDraw, ImageFont

P480, P720, P1080 = (480, 854), (720, 1280), (1080, 1920)
NTSC = Fraction(24000, 1001)
BITRATE = 1_000_000
"""Of every clip that is not about it, where its pictures take less."""
GAP_S = Fraction(1, 8)
SHORT_SIDE_PX = 480
DARK, MIDDLE, BRIGHT = 60, 110, 160
TIERS = ("480p", "720p", "1080p")

Write = Callable[[Path], object]


@dataclass(frozen=True)
class Made:
    """A source that will be made, and what must become of it."""

    name: str
    write: Write
    tiers: tuple[str, ...] = ()
    """Highest tier of each clip that it must be cut into, in order; empty for a clip in no tier."""
    refused: str = ""
    """Beginning of the reason why it is not cut into clips at all."""
    spans: tuple[tuple[int, int], ...] = ()
    """(first frame, frames) of each clip, where that is what the source is about."""


def texture(seed: int, size: tuple[int, int]) -> Texture:
    """Details of the same share of the picture in every size."""
    return Texture(seed=seed, finest_px=12 * size[0] / SHORT_SIDE_PX)


def moving(count: int, size: tuple[int, int], motion: float, rate: Fraction | int, seed: int) -> Iterator[Picture]:
    """A pan whose motion score is `motion`."""
    frames_in_gap = round(GAP_S * rate)
    scale = min(size) / SHORT_SIDE_PX
    return pan(count, size, (0.0, motion / frames_in_gap * scale), texture(seed, size))


@dataclass
class Corpus:
    """Collects what is to be made; every source has a seed of its own, so none is another's copy."""

    made: list[Made] = field(default_factory=list)

    def add(self, name: str, write: Write, *tiers: str, **expected) -> None:
        self.made.append(Made(name, write, tiers, **expected))

    def clip(
        self, name: str, *tiers: str, size: tuple[int, int] = P480, frames: int = 104, motion: float = 2.0,
        rate: Fraction | int = 24, bitrate: int | None = BITRATE, encoding: Encoding | None = None,
        draw: Callable[[Iterator[Picture]], Iterator[Picture]] | None = None, **expected,
    ) -> None:  # fmt: skip
        """One scene in steady motion, drawn over by `draw`."""
        seed = len(self.made)

        def write(path: Path) -> None:
            pictures = moving(frames, size, motion, rate, seed)
            write_clip(path, draw(pictures) if draw else pictures, encoding or Encoding(rate=rate))
            if bitrate is not None:
                pad(path, bitrate, Fraction(frames) / rate)

        self.add(name, write, *tiers, **expected)


def pad(path: Path, bitrate: int, duration_s: Fraction) -> None:
    """Bring a file up to a bit rate; one that has more keeps it."""
    whole_bytes = 8 * (int(bitrate * duration_s) // 8 + 1)
    try:
        pad_to_bitrate(path, Fraction(whole_bytes) / duration_s, duration_s)  # type: ignore[arg-type]
    except ValueError:
        assert path.exists()


def whole_corpus() -> list[Made]:
    """All sources, in a fixed order."""
    corpus = Corpus()
    _durations(corpus)
    _sizes(corpus)
    _bitrates(corpus)
    _rates(corpus)
    _codecs(corpus)
    _broken(corpus)
    _motions(corpus)
    _texts(corpus)
    _cuts(corpus)
    _lengths(corpus)
    _repetitions(corpus)
    _images(corpus)
    return corpus.made


def _durations(corpus: Corpus) -> None:
    bounds = {24: 96, NTSC: 96, 25: 100, 30: 120, Fraction(30000, 1001): 120, 48: 192, 50: 200, 60: 240}
    for rate, frames in bounds.items():
        for count in (frames - 1, frames, frames + 1):
            tiers, refused = (("480p",), "") if count >= frames else ((), "duration_s <")
            corpus.clip(f"duration-{float(rate):.3f}-{count}.mp4", *tiers, frames=count, rate=rate, refused=refused)
    corpus.clip("duration-1s.mp4", frames=24, refused="duration_s <")


def _sizes(corpus: Corpus) -> None:
    sizes = {
        (480, 864): "480p", (480, 854): "480p", (480, 848): "480p", (480, 846): "", (480, 640): "", (480, 720): "",
        (576, 1024): "480p", (600, 800): "", (718, 1280): "480p", (720, 1280): "720p", (720, 1256): "720p",
        (720, 1254): "480p", (720, 960): "480p", (854, 480): "480p", (1280, 720): "720p", (1078, 1920): "720p",
        (1080, 1920): "1080p", (1080, 1884): "1080p", (1080, 1880): "720p", (1080, 1440): "720p", (1920, 1080): "1080p",
        (480, 1200): "480p", (700, 700): "", (1080, 1080): "480p",
    }  # fmt: skip
    for size, tier in sizes.items():
        corpus.clip(f"size-{size[0]}x{size[1]}.mp4", tier, size=size, frames=97)
    for size in ((478, 854), (360, 640), (240, 426), (854, 478), (1920, 478)):
        corpus.clip(f"size-{size[0]}x{size[1]}.mp4", size=size, frames=97, refused="short_side_px <")


def _bitrates(corpus: Corpus) -> None:
    for bitrate in (499_999, 500_000, 500_001, 400_000, 501_000, 499_000, 2_000_000):
        tiers, refused = (("480p",), "") if bitrate >= 500_000 else ((), "bitrate_bps <")

        def write(path: Path, bitrate: int = bitrate, seed: int = len(corpus.made)) -> None:
            pictures = moving(192, P480, 2.0, 24, seed)
            write_clip(path, pictures, Encoding(options={"crf": "38", "preset": "veryfast"}))
            pad_to_bitrate(path, bitrate, 8)

        corpus.add(f"bitrate-{bitrate}.mp4", write, *tiers, refused=refused)
        corpus.add(f"bitrate-{bitrate}.mkv", write, *tiers, refused=refused)


def _rates(corpus: Corpus) -> None:
    passing = (NTSC, Fraction(23976, 1000), 24, 25, Fraction(30000, 1001), 30, 48, 50, Fraction(60000, 1001), 60)
    for rate in passing:
        corpus.clip(f"rate-{float(rate):.5f}.mp4", "480p", rate=rate, frames=int(4.2 * rate) + 1)
        corpus.clip(f"rate-{float(rate):.5f}.mkv", "480p", rate=rate, frames=int(4.2 * rate) + 1)
    for rate in (Fraction(2397, 100), 23, Fraction(15), Fraction(12), Fraction(2390, 100)):
        for suffix in (".mp4", ".mkv"):
            corpus.clip(f"rate-{float(rate):.5f}{suffix}", rate=rate, frames=int(5 * rate) + 1, refused="frame_rate <")


def _codecs(corpus: Corpus) -> None:
    kinds = {
        "h264-gop12.mp4": Encoding(gop=12), "h264-gop250.mp4": Encoding(gop=250), "h264-b.mkv": Encoding(b_frames=3),
        "hevc.mp4": Encoding(codec="libx265"), "hevc10.mkv": Encoding(codec="libx265", pixel_format="yuv420p10le"),
        "vp9.webm": Encoding(codec="libvpx-vp9"), "av1.mp4": Encoding(codec="libsvtav1"),
        "mpeg4.avi": Encoding(codec="mpeg4"), "mjpeg.mov": Encoding(codec="mjpeg", pixel_format="yuvj420p"),
        "sound.mp4": Encoding(sound=True),
    }  # fmt: skip
    for name, encoding in kinds.items():
        corpus.clip(f"codec-{name}", "480p", encoding=encoding, bitrate=None, draw=grain)

    def turned(path: Path, seed: int = len(corpus.made)) -> None:
        write_clip(path, turned_for(moving(100, (854, 480), 2.0, 24, seed), 90), Encoding())
        pad(path, BITRATE, Fraction(100, 24))
        set_display_matrix(path, (0, 1, -1, 0))

    corpus.add("codec-turned.mp4", turned, "480p")

    def varying(path: Path, seed: int = len(corpus.made)) -> None:
        ticks = np.cumsum([0, *([35, 45] * 60)]).tolist()
        write_clip(path, grain(moving(len(ticks), P480, 2.0, 25, seed)), Encoding(), ticks=ticks)

    corpus.add("codec-varying.mkv", varying, "480p")


def grain(pictures: Iterator[Picture]) -> Iterator[Picture]:
    """Fine noise that stands still relative to nothing much: enough bits for any codec."""
    rng = np.random.default_rng(0)
    for picture in pictures:
        noise = rng.integers(-6, 7, (*picture.shape[:2], 1), dtype=np.int16)
        yield np.clip(picture.astype(np.int16) + noise, 0, 255).astype(np.uint8)


def _broken(corpus: Corpus) -> None:
    def good(path: Path, seed: int) -> Path:
        write_clip(path, moving(100, P480, 2.0, 24, seed), Encoding(container_options={"movflags": "faststart"}))
        return path

    for share in (0.3, 0.9):
        corpus.add(
            f"broken-cut-{share}.mp4",
            lambda path, share=share: truncate(good(path, 7), share),
            refused="set aside in probe: media",
        )
    corpus.add("broken-no-index.mp4", lambda path: truncate(write_clip(path, moving(100, P480, 2.0, 24, 8)), 0.7),
               refused="set aside in probe: media")  # fmt: skip
    corpus.add("broken-empty.mp4", lambda path: path.write_bytes(b""), refused="set aside in probe: media")
    corpus.add("broken-noise.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(200_000)),
               refused="set aside in probe: media")  # fmt: skip
    corpus.add(
        "broken-text.mkv", lambda path: path.write_text("this is no video\n" * 100), refused="set aside in probe: media"
    )
    corpus.add(
        "broken-webpage.webm", lambda path: path.write_text("<html>404</html>"), refused="set aside in probe: media"
    )


def _motions(corpus: Corpus) -> None:
    wanted = {
        P480: {0.29: "", 0.30: "480p", 0.31: "480p", 0.5: "480p", 1.0: "480p", 4.0: "480p", 12.0: "480p",
               19.9: "480p", 20.0: "480p", 20.1: "", 0.0: "", 0.2: ""},
        P720: {0.29: "", 0.30: "480p", 0.49: "480p", 0.50: "720p", 0.51: "720p", 3.0: "720p", 8.1: "720p",
               14.9: "720p", 15.0: "720p", 15.1: "480p", 20.0: "480p", 20.1: ""},
        P1080: {0.29: "", 0.49: "480p", 0.50: "1080p", 2.0: "1080p", 7.9: "1080p", 8.0: "1080p", 8.1: "720p",
                15.1: "480p", 20.1: ""},
    }  # fmt: skip
    for size, tiers in wanted.items():
        for motion, tier in tiers.items():
            corpus.clip(f"motion-{size[0]}-{motion:.2f}.mp4", tier, size=size, motion=motion, frames=97)
    corpus.clip("motion-480-30fps-20.0.mp4", "480p", motion=20.0, rate=32, frames=130)
    corpus.clip("motion-480-2.0-upright.mp4", "480p", motion=2.0, size=(854, 480), frames=97)


def _texts(corpus: Corpus) -> None:
    wanted = {
        P480: {0.004: "480p", 0.018: "480p", 0.0225: "", 0.05: "", 0.15: ""},
        P720: {0.004: "720p", 0.009: "720p", 0.0113: "480p", 0.018: "480p", 0.0225: ""},
        P1080: {0.004: "1080p", 0.009: "1080p", 0.0113: "480p", 0.018: "480p", 0.0225: "", 0.05: ""},
    }  # fmt: skip
    for size, tiers in wanted.items():
        for share, tier in tiers.items():
            corpus.clip(f"text-{size[0]}-{share}.mp4", tier, size=size, frames=97, draw=one_line(size, share))


def one_line(
    size: tuple[int, int], share: float, words: str = "NEWS"
) -> Callable[[Iterator[Picture]], Iterator[Picture]]:
    """One line of text in white, whose tight box covers this share of the picture."""
    height, width = size
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))

    def box(font_px: float) -> tuple[float, float, float, float]:
        return draw.textbbox((0, 0), words, font=ImageFont.load_default(size=font_px))

    def off(font_px: float) -> float:
        left, upper, right, lower = box(font_px)
        return abs((right - left) * (lower - upper) / (height * width) - share)

    def over(pictures: Iterator[Picture]) -> Iterator[Picture]:
        font_px = min(np.arange(8, height / 2, 0.25).tolist(), key=off)
        assert off(font_px) < 0.04 * share, (size, share, off(font_px))
        mask = Image.new("L", (width, height))
        place = (width // 10, height // 4)
        ImageDraw.Draw(mask).text(place, words, fill=255, font=ImageFont.load_default(size=font_px))
        for picture in pictures:
            # A quiet ground: over the strong texture of the other clips no detector tells every letter.
            image = Image.fromarray((90 + picture // 4).astype(np.uint8))
            image.paste((250, 250, 250), mask=mask)
            yield np.asarray(image)

    return over


def _cuts(corpus: Corpus) -> None:
    cases = ((100, 80), (60, 61, 62), (120,), (50, 49, 100), (96, 48, 48), (55, 110, 70), (49, 51), (72, 73))
    for number, lengths in enumerate(cases):
        firsts = [0, *np.cumsum(lengths)[:-1].tolist()]
        spans = tuple(zip(firsts, lengths, strict=True))

        def write(path: Path, lengths: tuple[int, ...] = lengths, seed: int = 1000 + 10 * number) -> None:
            parts = (moving(length, P480, 2.0, 24, seed + part) for part, length in enumerate(lengths))
            write_clip(path, chain.from_iterable(parts), Encoding())
            pad(path, BITRATE, Fraction(sum(lengths), 24))

        corpus.add(f"cuts-{number}.mp4", write, *["480p"] * len(lengths), spans=spans)

    def fading(path: Path) -> None:
        one, other = (moving(400, P480, 2.0, 24, seed) for seed in (2000, 2001))
        before = islice(one, 72)
        write_clip(path, chain(before, cross_fade(one, other, 48), islice(other, 72)), Encoding())
        pad(path, BITRATE, Fraction(192, 24))

    # It is parted somewhere in the fade, from 72 to 120: by a sample of a second or by PySceneDetect.
    corpus.add("cuts-fade.mp4", fading, "480p", "480p")


def _lengths(corpus: Corpus) -> None:
    cases = {240: (240,), 241: (240,), 280: (240,), 287: (240,), 288: (240, 48), 300: (240, 60), 480: (240, 240),
             500: (240, 240), 600: (240, 240, 120)}  # fmt: skip
    for frames, lengths in cases.items():
        spans = tuple((240 * part, length) for part, length in enumerate(lengths))
        corpus.clip(f"length-{frames}.mp4", *["480p"] * len(lengths), frames=frames, spans=spans)


def _repetitions(corpus: Corpus) -> None:
    orders = {"ABA": (0, 1, None), "AAB": (0, None, 2), "ABAB": (0, 1, None, None), "ABC": (0, 1, 2)}
    for order, kept in orders.items():

        def write(path: Path, order: str = order, seed: int = 3000 + 20 * len(corpus.made)) -> None:
            # Two scenes alike in a row need something between them to be cut at.
            scenes = "X".join(order) if "AA" in order else order
            parts = (moving(60, P480, 1.0, 24, seed + ord(scene)) for scene in scenes)
            write_clip(path, chain.from_iterable(parts), Encoding())
            pad(path, BITRATE, Fraction(60 * len(scenes), 24))

        tiers = ["480p" if place is not None else "" for place in kept]
        if "AA" in order:
            tiers = ["480p", "480p", "", "", "480p"]
        corpus.add(f"repeated-{order}.mp4", write, *tiers)


def bright_corpus() -> list[Made]:
    """Grey scenes of three brightnesses, for an aesthetic head that has learnt to tell them (`made_aesthetics`)."""
    corpus = Corpus()
    wanted = {
        P480: {DARK: "", MIDDLE: "480p", BRIGHT: "480p"},
        P720: {DARK: "", MIDDLE: "480p", BRIGHT: "720p"},
    }
    for size, tiers in wanted.items():
        for level, tier in tiers.items():

            def write(path: Path, level: int = level, size: tuple[int, int] = size) -> None:
                write_clip(path, pan(97, size, (0.0, 1.0), grey_scene(level, seed=level)), Encoding())
                pad(path, BITRATE, Fraction(97, 24))

            corpus.add(f"bright-{size[0]}-{level}.mp4", write, tier)
    return corpus.made


def grey_scene(level: int, seed: int) -> Texture:
    return Texture(seed=seed, finest_px=20, contrast=20, tint=(level, level, level))


def _images(corpus: Corpus) -> None:
    """An image has no motion, rate or length to be judged by."""
    sizes = {(480, 854): "480p", (854, 480): "480p", (720, 1280): "720p", (1080, 1920): "1080p", (600, 800): ""}
    for suffix in (".png", ".jpg"):
        for size, tier in sizes.items():

            def write(path: Path, size: tuple[int, int] = size, seed: int = len(corpus.made)) -> None:
                Image.fromarray(texture(seed, size).at(size)).save(path, quality=95)

            corpus.add(f"image-{size[0]}x{size[1]}{suffix}", write, tier)
    corpus.add(
        "image-small.png", lambda path: Image.fromarray(texture(0, P480).at((320, 480))).save(path),
        refused="short_side_px <",
    )  # fmt: skip


def make_corpus(folder: Path, made: list[Made]) -> None:
    """Write the files that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in made:
        path = folder / source.name
        if not path.exists():
            temporary = folder / f"making-{os.getpid()}-{source.name}"
            source.write(temporary)
            temporary.rename(path)
