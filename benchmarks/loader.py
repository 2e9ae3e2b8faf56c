"""Packed batches a second from shards, and memory over 10,000 steps: `python -m benchmarks.loader [--json]`.

The loader of training beside webdataset, and beside megatron-energon where it can be imported. Every side gives the
same packed batches, bit for bit, made of the same samples by the same packing function, on one worker: a thread
(ours), the process itself, or a process (theirs). Ours reads single samples at random from the shards as they were
encoded; the others read shards that hold the samples in the order of the training, from beginning to end. The files
are in the page cache. What is timed is an epoch from its second batch on, so no side pays for its start.

Memory is that of a process that loads 10,000 steps: from the local folder, and from an S3 server through a cache
that holds half of the data.
"""

import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from benchmarks._measure import arguments, device_name, ratio, report
from goku_mega.config.training import DataConfig, FlowRun
from goku_mega.data.loader import Loader
from goku_mega.data.packing import TrainingBatch, pack_training
from goku_mega.data.shards import (
    DATASET,
    INDEX,
    NULL_TEXT,
    EncodedSample,
    Index,
    Sample,
    ShardReader,
    load_index,
    write_index,
    write_shard,
)
from goku_mega.model.sizes import model_shape
from goku_mega.parallel.groups import single_process_groups

SAMPLES, SAMPLES_PER_STEP, SAMPLES_PER_SHARD = 1536, 16, 128
GRIDS = [(1, 24, 24), (1, 20, 28), (3, 24, 24), (5, 20, 28)]
"""Latents (t, h, w) of images and clips, as many of each."""
CHANNELS, TEXT_WIDTH, TEXT_TOKENS = 16, 64, (8, 77)
SHAPE = model_shape("tiny", latent_channels=CHANNELS, text_width=TEXT_WIDTH)
MEMORY_STEPS, WARM_STEPS, WINDOW = 10_000, 500, 250
MEMORY_SAMPLES_PER_STEP = 4


class Task(NamedTuple):
    """An epoch of packed batches."""

    folder: Path
    """The data set as it was encoded."""
    ordered: Path
    """The same samples in the order of the epoch."""
    counts: list[int]
    """Samples of every step."""
    null_text: torch.Tensor


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        task = prepare(Path(place))
        sides = packed_sides(task)
        check_equal(sides)
        seconds = take_turns(
            {name: partial(seconds_from_second, side) for name, side in sides.items()}, options.repeats
        )
        reading = take_turns(reading_sides(task), options.repeats)
        memory = {
            "local": memory_of(task.folder, Path(place) / "unused"),
            "s3_with_cache": memory_of_s3(task.folder, Path(place) / "cache"),
        }
    others = [name for name in sides if name != "goku_mega"]
    fastest = min(others, key=lambda name: statistics.median(seconds[name]))
    batches = {name: round((len(task.counts) - 1) / statistics.median(seconds[name]), 2) for name in sides}
    lines = [f"{name:22} {rate:8.1f} packed batches/s" for name, rate in batches.items()]
    read = {name: round(SAMPLES / statistics.median(found)) for name, found in reading.items()}
    lines += [f"{name:22} {rate:8.0f} samples/s read, not packed" for name, rate in read.items()]
    if "energon" not in sides:
        lines.append("megatron-energon is not installed: not measured")
    lines += [f"memory, {name}: {found['growth']:+.2%} over {MEMORY_STEPS} steps" for name, found in memory.items()]
    report(
        options,
        lines,
        {
            "name": "loader",
            "value": batches["goku_mega"],
            "unit": f"packed batches of {SAMPLES_PER_STEP} samples a second",
            "baseline": {name: batches[name] for name in others},
            "ratio": round(ratio(seconds, fastest, "goku_mega"), 3),
            "fastest_baseline": fastest,
            "energon": "energon" in sides,
            "read_only_samples_per_s": read,
            "read_only_ratio": round(ratio(reading, "webdataset", "goku_mega"), 3),
            "memory": memory,
            "repeats": options.repeats,
            "device": device_name(),
        },
    )


def prepare(place: Path) -> Task:
    """The data set, and its samples once more in the order of the first epoch."""
    rng = np.random.default_rng(0)
    samples = [
        EncodedSample(
            f"sample-{number:05d}",
            rng.standard_normal((CHANNELS, *GRIDS[number % len(GRIDS)]), dtype=np.float32),
            rng.standard_normal((int(rng.integers(*TEXT_TOKENS)), TEXT_WIDTH), dtype=np.float32),
            {"caption": ""},
        )
        for number in range(SAMPLES)
    ]
    index = write_dataset(place / "encoded", samples)
    loader = make_loader(index, SAMPLES)
    plans = [loader.planner.plan(step, dp_ranks=1, max_tokens_per_rank=10**6) for step in range(
        loader.planner.batches_per_epoch)]  # fmt: skip
    order = [number for plan in plans for pack in plan.micro_batches[0] for number in pack]
    write_dataset(place / "ordered", [samples[number] for number in order])
    return Task(place / "encoded", place / "ordered", [len(plan.batch) for plan in plans], index.null_text)


def write_dataset(folder: Path, samples: list[EncodedSample]) -> Index:
    rows = []
    for number, start in enumerate(range(0, len(samples), SAMPLES_PER_SHARD)):
        rows += write_shard(folder / "shards" / f"{number:05d}.tar", samples[start : start + SAMPLES_PER_SHARD])
    write_index(folder / INDEX, rows)
    np.save(folder / NULL_TEXT, np.zeros((1, TEXT_WIDTH), dtype=np.float32))
    (folder / DATASET).write_text(json.dumps({"latent_channels": CHANNELS, "text_width": TEXT_WIDTH}))
    return load_index(folder)


def make_loader(index: Index, steps: int, *, samples_per_step: int = SAMPLES_PER_STEP, **data: Any) -> Loader:
    config = DataConfig(path=index.place, samples_per_step=samples_per_step, max_tokens_per_rank=10**6, **data)
    run = FlowRun(run_dir="unused", steps=steps, data=config)
    return Loader(index, run, SHAPE, groups=single_process_groups(), start_step=0, dtype=torch.float32)


# --- The sides -------------------------------------------------------------------------------------------------------

Side = Callable[[], Iterator[TrainingBatch]]


def packed_sides(task: Task) -> dict[str, Side]:
    sides: dict[str, Side] = {
        "goku_mega": partial(ours, load_index(task.folder), len(task.counts)),
        "webdataset": partial(with_webdataset, task, 0),
        "webdataset (process)": partial(with_webdataset, task, 1),
    }
    if importlib.util.find_spec("megatron.energon"):
        prepare_energon(task.ordered)
        sides["energon"] = partial(with_energon, task, 0)
        sides["energon (process)"] = partial(with_energon, task, 1)
    return sides


def ours(index: Index, steps: int) -> Iterator[TrainingBatch]:
    with make_loader(index, steps) as loader:
        for batch in loader:
            yield batch.micro_batches[0]


def with_webdataset(task: Task, processes: int) -> Iterator[TrainingBatch]:
    import webdataset

    samples = webdataset_samples(task)
    packed = samples.compose(partial(in_steps, task.counts)).map(partial(pack_step, task.null_text))
    yield from webdataset.WebLoader(packed, batch_size=None, num_workers=processes)


def webdataset_samples(task: Task) -> Any:
    import webdataset

    shards = sorted(map(str, (task.ordered / "shards").glob("*.tar")))
    arrays = webdataset.WebDataset(shards, shardshuffle=False, select_files=lambda name: name.endswith(".npy"))
    return arrays.decode().map(to_sample)


def to_sample(found: dict[str, Any]) -> Sample:
    return Sample(found["__key__"], torch.from_numpy(found["latent.npy"]), torch.from_numpy(found["text.npy"]))


def in_steps(counts: list[int], samples: Iterable[Sample]) -> Iterator[tuple[int, list[Sample]]]:
    rest = iter(samples)
    for step, count in enumerate(counts):
        yield step, list(itertools.islice(rest, count))


def pack_step(null_text: torch.Tensor, step_and_samples: tuple[int, list[Sample]]) -> TrainingBatch:
    """As the loader packs."""
    step, samples = step_and_samples
    run = FlowRun(run_dir="unused", steps=1, data=DataConfig(path="unused"))
    return pack_training(
        samples, seed=run.seed, step=step, flow=run.flow, caption_dropout=run.data.caption_dropout,
        null_text=null_text, shape=SHAPE,
    )  # fmt: skip


def prepare_energon(folder: Path) -> None:
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder), "--non-interactive"]
    settings = ["--split-ratio", "0,1,0", "--sample-type", "CrudeWebdataset"]
    said = subprocess.run([*command, *settings], capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(f"energon cannot prepare the data: {said.stderr[-500:]}")


def with_energon(task: Task, processes: int) -> Iterator[TrainingBatch]:
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_val_dataset,
        stateless,
    )

    steps = [step for step, count in enumerate(task.counts) for _ in range(count)]
    step_of = {row.key: step for row, step in zip(load_index(task.ordered).rows, steps, strict=True)}

    @stateless
    def cook(found: Any) -> Any:
        return {name: found[name] for name in ("__key__", "__restore_key__", "latent.npy", "text.npy")}

    class Encoder(DefaultTaskEncoder):
        decoder = SampleDecoder()
        cookers: ClassVar = [Cooker(cook)]

        @stateless
        def batch_group_criterion(self, sample: Any) -> tuple[int, int]:
            step = step_of[sample["__key__"].rsplit("/", 1)[-1]]
            return step, task.counts[step]

        @stateless
        def batch(self, samples: list[Any]) -> TrainingBatch:
            step = self.batch_group_criterion(samples[0])[0]
            return pack_step(task.null_text, (step, [energon_sample(sample) for sample in samples]))

    config = WorkerConfig(rank=0, world_size=1, num_workers=processes)
    data = get_val_dataset(task.ordered, worker_config=config, batch_size=None, task_encoder=Encoder())
    yield from get_loader(data)


def energon_sample(found: dict[str, Any]) -> Sample:
    key = found["__key__"].rsplit("/", 1)[-1]
    latent, text = (torch.as_tensor(found[name]) for name in ("latent.npy", "text.npy"))
    return Sample(key, latent, text)


def reading_sides(task: Task) -> dict[str, Callable[[], float]]:
    """Seconds for all samples as tensors, in the order of the epoch, without packing."""
    index = load_index(task.folder)
    number_of = {row.key: number for number, row in enumerate(index.rows)}
    order = [number_of[row.key] for row in load_index(task.ordered).rows]

    def read_ours() -> float:
        reader = ShardReader(index)
        began = time.perf_counter()
        for number in order:
            reader.read(number)
        seconds = time.perf_counter() - began
        reader.close()
        return seconds

    def read_theirs() -> float:
        began = time.perf_counter()
        assert sum(1 for _ in webdataset_samples(task)) == SAMPLES
        return time.perf_counter() - began

    return {"goku_mega": read_ours, "webdataset": read_theirs}


# --- Measuring -------------------------------------------------------------------------------------------------------


def check_equal(sides: dict[str, Side]) -> None:
    """Every side gives the same bits."""
    digests = {name: [digest(batch) for batch in side()] for name, side in sides.items()}
    different = [name for name, found in digests.items() if found != digests["goku_mega"]]
    if different:
        raise AssertionError(f"other batches than ours: {', '.join(different)}")


def digest(batch: TrainingBatch) -> str:
    packed = batch.packed
    parts = (packed.patches, packed.positions, packed.timesteps, packed.text, batch.velocity, batch.loss_weight)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts if part is not None)).hexdigest()


def seconds_from_second(side: Side) -> float:
    batches = side()
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - began


def take_turns(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each side says it took: every side once a round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(1 + repeats):
        for name, side in sides.items():
            took = side()
            if round_number:
                seconds[name].append(took)
    return seconds


def memory_of(place: Path | str, cache: Path) -> dict[str, Any]:
    """Resident memory of a process of its own that loads the steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(load_many, (str(place), str(cache)))


def memory_of_s3(folder: Path, cache: Path) -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent.parent / "tests" / "checkpoint"))
    import fsspec
    from s3_server import make_bucket, s3_server, s3_settings

    with s3_server() as endpoint, s3_settings(endpoint):
        url = f"{make_bucket(uuid.uuid4().hex)}/data"
        fsspec.filesystem("s3").put(f"{folder}/", url, recursive=True)
        return memory_of(url, cache)


def load_many(place: str, cache: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    index = load_index(place)
    size = sum(row.latent_bytes + row.text_bytes for row in index.rows)
    readings, began = [], time.perf_counter()
    settings = {"samples_per_step": MEMORY_SAMPLES_PER_STEP, "cache_folder": cache, "cache_gb": size / 2 / 1e9}
    with make_loader(index, MEMORY_STEPS, **settings) as loader:
        for _ in loader:
            readings.append(resident_bytes())
    early = statistics.mean(readings[WARM_STEPS : WARM_STEPS + WINDOW])
    late = statistics.mean(readings[-WINDOW:])
    counts = loader.counts
    return {
        "growth": round(late / early - 1, 5),
        "mb_at_steps": {step: round(readings[step - 1] / 1e6, 1) for step in (1, 500, 1000, 2500, 5000, 7500, 10_000)},
        "most_mb": round(max(readings) / 1e6, 1),
        "steps_per_s": round(MEMORY_STEPS / (time.perf_counter() - began), 1),
        "requests": counts.requests,
        "cache_hits": counts.cache_hits,
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
