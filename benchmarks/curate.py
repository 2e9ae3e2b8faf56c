"""Curation: what its stages take, what the engine adds, and how fast thresholds move.

`python -m benchmarks.curate [--json] [--repeats N]`. Made clips of 480p and 4.2 s go through all stages that need no
weights, the same work every time:
  bare:     the stage functions one after the other, in this process;
  engine 1: one worker process that is warm, with journal;
  engine 2: two of them;
  local, ray: whole runs with two workers, from nothing to the last score, starts included.
Then the verdicts on 1,000,000 scored clips of 125,000 sources are made anew under another threshold: manifest,
captions and report written.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import parquet

from benchmarks._measure import alternate, arguments, device_name, ratio, report
from goku_mega.config.curation import AestheticConfig, CurateConfig
from goku_mega.curate.curate import Task, filter_clips, open_store, score_kinds
from goku_mega.curate.engine import Event, Found, Pool, run_local
from goku_mega.curate.pipeline import Pipeline, Source, clip_key
from goku_mega.curate.scores import schema_of
from goku_mega.curate.sources import content_of
from goku_mega.curate.stage_keys import stage_keys
from goku_mega.media.write import write_h264

CLIPS = 6
SIZE, FRAMES, RATE = (480, 854), 101, 24
SOURCES, CLIPS_OF_EACH = 125_000, 8
WORKER = "goku_mega.curate.curate:Worker"


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    repeats = min(options.repeats, 5)
    with tempfile.TemporaryDirectory() as folder:
        stages, work = measure_work(Path(folder), repeats)
        thresholds = measure_thresholds(Path(folder) / "million", repeats)
    lines = [f"{'stage':12} {'scores':>6} {'a second':>9}"]
    lines += [f"{name:12} {count:>6} {count / seconds:>9.1f}" for name, (count, seconds) in stages.items()]
    lines += [f"{name}: {value}" for name, value in (work | thresholds).items()]
    result = {
        "name": "curate",
        "value": work["clips_per_s_1_worker"],
        "unit": "clips/s",
        "baseline": "the bare stage functions",
        "ratio": work["engine_over_bare"],
        "device": device_name(),
        "stages_per_s": {name: round(count / seconds, 2) for name, (count, seconds) in stages.items()},
        **work,
        **thresholds,
    }
    report(options, lines, result)


class Seconds:
    """A listener that adds up what the stages took."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, float]] = {}

    def begins(self, stage: str) -> None:
        pass

    def found(self, stage: str, key: str, score: dict[str, Any], seconds: float) -> None:
        count, before = self.stages.get(stage, (0, 0.0))
        self.stages[stage] = (count + 1, before + seconds)


def measure_work(folder: Path, repeats: int) -> tuple[dict[str, tuple[int, float]], dict[str, Any]]:
    """Seconds of the stages, and of the same work bare, by the engine, and by Ray."""
    config = CurateConfig(videos=str(folder), output=str(folder / "output"))
    tasks = [Task(Source(path, content_of(str(path)).content), {}) for path in write_clips(folder / "raw")]
    pipeline, seconds = Pipeline(config), Seconds()

    def bare(listener: Any) -> None:
        for task in tasks:
            pipeline.process(task.source, {}, listener)

    with engines(config, tasks[:1]) as (one, two):
        sides = {
            "bare": lambda: bare(Seconds()),
            "engine 1": lambda: journalled(config, pipeline, one.run(iter(tasks))),
            "engine 2": lambda: journalled(config, pipeline, two.run(iter(tasks))),
        }
        took = alternate(sides, repeats=repeats, warm_up=1)
    bare(seconds)
    rate = {name: CLIPS / statistics.median(times) for name, times in took.items()}
    return seconds.stages, {
        "clips_per_s_1_worker": round(rate["engine 1"], 3),
        "clips_per_s_2_workers": round(rate["engine 2"], 3),
        "engine_over_bare": round(ratio(took, "engine 1", "bare"), 4),
        "two_workers_over_one": round(1 / ratio(took, "engine 2", "engine 1"), 3),
        **measure_ray(config, tasks, repeats),
    }


@contextlib.contextmanager
def engines(config: CurateConfig, warm_up: list[Task]) -> Iterator[tuple[Pool, Pool]]:
    """Engines of one and of two workers, whose models are loaded."""
    pools = Pool(WORKER, (config,), 3600.0), Pool(WORKER, (config,), 3600.0)
    try:
        for workers, pool in enumerate(pools, start=1):
            pool.start(workers)
            for _ in pool.run(iter(warm_up * workers)):
                pass
        yield pools
    finally:
        for pool in pools:
            pool.stop()


def journalled(config: CurateConfig, pipeline: Pipeline, events: Iterator[Event]) -> int:
    """The engine's events written down as `goku-mega curate` does; how many scores there were."""
    shutil.rmtree(config.output, ignore_errors=True)
    count = 0
    with open_store(config) as store:
        for event in events:
            if isinstance(event, Found):
                store.add(event.stage, pipeline.keys[event.stage], event.key, event.score)
                count += 1
    return count


def measure_ray(config: CurateConfig, tasks: list[Task], repeats: int) -> dict[str, Any]:
    try:
        import ray  # noqa: F401
    except ImportError:
        return {"ray": "not installed"}
    from goku_mega.curate.engine_ray import run_ray

    pipeline = Pipeline(config)
    limits = {"workers": 2, "time_limit_s": 3600.0}
    sides = {
        "local": lambda: journalled(config, pipeline, run_local(tasks, WORKER, (config,), **limits)),
        "ray": lambda: journalled(config, pipeline, run_ray(tasks, WORKER, (config,), **limits)),
    }
    took = alternate(sides, repeats=repeats, warm_up=0)
    seconds = {f"whole_run_{name}_s": round(statistics.median(times), 1) for name, times in took.items()}
    return {**seconds, "local_over_ray": round(ratio(took, "local", "ray"), 3)}


def measure_thresholds(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds for new verdicts on a million clips."""
    config = write_million(folder)
    tier = config.thresholds.p480
    took = []
    for number in range(repeats):
        moved = replace(config.thresholds, p480=replace(tier, ocr_max=0.02 + 0.001 * number))
        began = time.perf_counter()
        result = filter_clips(replace(config, thresholds=moved))
        took.append(time.perf_counter() - began)
    return {
        "rethreshold_clips": SOURCES * CLIPS_OF_EACH, "rethreshold_judged": result["clips"],
        "rethreshold_kept": result["kept"], "rethreshold_s": round(statistics.median(took), 2),
    }  # fmt: skip


def write_clips(folder: Path) -> list[Path]:
    """Clips of smooth noise that moves by two pixels a frame, each with other noise, some with a line of text."""
    from PIL import Image, ImageDraw, ImageFont

    paths = []
    for seed in range(CLIPS):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(30, 220, (60, 160, 3), dtype=np.uint8)
        wide = Image.fromarray(coarse).resize((SIZE[1] + 2 * FRAMES, SIZE[0]), Image.Resampling.BICUBIC)
        if seed % 2:
            font = ImageFont.load_default(size=28.0)
            ImageDraw.Draw(wide).text((300, 400), "A LINE OF TEXT", fill=(250, 250, 250), font=font)
        picture = np.asarray(wide)
        path = folder / f"{seed}.mp4"
        frames = (picture[:, 2 * number : 2 * number + SIZE[1]] for number in range(FRAMES))
        write_h264(path, frames, Fraction(RATE), crf=10)
        paths.append(path)
    return paths


def write_million(folder: Path) -> CurateConfig:
    """The scores of a million clips, drawn at random, as a run would have left them."""
    rng = np.random.default_rng(0)
    config = CurateConfig(
        videos=str(folder / "sources.txt"), output=str(folder / "output"), aesthetic=AestheticConfig(clip="c", head="h")
    )
    keys = stage_keys(config)
    sources = sorted(rng.bytes(16).hex() for _ in range(SOURCES))
    paths = [f"/data/raw/{number // 1000:03d}/{number:06d}.mp4" for number in range(SOURCES)]
    firsts = [240 * number for number in range(CLIPS_OF_EACH)]
    clips = [clip_key(source, first, 240) for source in sources for first in firsts]

    def put(stage: str, settings: str, **columns: Any) -> None:
        schema = schema_of(score_kinds()[stage])
        count = len(columns["key"])
        constant = {name: value if isinstance(value, list | np.ndarray) else [value] * count
                    for name, value in columns.items()}  # fmt: skip
        path = Path(config.output) / "scores" / stage / f"{settings}.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(arrow.table(constant, schema=schema), path)

    Path(config.output).mkdir(parents=True)
    Path(config.videos).write_text("\n".join(paths))
    order = np.argsort(paths)
    put("content", "", key=[paths[n] for n in order], content=[sources[n] for n in order], file_bytes=1, modified_ns=1)
    put("probe", keys["probe"], key=sources, kind="video", height=rng.choice([480, 720, 1080], SOURCES), width=1920,
        frames=1920, frame_rate=24.0, rate_numerator=24, rate_denominator=1, varying_rate=False, duration_s=80.0,
        bitrate_bps=rng.uniform(4e5, 5e6, SOURCES), codec="h264", pixel_format="yuv420p", turned=False, gop_frames=48,
        file_bytes=1)  # fmt: skip
    put("standardise", keys["standardise"], key=sources, as_it_is=True, frames=1920, frame_rate=24.0, height=480,
        width=1920)  # fmt: skip
    put("clips", keys["clips"], key=sources, firsts=[firsts] * SOURCES, frames=[[240] * CLIPS_OF_EACH] * SOURCES,
        similarity=[[0.95] * CLIPS_OF_EACH] * SOURCES)  # fmt: skip
    alike = [[0] if number % 10 == 0 else [] for number in range(SOURCES)]
    put("alike", keys["alike"], key=sources, ones=alike, others=[[one + 1 for one in ones] for ones in alike])
    per_frame = [[1.0] * 10] * len(clips)
    put("motion", keys["motion"], key=clips, mean_px=rng.lognormal(0.5, 1.2, len(clips)), per_pair=per_frame)
    put("ocr", keys["ocr"], key=clips, coverage=rng.exponential(0.01, len(clips)), per_frame=per_frame)
    put("aesthetic", keys["aesthetic"], key=clips, mean=rng.normal(4.7, 0.6, len(clips)), per_frame=per_frame)
    return config


if __name__ == "__main__":
    main()
