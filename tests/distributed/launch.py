"""Run a function on N real processes that share a gloo group on loopback: the one helper for every distributed test.

`run_ranks(function, world_size, *args)` returns what each rank returned. `function(rank, *args)` must be at the top
level of a module. Processes come from a fork server that has imported torch once, so a start costs milliseconds.
"""

import datetime
import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = (
    "torch", "torch.distributed", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.testing",
    "goku_mega.train.loop",  # with megatron-core: seconds of every rank's start
)  # fmt: skip

# At import, which conftest.py does for every test: a server that another test has started first has loaded nothing.
multiprocessing.set_forkserver_preload([name for name in PRELOAD if importlib.util.find_spec(name.split(".")[0])])


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time; the message carries each failing rank's traceback."""


@dataclass
class Running:
    """Processes under way. `results()` waits for them; a test may kill `processes[i]` itself before that."""

    processes: list[BaseProcess]
    pipes: list[Connection]
    folder: Path
    deadline: float

    def results(self) -> list[Any]:
        """What each rank returned; RankFailed if one did not return."""
        try:
            return _collect(self)
        finally:
            self.stop()

    def stop(self) -> None:
        """End what still runs and remove the scratch folder."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Run `function(rank, *args)` on `world_size` processes with gloo initialised; return each rank's result.

    Arguments and results travel by pickle, tensors included. Raises RankFailed with the failing rank's traceback.
    """
    return start_ranks(function, world_size, *args, timeout_s=timeout_s).results()


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> Running:
    """Start the processes and return at once, for tests that kill some of them."""
    context = multiprocessing.get_context("forkserver")
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    payload = pickle.dumps((function, args))
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        place = (rank, world_size, str(folder), timeout_s)
        process = context.Process(target=_rank_main, args=(place, payload, theirs, dict(os.environ)), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return Running(processes, pipes, folder, time.monotonic() + timeout_s + 10)


def _rank_main(place: tuple[int, int, str, float], payload: bytes, pipe: Connection, environment: dict) -> None:
    rank, world_size, folder, timeout_s = place
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    with open(f"{folder}/stacks-{rank}", "w") as stacks:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=stacks)
        try:
            _join_group(rank, world_size, folder, timeout_s)
            function, args = pickle.loads(payload)
            message = (True, pickle.dumps(function(rank, *args)))
        except BaseException:
            message = (False, pickle.dumps(traceback.format_exc()))
        pipe.send(message)
        pipe.close()
        _leave_group(succeeded=message[0])
        faulthandler.cancel_dump_traceback_later()


def _join_group(rank: int, world_size: int, folder: str, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def _leave_group(succeeded: bool) -> None:
    """Wait for the others before closing connections that they may still read from."""
    import torch.distributed as dist

    if dist.is_initialized():
        try:
            if succeeded:
                dist.barrier()
            dist.destroy_process_group()
        except RuntimeError:
            pass  # another rank failed; it has reported that itself


def _collect(ranks: Running) -> list[Any]:
    open_pipes = {pipe: rank for rank, pipe in enumerate(ranks.pipes)}
    results: dict[int, Any] = {}
    failures: list[str] = []
    deadline = ranks.deadline
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in [pipe for pipe in open_pipes if pipe in ready]:
            rank = open_pipes.pop(pipe)
            failure = _receive(ranks, rank, results)
            if failure:
                failures.append(failure)
                deadline = min(deadline, time.monotonic() + 0.5)  # the others may be failing because of this one
    if failures:
        raise RankFailed("\n".join(failures))
    if open_pipes:
        raise RankFailed(f"no result from rank(s) {sorted(open_pipes.values())} in time")
    return [results[rank] for rank in range(len(ranks.pipes))]


def _receive(ranks: Running, rank: int, results: dict[int, Any]) -> str:
    """Read a rank's message into `results`; return a description if it failed."""
    try:
        succeeded, content = ranks.pipes[rank].recv()
    except EOFError:
        ranks.processes[rank].join(timeout=5)
        stacks = (ranks.folder / f"stacks-{rank}").read_text()
        return f"rank {rank} died with exit code {ranks.processes[rank].exitcode}\n{stacks}"
    value = pickle.loads(content)
    if succeeded:
        results[rank] = value
        return ""
    return f"rank {rank} raised:\n{value}"
