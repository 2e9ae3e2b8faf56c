"""A few small real files that go through the stages in seconds, and the settings under which small ones count.

Without OCR, which takes most of a second a key frame; the made corpus has it.
"""

from itertools import chain
from pathlib import Path

from made_media import Encoding, Texture, pan, truncate, write_clip
from PIL import Image

from goku_mega.config.curation import CurateConfig, OcrConfig, RawThresholds, Thresholds, TierThresholds

SIZE = (96, 128)
ANY = {"similarity_min": 0.5, "aesthetic_min": 0.0, "ocr_max": 0.5}


def tier(short_side_px: int, motion_min_px: float) -> TierThresholds:
    return TierThresholds(
        short_side_min_px=short_side_px, long_side_min_px=short_side_px, motion_min_px=motion_min_px,
        motion_max_px=400.0, **ANY,
    )  # fmt: skip


SMALL = Thresholds(
    raw=RawThresholds(duration_min_s=1.0, short_side_min_px=48, bitrate_min_bps=1000),
    p480=tier(64, 2.0), p720=tier(96, 4.0), p1080=tier(1000, 4.0),
)  # fmt: skip


def settings(videos: Path, output: Path, **changes) -> CurateConfig:
    given = {"videos": str(videos), "output": str(output), "thresholds": SMALL, "ocr": OcrConfig(enabled=False)}
    return CurateConfig(**given | changes)


def overrides(videos: Path, output: Path) -> list[str]:
    """`settings` as words of a command line."""
    words = [f"videos={videos}", f"output={output}", "ocr.enabled=false"]
    words += [f"thresholds.raw.{name}={value}" for name, value in vars(SMALL.raw).items()]
    for name in ("p480", "p720", "p1080"):
        words += [f"thresholds.{name}.{key}={value}" for key, value in vars(getattr(SMALL, name)).items()]
    return words


def scene(seed: int, frames: int, speed: float = 1.0, size: tuple[int, int] = SIZE):
    return pan(frames, size, (0.0, speed), Texture(seed=seed, finest_px=10))


def write_corpus(folder: Path) -> Path:
    """Nine sources: scenes that are cut, one that comes twice, another codec, images, a copy, and a broken file."""
    folder.mkdir(parents=True, exist_ok=True)
    cut = chain(scene(1, 50), scene(2, 60), scene(3, 50, speed=0.25))
    write_clip(folder / "cut.mp4", cut)
    write_clip(folder / "twice.mp4", chain(scene(4, 48), scene(5, 48), scene(4, 48)))
    write_clip(folder / "hevc.mkv", scene(6, 60), Encoding(codec="libx265"))
    write_clip(folder / "long-groups.mp4", scene(7, 100), Encoding(gop=250))
    write_clip(folder / "still.mp4", scene(8, 60, speed=0.0))
    write_clip(folder / "tiny.mp4", scene(9, 60, size=(40, 64)))
    (folder / "copy.mp4").write_bytes((folder / "cut.mp4").read_bytes())
    truncate(write_clip(folder / "broken.mp4", scene(10, 60)), 0.5)
    Image.fromarray(next(iter(scene(11, 1)))).save(folder / "image.png")
    return folder
