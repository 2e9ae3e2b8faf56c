"""What each decoder gives for a second of CPU: `python -m benchmarks.decode [--json] [--repeats 15]`.

Every call opens a video anew and reads 33 consecutive frames from a random place, as training does. Videos: 10 s of
H.264 at 24 frames a second with a key frame every 48 and B-frames, 480p and 720p; frames are asked for at
288x512 and at their own size. The baseline is PyAV called as directly as it goes: seek, decode, scale, stack; it
takes the frames' times for granted, which ours reads from the file. One thread each.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks._measure import arguments, device_name, report
from goku_mega.errors import MissingExtra
from goku_mega.media.decode import open_video

sys.path.append(str(Path(__file__).parent.parent / "tests" / "media"))
from made_media import Encoding, Texture, pan, write_clip

RATE, SECONDS, GOP, COUNT = 24, 10, 48, 33
SIZES = {"480p": (480, 854), "720p": (720, 1280)}
TRAINING_SIZE = (288, 512)
BACKENDS = ("pyav", "dali", "torchcodec")
WARM_UP_ROUNDS = 2

Read = Callable[[Path, int, tuple[int, int] | None], Any]


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    sides: dict[str, Read] = {"bare": bare_pyav} | {name: through(name) for name in BACKENDS if is_here(name)}
    cases = [(name, size) for name in SIZES for size in (TRAINING_SIZE, None)]
    rates: dict[tuple[str, tuple[int, int] | None], dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        videos = {name: make_video(Path(folder) / f"{name}.mp4", size) for name, size in SIZES.items()}
        for name, size in cases:
            check_agreement(sides, videos[name], size)
            rates[name, size] = frames_per_cpu_s(sides, videos[name], size, repeats=options.repeats)
    table = {
        f"{name} to {'288x512' if size else 'its own size'}": {
            side: (round(statistics.median(found), 1), round(ratio_to_bare(rates[name, size], side), 3))
            for side, found in rates[name, size].items()
        }
        for name, size in cases
    }
    lines = [f"frames per CPU-second (ratio to bare PyAV), medians of {options.repeats} rounds"]
    for case, row in table.items():
        lines.append(
            f"{case:20}" + "".join(f"  {side} {rate:7.1f} ({ratio:.3f})" for side, (rate, ratio) in row.items())
        )
    first = next(iter(table.values()))
    report(
        options,
        lines,
        {
            "name": "decode",
            "value": first["pyav"][0],
            "unit": "frames per CPU-second, 480p to 288x512, PyAV backend",
            "baseline": {"bare_pyav": first["bare"][0]},
            "ratio": first["pyav"][1],
            "lowest_ratio": min(row["pyav"][1] for row in table.values()),
            "frames_per_cpu_s": {case: {side: rate for side, (rate, _) in row.items()} for case, row in table.items()},
            "ratio_to_bare": {case: {side: ratio for side, (_, ratio) in row.items()} for case, row in table.items()},
            "repeats": options.repeats,
            "device": device_name(),
        },
    )


def make_video(path: Path, size: tuple[int, int]) -> Path:
    coding = Encoding(gop=GOP, b_frames=2, options={"preset": "fast"})
    return write_clip(path, pan(RATE * SECONDS, size, (0.7, 1.9), Texture(finest_px=5)), coding)


def bare_pyav(path: Path, first: int, size: tuple[int, int] | None) -> Any:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        pts = round(first / RATE / stream.time_base)
        width, height = (size[1], size[0]) if size else (stream.width, stream.height)
        container.seek(pts, stream=stream)
        frames = []
        for frame in container.decode(stream):
            if frame.pts >= pts:
                frames.append(frame.to_ndarray(format="rgb24", width=width, height=height, threads=1))
            if len(frames) == COUNT:
                break
    return np.stack(frames)


def through(backend: Any) -> Read:
    def read(path: Path, first: int, size: tuple[int, int] | None) -> Any:
        with open_video(path, backend) as video:
            return video.read(range(first, first + COUNT), size)

    return read


def is_here(backend: Any) -> bool:
    try:
        with tempfile.TemporaryDirectory() as folder:
            open_video(write_clip(Path(folder) / "a.mp4", pan(2, (64, 64), (0, 1))), backend).close()
    except MissingExtra:
        return False
    return True


def check_agreement(sides: dict[str, Read], video: Path, size: tuple[int, int] | None) -> None:
    """All sides answer the same frames, so that their times compare."""
    expected = sides["bare"](video, 101, size).astype(int)
    neighbours = np.abs(np.diff(expected, axis=0)).mean()
    for name, read in sides.items():
        difference = np.abs(read(video, 101, size) - expected).mean()
        if difference > neighbours / 2:
            raise SystemExit(f"{name} reads other frames: they are {difference:.1f} levels off")


def frames_per_cpu_s(
    sides: dict[str, Read], video: Path, size: tuple[int, int] | None, *, repeats: int
) -> dict[str, list[float]]:
    """Of each round: all sides read from the same place, in turn, beginning with another side every time."""
    rng, rates = np.random.default_rng(0), {name: [] for name in sides}
    names = list(sides)
    for turn in range(WARM_UP_ROUNDS + repeats):
        first = int(rng.integers(0, RATE * SECONDS - COUNT))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began_s = time.process_time()
            sides[name](video, first, size)
            if turn >= WARM_UP_ROUNDS:
                rates[name].append(COUNT / (time.process_time() - began_s))
    return rates


def ratio_to_bare(rates: dict[str, list[float]], side: str) -> float:
    """Median over the rounds, in each of which all read the same frames."""
    return statistics.median(own / bare for own, bare in zip(rates[side], rates["bare"], strict=True))


if __name__ == "__main__":
    main()
