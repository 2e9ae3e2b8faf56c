"""Real gloo ranks of which one does something else, and what the supervisor sees of them."""

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from goku_infra.diagnosis import flight_record
from goku_infra.heartbeat import Heartbeat, dump_stacks_on_signal, read_beats
from goku_infra.node.observe import observe
from goku_infra.views import RankView
from launch import Running, start_ranks

WORLD_SIZE = 3
ODD = 1
ODD_STEP = 20
STEP_S = 0.005
"""Asleep instead of at work, which needs no core of a busy machine."""
SLOW_STEP_S = 0.05


@contextlib.contextmanager
def odd_ranks(folder: Path, oddity: str) -> Iterator[Running]:
    """Three ranks in a loop of all_reduce, running; from step ODD_STEP on, rank ODD behaves oddly."""
    ranks = start_ranks(_loop, WORLD_SIZE, folder, oddity)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        ranks.stop()


def views(folder: Path, ranks: Running) -> list[RankView]:
    """The ranks as an agent describes them."""
    beats = {beat.rank: beat for beat in read_beats(folder)}
    return [
        RankView(node=f"node{rank}", **observe(rank, 0, process.pid or 0, time.monotonic(), beats.get(rank)))
        for rank, process in enumerate(ranks.processes)
    ]


def wait_until(condition, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.02)


def wait_for_step(folder: Path, ranks: Running, step: int = ODD_STEP) -> None:
    wait_until(lambda: min(view.step for view in views(folder, ranks)) >= step)


def _loop(rank: int, folder: Path, oddity: str) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import _dump_fr_trace_json

    stacks = folder / f"rank_{rank:05d}.stacks"
    dump_stacks_on_signal(stacks)
    flight_record.offer(stacks, _dump_fr_trace_json)
    values = torch.ones(4)
    with Heartbeat(folder, rank, WORLD_SIZE) as heartbeat:
        step = 0
        while True:
            heartbeat.beat(step, "data")
            time.sleep(SLOW_STEP_S * (2.5 if rank == ODD else 1.0) if oddity == "slow" else STEP_S)
            if rank == ODD and step == ODD_STEP:
                _be_odd(oddity)
            heartbeat.beat(step, "forward")
            dist.all_reduce(values)
            step += 1


def _be_odd(oddity: str) -> None:
    import torch
    import torch.distributed as dist

    if oddity == "holds the GIL":
        left_s = 600
        while left_s:  # a request for stacks ends the call
            left_s = ctypes.PyDLL(None).sleep(left_s)
    elif oddity == "sleeps":
        time.sleep(600)
    elif oddity == "waits for a lock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif oddity == "other collective":
        dist.all_gather([torch.zeros(4) for _ in range(WORLD_SIZE)], torch.ones(4))
    elif oddity == "stops":
        signal.raise_signal(signal.SIGSTOP)
