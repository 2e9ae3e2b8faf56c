"""Planning a checkpoint of the 8B model on thousands of ranks: `python -m benchmarks.checkpoint_scale [--json]`.

Weights, moving average and both of AdamW's moments in fp32. The boxes of every rank come from the model built on no
memory and the rule by which tensor parallelism and FSDP cut it; every rank's plan is then made by the code that a run
uses, and so is what rank 0's writer makes of all of them. Of a rank counts the slowest of those timed; of the bytes,
every rank's.

Training is blocked while a rank's share is copied to the host. The copy is worked out, not measured: the largest share
over --link, the rate from device to host in GB/s that each rank has to itself. A rank plans once, when training starts;
here the first save is charged for it all the same. What rank 0's writer does with all plans, and each commit, is beside
the training.

Below it stock DCP on the same boxes with as many ranks as --stock says: a rank's local plan (of the real FSDP2 model on
no memory), the plans' way to the coordinator (pickled), the global plan, and the way back. All ranks wait for that in
each `dcp.save`. Python's garbage collector is off there, which is several times faster than how torch runs it; it is on
for ours.

Plans are in seconds of this process's processor time, commits in seconds by the clock.
"""

import argparse
import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks._measure import device_name, report
from goku_mega.checkpoint.commit import attempt_folder, file_name, joined, take_over
from goku_mega.checkpoint.coordinator import Coordinator, Place
from goku_mega.checkpoint.index import Index
from goku_mega.checkpoint.messages import connect, receive, send
from goku_mega.checkpoint.retention import Retention
from goku_mega.checkpoint.save_plan import Box, plan_rank
from goku_mega.checkpoint.state import STORED_UNDER
from goku_mega.checkpoint.storage import open_folder
from goku_mega.checkpoint.torch_metadata import torch_metadata
from goku_mega.config.training import ComputeConfig
from goku_mega.model.sizes import ModelShape, model_shape
from goku_mega.model.specs import make_engine
from goku_mega.model.transformer import GokuTransformer, megatron_config
from goku_mega.parallel.groups import build_groups, single_process_groups, support_megatron_on_host
from goku_mega.parallel.layout import Layout
from goku_mega.parallel.parallelize import apply_fsdp, core_attention, tensor_parallel_dims
from goku_mega.parallel.shards import Copies

Result = TypeVar("Result")

SIZE = "8b"
LAYOUTS = (
    Layout(tp=8, dp_shard=16, dp_replicate=8),
    Layout(tp=8, dp_shard=32, dp_replicate=8),
    Layout(tp=8, dp_shard=64, dp_replicate=8),
    Layout(tp=8, dp_shard=128, dp_replicate=8),
    Layout(dp_shard=1024),
)
STOCK_LAYOUTS = {
    ranks: Layout(tp=8, dp_shard=shard, dp_replicate=replicate)
    for ranks, shard, replicate in ((64, 4, 2), (256, 8, 4), (1024, 16, 8))
}
TIMED_RANKS = 16
"""Ranks of a layout whose plan is timed, evenly spread, before all are planned."""
BLOCKED_LIMIT_S, PLAN_LIMIT_S, SPREAD_LIMIT = 0.4, 5.0, 1.02


class Parameter(NamedTuple):
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    """The axis that is split over tensor-parallel ranks; None: each has a copy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--link", type=float, default=20.0, metavar="GB/S", help="from device to host, of each rank")
    parser.add_argument("--stock", type=int, nargs="*", choices=STOCK_LAYOUTS, default=[64, 256, 1024], metavar="RANKS")
    options = parser.parse_args()
    parameters = whole_parameters(model_shape(SIZE))
    gc.disable()
    stock = [stock_case(parameters, STOCK_LAYOUTS[ranks]) for ranks in options.stock]
    gc.enable()
    gc.collect()  # what torch's plans left is nothing that a rank of ours would have to clear away
    cases = [our_case(parameters, layout, options.link) for layout in LAYOUTS]
    blocked = max(case["first_blocked_s"] for case in cases)
    result = {
        "name": "checkpoint_scale", "value": blocked, "unit": "s that the first save blocks a rank, most of all cases",
        "baseline": BLOCKED_LIMIT_S, "ratio": round(blocked / BLOCKED_LIMIT_S, 3), "device": device_name(),
        "link_gb_s": options.link,
        "limits": {"blocked_s": BLOCKED_LIMIT_S, "plan_s": PLAN_LIMIT_S, "bytes_max_over_mean": SPREAD_LIMIT},
        "cases": cases, "stock": stock,
    }  # fmt: skip
    report(options, [*table(cases, OURS), "", *table(stock, STOCK)], result)


def whole_parameters(shape: ModelShape) -> list[Parameter]:
    """The parameters of the whole model in its order, from one built on no memory."""
    groups = single_process_groups()
    engine = make_engine(
        ComputeConfig(), shape, tp=1, device=groups.device, dtype=torch.float32, recomputes=False
    )  # fmt: skip
    model = on_no_memory(shape, groups, engine)
    dims = tensor_parallel_dims(model, engine)
    dist.destroy_process_group()
    return [Parameter(name, tuple(whole.shape), dims.get(name)) for name, whole in model.named_parameters()]


def on_no_memory(shape: ModelShape, groups: Any, engine: Any) -> GokuTransformer:
    """As `build_model` begins."""
    block = partial(
        engine.block,
        cross_attention=shape.text_width is not None,
        self_core_attention=core_attention(engine, shape, groups),
    )
    config = megatron_config(shape, tp=groups.layout.tp, **engine.settings)
    with torch.device("meta"):
        return GokuTransformer(shape, config=config, block=block, groups=groups.model)


def rank_boxes(parameters: list[Parameter], layout: Layout, rank: int) -> list[Box]:
    """What one rank holds: the tensor-parallel part of every tensor, and of that the rows that FSDP gives the rank."""
    shard_rank, tp_rank = divmod(rank % (layout.dp_shard * layout.tp), layout.tp)
    copies = {split: rank_copies(layout, rank, split=split) for split in (True, False)}
    boxes = []
    for part, parameter in itertools.product(STORED_UNDER.values(), parameters):
        offsets, sizes = [0] * len(parameter.shape), list(parameter.shape)
        split = parameter.tp_dim is not None
        if split:
            sizes[parameter.tp_dim] //= layout.tp
        rows = -(-sizes[0] // layout.dp_shard)  # as torch cuts: the last ranks get less, or nothing
        offsets[0] = min(shard_rank * rows, sizes[0])
        sizes[0] = min(rows, sizes[0] - offsets[0])
        if split:
            offsets[parameter.tp_dim] += tp_rank * (parameter.shape[parameter.tp_dim] // layout.tp)
        name = f"{part}/{parameter.name}"
        boxes.append(Box(name, "float32", parameter.shape, tuple(offsets), tuple(sizes), copies[split]))
    return boxes


def rank_copies(layout: Layout, rank: int, *, split: bool) -> Copies:
    """Which of its copies a rank has of a tensor that tensor parallelism splits, or of one that it does not."""
    axes = {"replicate": (rank // (layout.dp_shard * layout.tp), layout.dp_replicate)}
    if not split:
        axes["tp"] = (rank % layout.tp, layout.tp)
    number, count = 0, 1
    for place, ranks in axes.values():
        number, count = number * ranks + place, count * ranks
    return Copies(number, count, tuple(axis for axis, (_, ranks) in axes.items() if ranks > 1))


def our_case(parameters: list[Parameter], layout: Layout, link: float) -> dict[str, Any]:
    """Plan every rank, and commit twice what rank 0's writer is told of the files, which are empty."""
    ranks = layout.world_size
    some = range(0, ranks, ranks // TIMED_RANKS)
    plan_s = [timed(partial(plan_bytes, parameters, layout, rank))[0] for rank in some]
    plans = [plan_bytes(parameters, layout, rank) for rank in range(ranks)]
    join_s, index = timed(lambda: joined([Index.from_bytes(plan) for plan in plans]))
    check_s, _ = timed(index.check_complete)
    index_s, index_bytes = timed(index.to_bytes)
    metadata_s, metadata_bytes = timed(lambda: torch_metadata(index))
    largest, mean = int(index.file_bytes.max()), float(index.file_bytes.mean())
    copy_s = largest / (link * 1e9)
    first_s, next_s = commit_seconds(plans, index)
    return {
        "layout": str(layout), "ranks": ranks,
        "plan_s": round(max(plan_s), 4), "plan_median_s": round(statistics.median(plan_s), 4),
        "join_s": round(join_s, 2), "check_s": round(check_s, 2), "index_s": round(index_s, 2),
        "metadata_s": round(metadata_s, 2), "plans_mb": round(sum(map(len, plans)) / 1e6, 1),
        "commit_first_s": round(first_s, 2), "commit_next_s": round(next_s, 2),
        "rank_mb_largest": round(largest / 1e6, 2), "rank_mb_mean": round(mean / 1e6, 2),
        "bytes_max_over_mean": round(largest / mean, 4),
        "file_over_tensor_bytes": round(float(index.file_bytes.sum() / index.chunk_bytes.sum()), 4),
        "files": len(index.files), "chunks": len(index.chunks),
        "index_mb": round(len(index_bytes) / 1e6, 1), "metadata_mb": round(len(metadata_bytes) / 1e6, 1),
        "blocked_s": round(copy_s, 4), "first_blocked_s": round(copy_s + max(plan_s), 4),
    }  # fmt: skip


def commit_seconds(plans: list[bytes], index: Index) -> tuple[float, float]:
    """From the first rank's report to the last rank's verdict, of a first save and of one more, by the clock.

    The coordinator is the real one, and so are the connections, from a process that speaks for all ranks; the files
    have their sizes, but no blocks on the disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as root, socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        folder = open_folder(root)
        take_over(folder, "token")
        place = Place(
            store=root, node="", token="token", rank=0, addresses=(listener.getsockname(),) * len(plans), leaders=(0,),
            peer=-1, retention=Retention(1),
        )  # fmt: skip
        Coordinator(place, listener.dup()).start()
        seconds = []
        for step in (1, 2):
            attempt = attempt_folder(folder, step, f"token-{step}")
            attempt.write(file_name(0), [])
            for name, size in zip(index.files, index.file_bytes.tolist(), strict=True):
                path = Path(str(attempt)) / name
                path.touch()
                os.truncate(path, size)
            began = time.monotonic()
            blocks = [len(digests) for digests in index.digests]
            ranks = multiprocessing.get_context("fork").Process(target=commit, args=(place, step, plans, blocks))
            ranks.start()
            ranks.join()
            if ranks.exitcode != 0:
                raise RuntimeError("the commit failed")
            seconds.append(time.monotonic() - began)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return seconds[0], seconds[1]


def commit(place: Place, step: int, plans: list[bytes], blocks: list[int]) -> None:
    """Every rank reports its file, sends its plan if it is asked to, and hears the verdict."""
    hello = {"token": place.token, "about": "part", "tier": "store", "attempt": f"token-{step}", "step": step}
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(connect(address)) for address in place.addresses]
        for rank, connection in enumerate(ranks):
            part = {"rank": rank, "plan": f"plan-{rank}", "digests": [2**64 - 1] * blocks[rank], "info": {}}
            send(connection, {**hello, **part})
        if step == 1:
            for connection, plan in zip(ranks, plans, strict=True):
                assert receive(connection) == {"send_plan": True}
                send(connection, {}, plan)
        for connection in ranks:
            verdict = receive(connection)
            assert "path" in verdict, verdict


def plan_bytes(parameters: list[Parameter], layout: Layout, rank: int) -> bytes:
    """All that a rank plans: what it writes, where, and what it sends to rank 0's writer of that."""
    return plan_rank(rank_boxes(parameters, layout, rank)).index(file_name(rank)).to_bytes()


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def stock_case(parameters: list[Parameter], layout: Layout) -> dict[str, Any]:
    """What torch's planner does in a first save: local plans, gathered, one global plan, scattered, and `.metadata`."""
    ranks = layout.world_size
    local_s, local = stock_local_plan(layout)
    sent_s, _ = timed(lambda: pickle.dumps(local))
    sent = [pickle.dumps(stock_plan(rank_boxes(parameters, layout, rank), local)) for rank in range(ranks)]
    read_s, plans = timed(lambda: [pickle.loads(plan) for plan in sent])
    planner = DefaultSavePlanner()
    global_s, (plans, metadata) = timed(lambda: planner.create_global_plan(plans))
    back_s, _ = timed(lambda: sum(len(pickle.dumps(plan)) for plan in plans))
    held = [sum(item.tensor_storage_size() for item in plan.items) for plan in plans]
    metadata_s, metadata_bytes = timed(lambda: stock_metadata(plans, metadata))
    return {
        "layout": str(layout), "ranks": ranks,
        "local_s": round(local_s + sent_s, 4), "gathered_mb": round(sum(map(len, sent)) / 1e6, 1),
        "coordinator_s": round(read_s + global_s + back_s, 2),
        "of_it": {"unpickle_s": round(read_s, 2), "global_plan_s": round(global_s, 2), "pickle_s": round(back_s, 2)},
        "plan_s": round(local_s + sent_s + read_s + global_s + back_s, 2),
        "bytes_max_over_mean": round(max(held) / statistics.mean(held), 4), "chunks": sum(len(p.items) for p in plans),
        "metadata_s": round(metadata_s, 2), "metadata_mb": round(len(metadata_bytes) / 1e6, 1),
    }  # fmt: skip


def stock_local_plan(layout: Layout) -> tuple[float, SavePlan]:
    """Seconds, and the plan, of one rank with the real FSDP2 model in a job of ranks that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    support_megatron_on_host()
    groups, shape = build_groups(layout, torch.device("cpu")), model_shape(SIZE)
    engine = make_engine(
        ComputeConfig(), shape, tp=layout.tp, device=groups.device, dtype=torch.float32, recomputes=False
    )
    model = on_no_memory(shape, groups, engine)
    apply_fsdp(model, groups, torch.float32)
    state = {f"{part}/{name}": whole for part in STORED_UNDER.values() for name, whole in model.named_parameters()}
    planner = DefaultSavePlanner()

    def plan() -> SavePlan:
        planner.set_up_planner(state, is_coordinator=True)
        return planner.create_local_plan()

    seconds, made = timed(plan)
    dist.destroy_process_group()
    return seconds, made


def stock_plan(boxes: list[Box], like: SavePlan) -> SavePlan:
    """The plan that torch makes on a rank with these boxes: an item for each, copies or not."""
    items = []
    for box in boxes:
        offsets = torch.Size(box.offsets)
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(box.sizes)), TensorProperties(torch.float32), torch.Size(box.shape)
        )
        items.append(WriteItem(MetadataIndex(box.name, offsets), WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items, planner_data=like.planner_data)


def stock_metadata(plans: list[SavePlan], metadata: Metadata) -> bytes:
    """`.metadata` as torch's file system writer ends it."""
    metadata.storage_data = {
        item.index: _StorageInfo(file_name(rank), 0, item.tensor_storage_size())
        for rank, plan in enumerate(plans)
        for item in plan.items
    }
    return pickle.dumps(metadata)


OURS = {
    "layout": "ours", "ranks": "ranks", "plan_s": "plan s", "join_s": "join s", "commit_first_s": "commit s",
    "commit_next_s": "next s", "rank_mb_largest": "MB/rank", "bytes_max_over_mean": "max/mean", "files": "files",
    "chunks": "chunks", "index_mb": "index MB", "metadata_mb": ".metadata MB", "blocked_s": "blocked s",
    "first_blocked_s": "first s",
}  # fmt: skip
STOCK = {
    "layout": "stock DCP", "ranks": "ranks", "plan_s": "plan s", "coordinator_s": "of it at rank 0",
    "gathered_mb": "gathered MB", "bytes_max_over_mean": "max/mean", "chunks": "chunks",
    "metadata_mb": ".metadata MB",
}  # fmt: skip


def table(cases: list[dict[str, Any]], titles: dict[str, str]) -> list[str]:
    rows = [titles, *cases]
    widths = {name: max(len(str(row[name])) for row in rows) for name in titles}
    return ["  ".join(str(row[name]).rjust(widths[name]) for name in titles) for row in rows]


if __name__ == "__main__":
    main()
