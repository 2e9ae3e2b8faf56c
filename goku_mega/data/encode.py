"""A corpus to latents and text embeddings in shards; killed at any moment and run again, the same bytes.

Any number of commands may share an output, in the tasks of a SLURM array or by chance: each shard is made by one of
them, and whoever finds all made writes the index. Files that cannot be decoded are skipped and listed.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from goku_mega.config.data import EncodeConfig
from goku_mega.data.captions import Row, corpus_key, read_captions
from goku_mega.data.embeddings import CaptionEncoder, EmbeddingFolder, folder_bytes
from goku_mega.data.encode_worker import (
    PARTS,
    SHARDS,
    Encoders,
    ShardMade,
    ShardTask,
    WorkerEnds,
    is_free,
    make_shards,
    write_json,
)
from goku_mega.data.shards import DATASET, INDEX, NULL_TEXT, IndexRow, write_index
from goku_mega.data.verify import SHARD_LIST, remade_otherwise, verify_dataset
from goku_mega.data.whole_files import TEMPORARY, temporary_name, write_whole
from goku_mega.data.workers import WorkerKilled, run_workers
from goku_mega.encoders.vae import content_key
from goku_mega.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TEXT_ENCODER = "text_encoder"
SKIPPED = "skipped.jsonl"
CLAIM = "claim.json"
EMBEDDINGS = "embeddings"

ENCODING = 2
"""Raised when the same settings and files begin to give other bytes."""
WORKERS_WITHOUT_GPU = 2
POLL_S = 1.0
"""How often to look whether another command has let go of a shard."""
PRELOADED = ("goku_mega.data.encode_worker", "diffusers.models.autoencoders.autoencoder_kl_cogvideox", "transformers")


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Encode every readable file of the corpus into `config.output`, or verify what is there.

    Raises:
        DataError: the corpus is missing or wholly unreadable, the output holds another data set, or it is damaged.
        ConfigError: there is no such VAE, text encoder or device.
    """
    if config.verify:
        return verify_dataset(Path(config.output))
    began = time.monotonic()
    output = Path(config.output)
    rows = read_captions(Path(config.corpus))
    devices = _devices(config)
    _claim(output, config, rows, devices)
    tasks = _tasks(config, rows)
    number, parts = config.part
    (output / PARTS).mkdir(exist_ok=True)
    busy = _make(config, devices, tasks[number::parts], _text_encoder(config, output, rows))
    left = [task for task in tasks if not task.is_made()]
    if not left:
        _finish(config, output, tasks)
    return {"output": str(output), **_counts(output, len(tasks), left), **busy,
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


def _counts(output: Path, shards: int, left: list[ShardTask]) -> dict[str, Any]:
    if left:
        logger.info("%d of %d shards are left to other commands", len(left), shards)
        return {"shards": shards, "shards_left": len(left)}
    dataset = json.loads((output / DATASET).read_text())
    return {"samples": dataset["samples"], "skipped": dataset["skipped"], "shards": shards, "shards_left": 0}


def _tasks(config: EncodeConfig, rows: list[Row]) -> list[ShardTask]:
    size = config.samples_per_shard
    corpus, output = Path(config.corpus), Path(config.output)
    return [
        ShardTask(number, tuple(rows[start : start + size]), corpus, output, config.max_frames)
        for number, start in enumerate(range(0, len(rows), size))
    ]


def _devices(config: EncodeConfig) -> list[str]:
    """The devices to work on: the CPU, or every GPU."""
    import torch

    count = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and not count):
        return ["cpu"]
    if not count:
        raise ConfigError("device is cuda, and there is no GPU here; use device=cpu or auto")
    return [f"cuda:{number}" for number in range(count)]


def _claim(output: Path, config: EncodeConfig, rows: list[Row], devices: list[str]) -> None:
    """Mark the folder with what is made in it; refuse a folder in which something else was begun."""
    claim = {
        "samples_in_corpus": len(rows),
        "corpus_key": corpus_key(Path(config.corpus), rows),
        "vae_key": content_key(config.vae),
        "text_key": config.text if config.text == "tiny" else content_key(config.text),
        "samples_per_shard": config.samples_per_shard,
        "max_frames": config.max_frames,
        "seed": config.seed,
        "device": _kind(devices),
        "encoding": ENCODING,
    }
    path = output / CLAIM
    if path.exists():
        begun = json.loads(path.read_text())
        for name, value in claim.items():
            if begun.get(name) != value:
                raise DataError(
                    f"{output} was begun with {name}={begun.get(name)}, now it is {value}; "
                    "give another output, or remove the folder"
                )
        return
    _check_encoders(config)
    try:
        (output / SHARDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{output}: cannot make the folder ({error.strerror}); give another output") from error
    write_json(path, claim)


def _kind(devices: list[str]) -> str:
    """cpu or cuda: their results differ in the last bits."""
    return devices[0].partition(":")[0]


def _check_encoders(config: EncodeConfig) -> None:
    """Load both once, so that a wrong name leaves nothing behind."""
    from goku_mega.encoders.text import load_text_encoder
    from goku_mega.encoders.vae import load_vae

    load_vae(config.vae)
    if config.text != "tiny":
        load_text_encoder(config.text)


def _text_encoder(config: EncodeConfig, output: Path, rows: list[Row]) -> str:
    """The text encoder's place; the tiny one is made from the captions."""
    if config.text != "tiny":
        return config.text
    from goku_mega.encoders.text import build_tiny_text_encoder

    folder = output / TEXT_ENCODER
    if not folder.exists():
        temporary = output / temporary_name(TEXT_ENCODER)
        shutil.rmtree(temporary, ignore_errors=True)
        build_tiny_text_encoder((row["caption"] for row in rows), temporary, config.seed)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            temporary.rename(folder)
        except OSError:  # another command was quicker, with the same bytes
            shutil.rmtree(temporary)
    return str(folder)


def _make(config: EncodeConfig, devices: list[str], tasks: list[ShardTask], text: str) -> dict[str, float]:
    """Make the shards that are not there yet; wait for those that other commands have in hand."""
    vae_s, total_s = 0.0, 0.0
    while left := [task for task in tasks if not task.is_made()]:
        free = [task for task in left if is_free(task)]
        if not free:
            time.sleep(POLL_S)
            continue
        workers = min(config.workers or (WORKERS_WITHOUT_GPU if devices == ["cpu"] else len(devices)), len(free))
        encoders = _encoders(config, devices, text, workers)
        if _is_text_spread(config, devices, text):
            _embed_all(encoders[0], devices, free)
        for ends in _run(encoders, free, len(tasks)):
            vae_s, total_s = vae_s + ends.vae_s, total_s + ends.total_s
    return {"vae_busy": round(vae_s / total_s, 3)} if total_s else {}


def _encoders(config: EncodeConfig, devices: list[str], text: str, workers: int) -> list[Encoders]:
    """What each worker loads."""
    key = f"{content_key(text).replace('/', '--')}-{_kind(devices)}"
    folder = Path(config.text_cache or Path(config.output) / PARTS / EMBEDDINGS) / key
    left_bytes = max(0.0, config.text_cache_gib * 2**30 - folder_bytes(folder))
    of_each = left_bytes / workers / config.part[1]
    return [Encoders(config.vae, text, devices[number % len(devices)], folder, of_each) for number in range(workers)]


def _is_text_spread(config: EncodeConfig, devices: list[str], text: str) -> bool:
    if config.text_devices != "auto":
        return config.text_devices == "all"
    if len(devices) == 1:
        return False
    import torch

    from goku_mega.encoders.text import weight_bytes

    return weight_bytes(text) > torch.cuda.get_device_properties(0).total_memory / 2


def _embed_all(encoders: Encoders, devices: list[str], tasks: list[ShardTask]) -> None:
    """Embed the captions of all tasks, in a process that gives the devices back when it ends."""
    captions = sorted({row["caption"] for task in tasks for row in task.rows})
    logger.info("the text encoder goes over %d device(s) first, for %d captions", len(devices), len(captions))
    try:
        for _ in run_workers(_embed, [(encoders.text, devices, encoders.embeddings, captions)], load=PRELOADED):
            pass
    except WorkerKilled as error:
        raise _killed() from error


def _embed(text: str, devices: list[str], folder: Path, captions: list[str]) -> Iterator[int]:
    import torch

    torch.set_num_threads(1)
    encoder = CaptionEncoder(text, [torch.device(name) for name in devices], EmbeddingFolder(folder, float("inf")))
    for start in range(0, len(captions), 1024):
        yield len(encoder.encode([*captions[start : start + 1024], ""]))


def _run(encoders: list[Encoders], tasks: list[ShardTask], total: int) -> Iterator[WorkerEnds]:
    """Make shards, each worker one after the other."""
    words = run_workers(make_shards, [(of_one, tasks) for of_one in encoders], load=PRELOADED)
    try:
        with _progress(total, total - len(tasks)) as advance:
            for word in words:
                if isinstance(word, WorkerEnds):
                    yield word
                    continue
                _report(word)
                advance()
    except WorkerKilled as error:
        raise _killed() from error


def _killed() -> DataError:
    return DataError("an encoding worker was killed; run the command again to go on where it stopped")


def _report(made: ShardMade) -> None:
    for row in made.skipped:
        logger.warning("skipped %s: %s", row["key"], row["reason"])
    logger.info("shard %s is written: %d samples", made.name, made.samples)


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A bar on a terminal; gives what to call after each shard."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("encode shards", total=total, completed=done)
        yield lambda: progress.advance(bar)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    with (output / CLAIM).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _finish(config: EncodeConfig, output: Path, tasks: list[ShardTask]) -> None:
    """The index over all shards, then dataset.json: with it the data set is complete."""
    with _locked(output):
        if (output / DATASET).exists():
            otherwise = remade_otherwise(output, [json.loads(path.read_text()) for path in _parts(output)])
        else:
            otherwise = []
            _write_lists(config, output, [json.loads(task.part.read_text()) for task in tasks])
        shutil.rmtree(output / PARTS, ignore_errors=True)
    if otherwise:
        raise DataError(
            f"{', '.join(otherwise)} of {output}: made again, with other bytes than before; were the files of the "
            "corpus or the versions of the libraries changed? Encode into another output"
        )


def _parts(output: Path) -> list[Path]:
    return sorted((output / PARTS).glob("*.json"))


def _write_lists(config: EncodeConfig, output: Path, parts: list[dict[str, Any]]) -> None:
    rows = [IndexRow(*row) for part in parts for row in part["rows"]]
    skipped = [row for part in parts for row in part["skipped"]]
    if not rows:
        _discard(output)
        raise DataError(f"no file of {config.corpus} can be decoded; the first: {skipped[0]['reason']}")
    write_whole(output / SKIPPED, "".join(json.dumps(row) + "\n" for row in skipped).encode())
    write_json(output / SHARD_LIST, [part["shard"] for part in parts])
    write_index(output / INDEX, rows)
    for path in (*output.glob(f".*{TEMPORARY}"), *(output / SHARDS).glob(f".*{TEMPORARY}")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)  # of commands that were killed
    dataset = {
        "samples": len(rows),
        "skipped": len(skipped),
        "shards": len(parts),
        "latent_channels": rows[0].channels,
        "text_width": int(np.load(output / NULL_TEXT).shape[1]),
        "vae": _place(config.vae),
        "vae_key": content_key(config.vae),
        "text": TEXT_ENCODER if config.text == "tiny" else _place(config.text),
        "xxh3_128": {
            name: xxhash.xxh3_128_hexdigest((output / name).read_bytes())
            for name in (INDEX, NULL_TEXT, SHARD_LIST, SKIPPED)
        },
    }
    write_json(output / DATASET, dataset)


def _place(name_or_path: str) -> str:
    """A local folder by its full path, to be found from anywhere."""
    local = name_or_path != "tiny" and Path(name_or_path).is_dir()
    return str(Path(name_or_path).resolve()) if local else name_or_path


def _discard(output: Path) -> None:
    """Take away what was made in the folder, and the folder if nothing else is in it."""
    for name in (PARTS, SHARDS, TEXT_ENCODER):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (NULL_TEXT, CLAIM):
        (output / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        output.rmdir()
