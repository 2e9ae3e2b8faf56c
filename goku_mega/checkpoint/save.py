"""Saves a run's state: the training waits only until its tensors are copied, and that beside the next forward pass.

`Saver` is what training uses; `save_checkpoint` does the same at once and waits. A checkpoint is every rank's file, as
torch.distributed.checkpoint would lay them out, an index with checksums, `info.json` and a manifest (see `commit`).
"""

import contextlib
import logging
import multiprocessing
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from goku_mega import environment
from goku_mega.checkpoint.agree import Ranks, host_name
from goku_mega.checkpoint.commit import (
    assembled,
    attempt_folder,
    file_name,
    joined,
    publish,
    retire,
    take_over,
    with_digests,
    write_image,
)
from goku_mega.checkpoint.coordinator import Place
from goku_mega.checkpoint.image import Snapshot
from goku_mega.checkpoint.index import Index
from goku_mega.checkpoint.retention import Retention
from goku_mega.checkpoint.save_plan import plan_rank
from goku_mega.checkpoint.state import State, box_of, stored_shards
from goku_mega.checkpoint.storage import Folder, open_folder
from goku_mega.checkpoint.writer import Order, Outcome, give_up, refuse
from goku_mega.errors import CheckpointError

FORMAT = 2
"""Version of this layout of files and names; raised when an older reader could not read a newer folder."""
ALERT_AFTER = 3
"""Failed saves in a row after which the failure is an alert."""
WRITER_STARTS = 3
"""How often a killed writer process is started again for one save."""
LEAVING_S = 10.0
"""How long a save under way may take while the training ends by an error."""

logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path | str,
    step: int,
    state: State,
    info: dict[str, Any],
    *,
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `state` as the checkpoint of `step`; returns its folder. Every rank calls it with its own boxes.

    Args:
        folder: holds the checkpoints of one run, on a file system that all ranks see.
        info: plain JSON to keep beside the tensors; `step`, `format`, `torch`, `code`, `world` and `saved_at_s` are
            added.
        keep: newest whole checkpoints kept, this one included; older ones are deleted.
        group: a gloo group over all ranks; None takes the default group. Needed where that is NCCL (see `agree`).

    Raises:
        CheckpointError: on every rank, if the disk of one failed. No checkpoint was published or lost.
    """
    ranks = Ranks.of(group)
    root = open_folder(folder)
    doing = f"saving the checkpoint of step {step} in {folder}"
    token = ranks.first(doing, lambda: _take_over(root))
    attempt = f"{token}-1"
    try:
        parts = ranks.together(doing, lambda: _write(root, step, attempt, state, ranks.rank))
        about = {**info, "step": step, **written_by(ranks.world), "saved_at_s": time.time()}
        path = ranks.first(doing, lambda: _publish(root, step, attempt, parts, about, token))
    except BaseException:
        if ranks.rank == 0:
            attempt_folder(root, step, attempt).remove()
        raise
    if ranks.rank == 0:
        retire(root, step, Retention(keep))
    return Path(path)


def _write(root: Folder, step: int, attempt: str, state: State, rank: int) -> bytes:
    """Write this rank's file; returns its index."""
    snapshot, index = _prepare(state, rank)
    snapshot.begin()
    snapshot.copy()
    digests = write_image(attempt_folder(root, step, attempt), file_name(rank), snapshot.image.content)
    return with_digests(index, [digests]).to_bytes()


def _publish(root: Folder, step: int, attempt: str, parts: list[bytes], info: dict[str, Any], token: str) -> str:
    index = joined([Index.from_bytes(part) for part in parts])
    index.check_complete()
    return str(publish(root, attempt, step, assembled(index, step, info), token))


def _prepare(state: State, rank: int) -> tuple[Snapshot, Index]:
    """Memory for this rank's file, and what the file holds."""
    shards = stored_shards(state, state)
    plan = plan_rank([box_of(name, shard) for name, shard in shards.items()])
    snapshot = Snapshot(plan, {name: shard.tensor for name, shard in shards.items()})
    return snapshot, plan.index(file_name(rank))


def _take_over(root: Folder) -> str:
    token = uuid.uuid4().hex[:12]
    take_over(root, token)
    return token


def written_by(world: int) -> dict[str, Any]:
    """What every checkpoint says of the program that wrote it, on `world` ranks."""
    version = environment.code_version()
    # a plain str: the writer has no torch to unpickle its own kind of it with
    return {"format": FORMAT, "torch": str(torch.__version__), "code": version, "world": world}


class Saver:
    """Saves the same tensors again and again while they are trained; a context manager.

    A save that fails is reported and counted, and the training goes on; `close` raises if the last one failed.
    Every rank makes one and calls the same methods at the same steps.
    """

    def __init__(
        self,
        folder: Path | str,
        state: State,
        *,
        keep: int,
        keep_every: int = 0,
        keep_best: int = 0,
        node_folder: str = "",
        store_every: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Plan, allocate and start the writer processes, so that no save has to.

        Args:
            folder: holds the checkpoints of one run; a path or URL that all ranks see.
            state: this rank's boxes; the tensors must stay where they are in memory.
            keep, keep_every, keep_best: see `Retention`.
            node_folder: a folder on each node's own disk or memory, on which checkpoints are committed first; each
                node's files are copied to another node, too, so that the loss of one node loses nothing.
            store_every: with a `node_folder`, every how many saves one goes on into `folder`.
            group: a gloo group over all ranks; None takes the default group.

        Raises:
            CheckpointError: on every rank, if the folder cannot be written to.
        """
        self.folder = str(folder)
        self._ranks = ranks = Ranks.of(group)
        doing = f"preparing to save in {folder}"
        self._snapshot, index = ranks.each(doing, lambda: _prepare(state, ranks.rank))
        listener = ranks.each(doing, _listen)
        token = ranks.first(doing, lambda: uuid.uuid4().hex[:12])
        addresses = tuple(ranks.gather((_own_address(), listener.getsockname()[1])))
        leaders, peer = _nodes(ranks, node_folder)
        place = Place(
            self.folder, node_folder, token, ranks.rank, addresses, leaders, peer,
            Retention(keep, keep_every, keep_best),
        )  # fmt: skip
        ranks.each(doing, lambda: _take_over_all(place))
        self._token = token
        self._tiers, self._store_every = ("node",) if node_folder else ("store",), store_every
        self._writer = _WriterProcess(place, index.to_bytes(), self._snapshot.image.fd, listener)
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._copied, self._idle = threading.Event(), threading.Event()
        self._copied.set()
        self._idle.set()
        self._count = 0
        self._last: Order | None = None
        self.outcome: Outcome | None = None
        """How the last save that has ended, ended."""
        self.committed_step: int | None = None
        """The newest step that this rank knows this saver to have committed."""
        self.failures = 0
        """Saves in a row that failed, up to now."""
        self.waits = 0
        """Saves that had to wait for the one before."""
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def writer_pid(self) -> int:
        """The process that writes this rank's file."""
        return self._writer.pid

    def save(self, step: int, info: dict[str, Any], *, to_store: bool = False) -> float:
        """Begin to save; the seconds this call took. The state must not change before `fence`.

        Args:
            info: plain JSON to keep beside the tensors; rank 0's counts.
            to_store: with a `node_folder`, this one goes on into `folder` whatever `store_every` says.
        """
        began = time.monotonic()
        if not self._idle.is_set():
            self.waits += 1
            under_way = self._last.step if self._last else step
            logger.warning("the checkpoint of step %d is due, but that of step %d is being written: waiting for it",
                           step, under_way)  # fmt: skip
            self._idle.wait()
        self._count += 1
        about = {**info, "step": step, **written_by(self._ranks.world), "saved_at_s": time.time()}
        on_to_store = self._tiers == ("node",) and (to_store or self._count % self._store_every == 0)
        tiers = (*self._tiers, "store") if on_to_store else self._tiers
        self._last = Order(step, f"{self._token}-{self._count}", about, tiers)
        self._idle.clear()
        self._copied.clear()
        self._snapshot.begin()
        self._orders.put(self._last)
        return time.monotonic() - began

    def fence(self) -> float:
        """Wait until the state may change; the seconds that took."""
        began = time.monotonic()
        self._copied.wait()
        return time.monotonic() - began

    def wait(self) -> Outcome | None:
        """Wait until no save is under way; how the last one ended."""
        self._idle.wait()
        return self.outcome

    def close(self) -> None:
        """Wait for the save under way and end the writers. A last save that failed is tried once more. Once is enough.

        Raises:
            CheckpointError: on every rank, if the last save failed for good.
        """
        if self._writer.ended:
            return
        try:
            for again in (True, False):
                outcome = self.wait()
                faults = [fault for fault in self._ranks.gather(outcome.fault if outcome else "") if fault]
                if not faults or self._last is None:
                    return
                if not again:
                    raise CheckpointError(f"the checkpoint of step {self._last.step} could not be saved: {faults[0]}")
                self.save(self._last.step, self._last.info, to_store="store" in self._last.tiers)
        finally:
            self._end()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._idle.wait(LEAVING_S)
            self._end()

    def _end(self) -> None:
        self._orders.put(None)
        self._writer.end()
        self._thread.join(LEAVING_S)

    def _work(self) -> None:
        """The thread of this class: one save after the other."""
        environment.code_version()  # asks git, which may take a while: so that it is known when the first save is due
        while (order := self._orders.get()) is not None:
            try:
                self._snapshot.copy()
                self._copied.set()
                self._finish(self._write(order))
            except Exception as error:
                logger.exception("the checkpoint of step %d failed", order.step)
                self._finish(Outcome(order.step, fault=f"{type(error).__name__}: {error}"))
            finally:
                self._copied.set()
                self._idle.set()

    def _write(self, order: Order) -> Outcome:
        for _ in range(WRITER_STARTS):
            try:
                return self._writer.ask(order)
            except (EOFError, OSError):
                if self._writer.ended:
                    break
                logger.warning("the writer of the checkpoint of step %d died; starting another", order.step)
                with contextlib.suppress(OSError):  # asking it fails, too, then
                    self._writer.restart()
        fault = f"rank {self._ranks.rank}: its writer process died"
        verdict = {"fault": fault} if self._writer.ended else self._writer.give_up(order, fault)
        return Outcome(order.step, verdict.get("path", ""), verdict.get("fault", ""))

    def _finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.failures = self.failures + 1 if outcome.fault else 0
        self.committed_step = self.committed_step if outcome.fault else outcome.step
        if self._ranks.rank > 0:
            return
        if not outcome.fault:
            logger.info("checkpoint %s, written in %.1f s", outcome.path, outcome.seconds)
        else:
            loud = logger.error if self.failures >= ALERT_AFTER else logger.warning
            alert = f"ALERT: {self.failures} saves in a row have failed: " if self.failures >= ALERT_AFTER else ""
            loud("%sthe checkpoint of step %d was not saved (%s); the training goes on, the next save tries again",
                 alert, outcome.step, outcome.fault)  # fmt: skip


class _WriterProcess:
    """The rank's end of its writer."""

    def __init__(self, place: Place, index: bytes, image_fd: int, listener: socket.socket) -> None:
        self.place = place
        self.index = index
        self.image_fd = image_fd
        self.listener = listener
        self.ended = False
        self.start()

    def restart(self) -> None:
        """Start another in place of one that died."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self.start()
        if self.ended:  # by the training meanwhile, which knew only of the one before
            self._process.kill()
            self._process.wait()

    def start(self) -> None:
        """Start it; returns before it is ready."""
        self._pipe, theirs = multiprocessing.Pipe()
        descriptors = [theirs.fileno(), self.image_fd, self.listener.fileno()]
        start = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
            "from goku_mega.checkpoint.writer import main; main()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, *map(str, descriptors), str(os.getpid())],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._pipe.send((self.place, self.index))
        self._ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, order: Order) -> Outcome:
        """Have an order carried out.

        Raises:
            EOFError, OSError: the process died.
        """
        if not self._ready:
            self._pipe.recv()
            self._ready = True
        self._pipe.send(order)
        return self._pipe.recv()

    def give_up(self, order: Order, fault: str) -> dict[str, str]:
        """Tell the other ranks that this one cannot do its part of a save; how it ends."""
        if self.place.rank == 0:
            self._process.kill()
            self._process.wait()
            refuse(self.listener, self.place, fault, limit_s=LEAVING_S)
            with contextlib.suppress(OSError):
                self.restart()
        return give_up(self.place, order, fault, limit_s=LEAVING_S)  # and those that come later, over rank 0's writer

    def end(self) -> None:
        """Let it go; it ends by itself when the pipe closes, and by a signal if it is still busy."""
        self.ended = True
        self._process.kill()
        self._process.wait()
        self.listener.close()


def _one_host() -> bool:
    return environment.local_world_size() == environment.world_size()


def _listen() -> socket.socket:
    """A rank's socket for the other ranks' writers; it outlives a writer that is killed."""
    return socket.create_server(("127.0.0.1" if _one_host() else "", 0), backlog=4096)


def _own_address() -> str:
    """This host, as the others of the job reach it."""
    if _one_host():
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing; asks which way it would go
        probe.connect((environment.master_address(), 9))
        return probe.getsockname()[0]


def _nodes(ranks: Ranks, node_folder: str) -> tuple[tuple[int, ...], int]:
    """The first rank of each node, and the rank on the next node that keeps a copy of this rank's file, or -1."""
    names = ranks.gather(f"{host_name()} {node_folder}")
    leaders = tuple(rank for rank, name in enumerate(names) if name not in names[:rank])
    if not node_folder or len(leaders) == 1:
        return leaders, -1
    mine = leaders.index(names.index(names[ranks.rank]))
    following = names[leaders[(mine + 1) % len(leaders)]]
    there = [rank for rank, name in enumerate(names) if name == following]
    place = [rank for rank, name in enumerate(names) if name == names[ranks.rank]].index(ranks.rank)
    return leaders, there[place % len(there)]


def _take_over_all(place: Place) -> None:
    """Become the job that writes, where this rank is the first to see the folder."""
    if place.rank == 0:
        take_over(open_folder(place.store), place.token)
    if place.node and place.rank in place.leaders:
        take_over(open_folder(place.node), place.token)
