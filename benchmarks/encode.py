"""How busy encoding keeps the codec: `python -m benchmarks.encode [--json] [--repeats N]`.

One worker of `goku-mega encode` (one thread for the codec, fp32 on a CPU) makes shards of H.264 clips of 256x256 px,
a long clip and PNG images among them, two ways:
  ahead: decoding ahead of the codec and writing behind it, as the command does;
  turns: decoding, codec and writing take turns.
The share of the codec is of the worker's wall time from its first clip to its last byte.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks._measure import alternate, arguments, device_name, report
from goku_mega.data.captions import read_captions
from goku_mega.data.encode_worker import PIECES_AHEAD, Encoders, ShardTask, WorkerEnds, make_shards
from goku_mega.data.shapes import draw_scene, render_clip
from goku_mega.encoders.text import build_tiny_text_encoder
from goku_mega.media.write import write_image, write_video

CLIPS = [(9, 256, 256)] * 4 + [(17, 256, 256), (9, 256, 448)] + [(1, 256, 256)] * 2
CLIPS_PER_SHARD = 4
TARGET = 0.9


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory() as folder:
        result, lines = measure(Path(folder), options.repeats)
    report(options, lines, result)


def measure(folder: Path, repeats: int) -> tuple[dict[str, object], list[str]]:
    corpus = write_corpus(folder / "corpus")
    rows = read_captions(corpus)
    build_tiny_text_encoder((row["caption"] for row in rows), folder / "text", 0)
    encoders = Encoders("tiny", str(folder / "text"), "cpu", folder / "embeddings", 2**20)
    ends: dict[str, list[WorkerEnds]] = {"ahead": [], "turns": []}

    def side(name: str, pieces_ahead: int) -> Callable[[], None]:
        def make() -> None:
            output = folder / name
            shutil.rmtree(output, ignore_errors=True)
            (output / "parts").mkdir(parents=True)
            groups = [rows[start : start + CLIPS_PER_SHARD] for start in range(0, len(rows), CLIPS_PER_SHARD)]
            tasks = [ShardTask(number, tuple(group), corpus, output, 241) for number, group in enumerate(groups)]
            *_, last = make_shards(encoders, tasks, pieces_ahead)
            assert isinstance(last, WorkerEnds)
            ends[name].append(last)

        return make

    seconds = alternate({"ahead": side("ahead", PIECES_AHEAD), "turns": side("turns", 0)}, repeats=repeats, warm_up=1)
    same = all(path.read_bytes() == (folder / "turns" / "shards" / path.name).read_bytes()
               for path in (folder / "ahead" / "shards").iterdir())  # fmt: skip
    assert same, "taking turns gave other bytes"
    busy = {name: sorted(end.vae_s / end.total_s for end in of_side[1:]) for name, of_side in ends.items()}
    middle = {name: float(np.median(shares)) for name, shares in busy.items()}
    frames = sum(clip[0] for clip in CLIPS)
    rate = frames / float(np.median(seconds["ahead"]))
    lines = [f"{name:6} codec {middle[name]:6.1%} of the wall time [{busy[name][0]:.1%} to {busy[name][-1]:.1%}], "
             f"{float(np.median(seconds[name])):6.2f} s" for name in busy]  # fmt: skip
    lines.append(f"{rate:.1f} frames per second; both gave the same bytes")
    return {
        "name": "encode",
        "value": round(middle["ahead"], 4),
        "unit": "share of a worker's wall time in the VAE",
        "baseline": {"taking_turns": round(middle["turns"], 4)},
        "ratio": round(middle["ahead"] / middle["turns"], 3),
        "target": TARGET,
        "lowest": round(busy["ahead"][0], 4),
        "frames_per_s": round(rate, 2),
        "clips": [list(clip) for clip in CLIPS],
        "repeats": repeats,
        "cores": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 2),
        "device": device_name(),
    }, lines


def write_corpus(folder: Path) -> Path:
    rows = []
    for number, (frames, height, width) in enumerate(CLIPS):
        scene = draw_scene("two", frames > 1, np.random.default_rng(number))
        clip = render_clip(scene, seed=number, frames=frames, height=height, width=width)
        file = f"{number:03d}.{'mp4' if frames > 1 else 'png'}"
        if frames > 1:
            write_video(folder / file, clip, 24, crf=18)
        else:
            write_image(folder / file, clip[0])
        rows.append({"key": f"clip-{number:03d}", "file": file, "caption": f"a clip of number {number % 5}"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


if __name__ == "__main__":
    main()
