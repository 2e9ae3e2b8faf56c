"""What a checkpoint costs: `python -m benchmarks.checkpoint [--json] [--repeats N] [--folder DIR]`.

One run, taking turns, the same bytes on the same disk:
- seconds that training stands still for a save: ours, torch's `dcp.save` and its `dcp.async_save` at their defaults,
  in real training steps, and how much longer those steps take in all;
- rates of saving and loading against what dd reaches on that disk, past the page cache or through it, whichever is
  faster;
- four ranks that load what four tensor-parallel ranks saved into four shards, and back, against loading the layout
  that was saved; and the bytes that the kernel counts as read, against torch's `dcp.load`;
- memory of the host that saving takes beyond training, in this process and in the writer.

On a GPU the state is that of layers of 8B's width, 20 GB and more; on a CPU some 0.8 GB.
"""

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor import Shard as ShardedOver

from benchmarks._measure import device_name, report
from benchmarks.memory import Case, a_step
from goku_mega.checkpoint.load import load_into
from goku_mega.checkpoint.save import Saver, save_checkpoint
from goku_mega.checkpoint.state import State, stored_shards
from goku_mega.config.training import DataConfig, FlowRun
from goku_mega.model.sizes import SIZES
from goku_mega.parallel.groups import initialise_distributed, single_process_groups
from goku_mega.parallel.parallelize import build_model
from goku_mega.parallel.shards import Shard
from goku_mega.train.loop import Trainer

ON_GPU = torch.cuda.is_available()
SHAPE = replace(SIZES["8b"], layers=7) if ON_GPU else replace(SIZES["1b"], layers=1)
LATENT = (8, 60, 104) if ON_GPU else (1, 32, 32)
STEPS = 4
"""Training steps behind each save."""
INTERVAL = 50
"""Steps between two saves of a real run."""
RANKS = 4
MATRICES = 48
"""4096 x 1024 in fp32 each, for the loads of four ranks: 0.8 GB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    try:
        blocked = measure_blocking(folder, options.repeats)
        loads = measure_ranks(folder, options.repeats)
    finally:
        shutil.rmtree(folder)
    ours, sync, stock = (blocked[f"{name}_blocked_s"] for name in ("ours", "dcp_save", "dcp_async_save"))
    lines = [
        f"state {blocked['state_gb']:.2f} GB, a step {blocked['step_s']:.2f} s, "
        f"the first save blocked {blocked['first_save_s']:.5f} s",
        f"blocked: ours {ours:.5f} s, dcp.save {sync:.2f} s ({sync / ours:.0f}x), "
        f"dcp.async_save {stock:.2f} s ({stock / ours:.0f}x)",
        f"{STEPS} steps take longer by: ours {blocked['ours_longer_s']:.2f} s "
        f"({blocked['ours_longer_share']:.2%} of {INTERVAL} steps), dcp.save {blocked['dcp_save_longer_s']:.2f} s, "
        f"dcp.async_save {blocked['dcp_async_save_longer_s']:.2f} s",
        f"save {blocked['save_gb_per_s']:.2f} GB/s, {blocked['save_of_disk']:.0%} of the disk's rate; "
        f"load {blocked['load_gb_per_s']:.2f} GB/s, {blocked['load_of_disk']:.0%}",
        f"host memory beyond training: {blocked['extra_memory_share']:.2f} of the state",
        *(f"{name}: {value}" for name, value in loads.items()),
    ]  # fmt: skip
    result = {
        "name": "checkpoint", "value": round(ours, 5), "unit": "s of training blocked by a save",
        "baseline": round(sync, 4), "ratio": round(sync / ours, 1), "device": device_name(), **blocked, **loads,
    }  # fmt: skip
    report(options, lines, result)


def measure_blocking(folder: Path, repeats: int) -> dict[str, Any]:
    """One process that trains and saves in turn by each of the three, or not at all."""
    device = initialise_distributed(1)
    run = FlowRun(run_dir="none", steps=1000, data=DataConfig(path="none"))
    dtype = torch.float32
    groups = single_process_groups(device)
    computed = torch.bfloat16 if ON_GPU else dtype
    trainer = Trainer(build_model(SHAPE, groups, seed=0, dtype=dtype, compute_dtype=computed), groups, run, computed)
    batch = a_step(0, Case("", LATENT, 1, "off"), SHAPE, dtype)
    for _ in range(4):  # malloc takes some steps until it holds all it ever will
        trainer.step(batch)
    shards = stored_shards(trainer.state, trainer.state)
    tensors = {name: shard.tensor for name, shard in shards.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    before = memory_of([os.getpid()])
    saver = Saver(folder / "ours", trainer.state, keep=1)
    trainer.saver = saver
    pending: list[Any] = []
    writes: list[float] = []

    def ours(step: int) -> float:
        return saver.save(step, {})

    def dcp_save(step: int) -> float:
        began = time.perf_counter()
        dcp.save(tensors, checkpoint_id=folder / f"dcp{step}")
        return time.perf_counter() - began

    def dcp_async_save(step: int) -> float:
        began = time.perf_counter()
        pending.append(dcp.async_save(tensors, checkpoint_id=folder / f"dcp{step}"))
        return time.perf_counter() - began

    first = ours(0)
    trainer.step(batch)
    first += trainer.fence_s
    during = memory_of([os.getpid(), saver.writer_pid])
    finish(saver, pending, folder)
    sides: dict[str, Callable[[int], float] | None] = {
        "none": None, "ours": ours, "dcp_save": dcp_save, "dcp_async_save": dcp_async_save,
    }  # fmt: skip
    blocked: dict[str, list[float]] = {name: [] for name in sides}
    total: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(repeats):
        for name, save in sides.items():
            synchronise()
            began = time.perf_counter()
            seconds = save(1 + round_number) if save else 0.0
            trainer.step(batch)
            seconds += trainer.fence_s if save is ours else 0.0
            for _ in range(STEPS - 1):
                trainer.step(batch)
            synchronise()
            total[name].append(time.perf_counter() - began)
            blocked[name].append(seconds)
            finish(saver, pending, folder)
            if save is ours and saver.outcome is not None:
                writes.append(saver.outcome.seconds)
    step_s = statistics.median(total["none"]) / STEPS
    longer = {
        name: statistics.median(a - b for a, b in zip(total[name], total["none"], strict=True))
        for name in sides if name != "none"
    }  # fmt: skip
    rates = measure_rates(folder, saver, trainer.state, size, repeats)
    trainer.saver = None
    saver.close()
    shutil.rmtree(folder / "ours")
    return {
        "state_gb": size / 1e9, "step_s": round(step_s, 4), "first_save_s": round(first, 5),
        **{f"{name}_blocked_s": round(statistics.median(blocked[name]), 5) for name in longer},
        **{f"{name}_longer_s": round(seconds, 4) for name, seconds in longer.items()},
        "ours_longer_share": round(longer["ours"] / (INTERVAL * step_s), 5),
        "ours_blocked_share": round(statistics.median(blocked["ours"]) / (INTERVAL * step_s), 7),
        "save_beside_training_s": round(statistics.median(writes), 3),
        "extra_memory_share": round((during - before) / size, 3),
        **rates,
    }  # fmt: skip


def finish(saver: Saver, pending: list[Any], folder: Path) -> None:
    """Let what is under way end, and delete torch's checkpoints."""
    outcome = saver.wait()
    if outcome is not None and outcome.fault:
        raise RuntimeError(outcome.fault)
    while pending:
        pending.pop().result()
    for path in folder.glob("dcp*"):
        shutil.rmtree(path)


def measure_rates(folder: Path, saver: Saver, state: State, size: int, repeats: int) -> dict[str, Any]:
    """Saving and loading, nothing beside them, in turn with dd on the same disk."""
    rates: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        saver.save(1000 + number, {})
        saver.fence()
        outcome = saver.wait()
        assert outcome is not None and not outcome.fault, outcome
        seconds = {"save": outcome.seconds}
        file = folder / "dd"
        seconds["write direct"] = dd(f"if=/dev/zero of={file} oflag=direct conv=fsync", size)
        seconds["write"] = dd(f"if=/dev/zero of={file} conv=fsync", size)
        evict(file)
        seconds["read direct"] = dd(f"if={file} of=/dev/null iflag=direct", size)
        evict(file)
        seconds["read"] = dd(f"if={file} of=/dev/null", size)
        file.unlink()
        for part in Path(outcome.path).iterdir():
            evict(part)
        began = time.perf_counter()
        load_into(outcome.path, state)
        synchronise()
        seconds["load"] = time.perf_counter() - began
        if number:  # the first round warms up
            for name, value in seconds.items():
                rates.setdefault(name, []).append(size / 1e9 / value)
    median = {name: statistics.median(values) for name, values in rates.items()}
    best_write, best_read = (max(median[f"{way} direct"], median[way]) for way in ("write", "read"))
    return {
        "save_gb_per_s": round(median["save"], 3), "load_gb_per_s": round(median["load"], 3),
        "save_of_disk": round(median["save"] / best_write, 3), "load_of_disk": round(median["load"] / best_read, 3),
        "dd_gb_per_s": {name: round(median[name], 3) for name in sorted(median) if name not in ("save", "load")},
    }  # fmt: skip


def dd(arguments: str, size: int) -> float:
    """Seconds that dd takes for about `size` bytes, by its own clock."""
    blocks = max(1, size // 2**24)
    command = ["dd", *arguments.split(), "bs=16M", f"count={blocks}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes.*copied, ([\d.]+) s", said)
    assert found, said
    return float(found[2]) * size / int(found[1])


def evict(file: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def memory_of(processes: list[int]) -> int:
    """Bytes of main memory that processes hold; what they share counts once."""
    rolls = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes]
    return sum(1024 * int(re.search(r"Pss:\s+(\d+) kB", roll)[1]) for roll in rolls)  # type: ignore[index]


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def measure_ranks(folder: Path, repeats: int) -> dict[str, Any]:
    """Four ranks that load into the layout that was saved, and into another."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(a_rank, (port, folder, repeats, results), nprocs=RANKS)
    return results.get()


def a_rank(rank: int, port: int, folder: Path, repeats: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    layouts = {"tp4": lambda number: number % 2, "shard4": lambda number: 0}
    """Megatron splits the first matrix of a pair by rows and the second by columns; FSDP all by rows."""
    states = {name: matrices(rank, axis) for name, axis in layouts.items()}
    dtensors = {
        name: {key: as_dtensor(shard, axis(i), mesh) for i, (key, shard) in enumerate(states[name]["model"].items())}
        for name, axis in layouts.items()
    }
    for name in layouts:
        save_checkpoint(folder / name, 1, states[name], {}, keep=1)
        dcp.save(dtensors[name], checkpoint_id=folder / f"dcp {name}")
    unique = sum(shard.tensor.nbytes for shard in states["tp4"]["model"].values()) * RANKS
    sides: dict[str, Callable[[], Any]] = {}
    for saved in layouts:
        for loaded in layouts:
            sides[f"{saved} -> {loaded}"] = lambda saved=saved, loaded=loaded: load_into(
                folder / saved / "step_00000001", states[loaded]
            )
            sides[f"dcp {saved} -> {loaded}"] = lambda saved=saved, loaded=loaded: dcp.load(
                dtensors[loaded], checkpoint_id=folder / f"dcp {saved}"
            )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    read: dict[str, float] = {}
    for round_number in range(repeats + 1):
        for name, load in sides.items():
            if rank == 0:
                for file in folder.glob("*/**/*.distcp"):
                    evict(file)
            dist.barrier()
            counted, began = bytes_read(), time.perf_counter()
            load()
            total = torch.tensor([bytes_read() - counted])
            dist.all_reduce(total)
            if round_number:
                seconds[name].append(time.perf_counter() - began)
            read[name] = total.item() / unique
    if rank == 0:
        ratios = {
            f"{saved}_to_{loaded}": statistics.median(
                a / b for a, b in zip(seconds[f"{saved} -> {loaded}"], seconds[f"{saved} -> {saved}"], strict=True)
            )
            for saved, loaded in (("tp4", "shard4"), ("shard4", "tp4"))
        }
        results.put({
            "reshard_time_ratio": {name: round(ratio, 3) for name, ratio in ratios.items()},
            "load_s": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
            "bytes_read_of_unique": {name: round(share, 3) for name, share in read.items()},
        })  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def matrices(rank: int, axis: Callable[[int], int]) -> State:
    """This rank's parts of matrices that are each split along an axis."""
    shards = {}
    for number in range(MATRICES):
        sizes, offsets = [4096, 1024], [0, 0]
        sizes[axis(number)] //= RANKS
        offsets[axis(number)] = rank * sizes[axis(number)]
        shards[f"layers.{number:02d}.weight"] = Shard(torch.randn(*sizes), (4096, 1024), tuple(offsets))
    return {"model": shards}


def as_dtensor(shard: Shard, axis: int, mesh: Any) -> DTensor:
    placements: list[Placement] = [ShardedOver(axis)]
    return DTensor.from_local(shard.tensor, mesh, placements)


def bytes_read() -> int:
    """Bytes that this process has asked the kernel for."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


if __name__ == "__main__":
    main()
