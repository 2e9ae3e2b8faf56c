"""The process beside a rank that writes its file while the training goes on.

Started once, without torch. It is told what to write over a pipe, reads it from memory it shares with its rank, and
ends with its rank. The ranks' writers meet at sockets that the ranks keep open, so a writer that was killed is started
again and finds the others where they were.
"""

import contextlib
import ctypes
import hmac
import logging
import mmap
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import xxhash

from goku_mega.checkpoint.commit import (
    attempt_folder,
    check_owner,
    clear,
    file_name,
    remove_leftovers,
    write_image,
)
from goku_mega.checkpoint.coordinator import PATIENCE_S, Coordinator, Place
from goku_mega.checkpoint.index import Index
from goku_mega.checkpoint.messages import Message, ask, connect, receive, send

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
TRIES = 3
"""How often a rank writes its file before it gives the save up."""
PAUSE_S = 0.5
"""Wait before the second try; twice as long before each further one."""


@dataclass(frozen=True)
class Order:
    """One save."""

    step: int
    attempt: str
    info: dict[str, Any]
    tiers: tuple[str, ...]
    """Where to: "node", "store", or first one and then the other."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    step: int
    path: str = ""
    """The committed checkpoint."""
    fault: str = ""
    """Why there is none."""
    seconds: float = 0.0
    """From the copy's end to the commit."""


def main() -> None:
    """Entry of the process. Its arguments: the pipe's, the image's and the listener's descriptor, and the parent."""
    pipe, image, listener, parent = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the rank, which ends its writer in its own time
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s writer %(levelname).1s %(message)s")
    orders = Connection(pipe)
    with contextlib.suppress(EOFError, ConnectionError):
        place, index_bytes = orders.recv()
        size = os.fstat(image).st_size
        content = (
            memoryview(mmap.mmap(image, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)) if size else memoryview(b"")
        )
        if place.rank == 0 or place.node:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one connection a rank
            Coordinator(place, socket.socket(fileno=listener)).start()
        writer = Writer(place, Index.from_bytes(index_bytes), content)
        orders.send("ready")
        while True:
            orders.send(writer.write(orders.recv()))


class Writer:
    """One rank's part of every save."""

    def __init__(self, place: Place, index: Index, image: memoryview) -> None:
        self.place = place
        self.index = index
        self.image = image
        self.file = file_name(place.rank)
        columns = [getattr(index.chunks, name).tobytes() for name in ("tensor", "head", "data", "offsets", "sizes")]
        self.plan = xxhash.xxh3_128_hexdigest(repr((index.files, index.tensors)).encode() + b"".join(columns))

    def write(self, order: Order) -> Outcome:
        """Write this rank's file and wait until all of the checkpoint is committed, or given up, in every place."""
        began = time.monotonic()
        outcome: dict[str, str] = {}
        for tier in order.tiers:
            if "fault" in outcome and self.place.rank == 0:  # the store may take what the nodes could not
                logger.warning("step %d is not on the nodes (%s), only in the store", order.step, outcome["fault"])
            outcome = self._save(order, tier)
        return Outcome(order.step, **outcome, seconds=time.monotonic() - began)

    def _save(self, order: Order, tier: str) -> dict[str, str]:
        message: Message = {}
        for attempt in range(TRIES):
            try:
                message = self._write_file(order, tier)
                break
            except OSError as error:
                fault = f"rank {self.place.rank}: {type(error).__name__}: {error}"
                message = {"fault": fault}
                if isinstance(error, PermissionError):  # no further try changes that
                    break
                if attempt + 1 < TRIES:
                    logger.warning("writing the checkpoint of step %d failed (%s); trying again", order.step, fault)
                    time.sleep(PAUSE_S * 2**attempt)
        outcome = self._report(order, tier, message)
        with contextlib.suppress(OSError):  # the next save removes it as well
            clear(self.place.root(tier), order.step, order.attempt)
        return outcome

    def _write_file(self, order: Order, tier: str) -> Message:
        place, root = self.place, self.place.root(tier)
        if place.rank in (place.leaders if tier == "node" else (0,)):
            check_owner(root, place.token)  # or else it would remove what the job writes that has taken over
            remove_leftovers(root, besides=order.attempt)
        free = root.free_bytes()
        if free is not None and free < len(self.image):
            raise OSError(f"{root} has {free / 1e9:.3f} GB free, and {len(self.image) / 1e9:.3f} GB are to be written")
        digests = write_image(attempt_folder(root, order.step, order.attempt), self.file, self.image)
        if tier == "node" and place.peer >= 0:
            copy = {"about": "copy", "file": self.file, **_hello(place, order, tier)}
            answer = ask(place.addresses[place.peer], copy, self.image)
            if "fault" in answer:
                raise OSError(f"rank {place.peer} could not keep a copy: {answer['fault']}")
        return {"plan": self.plan, "digests": digests.tolist()}

    def _report(self, order: Order, tier: str, message: Message) -> dict[str, str]:
        """Tell rank 0's writer, and hear what became of the save. Goes on asking while that writer is started anew."""
        hello = {"about": "part", **_hello(self.place, order, tier)}
        if self.place.rank == 0:
            hello["info"] = order.info
        deadline = time.monotonic() + PATIENCE_S + 60
        while time.monotonic() < deadline:
            try:
                with connect(self.place.addresses[0]) as connection:
                    connection.settimeout(max(1.0, deadline - time.monotonic()))
                    send(connection, {**hello, **message})
                    answer = receive(connection)
                    if answer.get("send_plan"):
                        send(connection, {}, self.index.to_bytes())
                        answer = receive(connection)
                    return answer
            except OSError:
                time.sleep(0.2)
        return {"fault": f"rank 0's writer at {self.place.addresses[0]} cannot be reached"}


def give_up(place: Place, order: Order, fault: str, *, limit_s: float) -> Message:
    """Tell rank 0's writer that a rank writes nothing for a save, so that the others need not wait for it; how the
    save ends, which may be well if the rank had written before."""
    verdict: Message = {}
    for tier in order.tiers:
        verdict = {"fault": fault}
        with contextlib.suppress(OSError), connect(place.addresses[0]) as connection:
            connection.settimeout(limit_s)
            send(connection, {"about": "part", **_hello(place, order, tier), "fault": fault})
            verdict = receive(connection)
    return verdict


def refuse(listener: socket.socket, place: Place, fault: str, *, limit_s: float) -> None:
    """In place of rank 0's writer, tell the other ranks' that a save has failed."""
    others, deadline = set(range(1, place.world)), time.monotonic() + limit_s
    while others and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError, ValueError), listener.accept()[0] as connection:
            connection.settimeout(left)
            message = receive(connection)
            if hmac.compare_digest(str(message.get("token")), place.token):
                send(connection, {"fault": fault})
                others.discard(message.get("rank"))


def _hello(place: Place, order: Order, tier: str) -> Message:
    return {"token": place.token, "rank": place.rank, "tier": tier, "attempt": order.attempt, "step": order.step}
