"""The process beside a rank that writes its file while the training goes on; rank 0's also commits for all.

Started once, without torch. It is told what to write over a pipe, reads it from memory it shares with its rank, and
ends with its rank. The ranks' writers meet over TCP at a socket that rank 0 keeps open, so a writer that was killed
is started again and finds the others where they were.
"""

import asyncio
import contextlib
import ctypes
import hmac
import json
import logging
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import xxhash

from goku_mega.checkpoint.commit import (
    attempt_folder,
    file_name,
    joined,
    publish,
    remove_leftovers,
    retire,
    with_digests,
    write_image,
)
from goku_mega.checkpoint.index import Index
from goku_mega.checkpoint.retention import Retention
from goku_mega.checkpoint.storage import Folder, open_folder

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
TRIES = 3
"""How often a rank writes its file before it gives the save up."""
PAUSE_S = 0.5
"""Wait before the second try; twice as long before each further one."""
PATIENCE_S = 1800.0
"""How long rank 0 waits for the parts of the other ranks."""


@dataclass(frozen=True)
class Place:
    """Where a job writes, and who commits there."""

    root: str
    token: str
    rank: int
    world: int
    coordinator: tuple[str, int]
    retention: Retention


@dataclass(frozen=True)
class Order:
    """One save."""

    step: int
    attempt: str
    info: dict[str, Any]


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
        if place.rank == 0:
            Coordinator(place, socket.socket(fileno=listener)).start()
        writer = Writer(place, Index.from_bytes(index_bytes), content)
        orders.send("ready")
        while True:
            orders.send(writer.write(orders.recv()))


class Writer:
    """One rank's part of every save."""

    def __init__(self, place: Place, index: Index, image: memoryview) -> None:
        self.place = place
        self.root = open_folder(place.root)
        self.index = index
        self.image = image
        columns = [getattr(index.chunks, name).tobytes() for name in ("tensor", "head", "data", "offsets", "sizes")]
        self.plan = xxhash.xxh3_128_hexdigest(repr((index.files, index.tensors)).encode() + b"".join(columns))

    def write(self, order: Order) -> Outcome:
        """Write this rank's file and wait until all of the checkpoint is committed, or given up."""
        began = time.monotonic()
        if self.place.rank == 0:
            remove_leftovers(self.root, besides=order.attempt)
        for attempt in range(TRIES):
            try:
                self._check_space()
                folder = attempt_folder(self.root, order.step, order.attempt)
                digests = write_image(folder, file_name(self.place.rank), self.image)
                message: dict[str, Any] = {"plan": self.plan, "digests": digests.tolist()}
                break
            except OSError as error:
                fault = f"rank {self.place.rank}: {type(error).__name__}: {error}"
                message = {"fault": fault}
                if attempt + 1 < TRIES:
                    logger.warning("writing the checkpoint of step %d failed (%s); trying again", order.step, fault)
                    time.sleep(PAUSE_S * 2**attempt)
        verdict = self._report(order, message)
        return Outcome(order.step, **verdict, seconds=time.monotonic() - began)

    def _check_space(self) -> None:
        free = self.root.free_bytes()
        if free is not None and free < len(self.image):
            raise OSError(
                f"{self.root} has {free / 1e9:.3f} GB free, and {len(self.image) / 1e9:.3f} GB are to be written"
            )

    def _report(self, order: Order, message: dict[str, Any]) -> dict[str, str]:
        """Tell rank 0's writer, and hear what became of the save. Goes on asking while that writer is started anew."""
        hello = {"token": self.place.token, "rank": self.place.rank, "attempt": order.attempt, "step": order.step}
        if self.place.rank == 0:
            hello["info"] = order.info
        deadline = time.monotonic() + PATIENCE_S + 60
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(self.place.coordinator, timeout=30) as connection:
                    connection.settimeout(None)
                    _enliven(connection)
                    send(connection, {**hello, **message})
                    answer, _ = receive(connection)
                    if answer.get("send_plan"):
                        send(connection, {}, self.index.to_bytes())
                        answer, _ = receive(connection)
                    return answer
            except (OSError, EOFError):
                time.sleep(0.2)
        return {"fault": f"rank 0's writer at {self.place.coordinator} cannot be reached"}


@dataclass
class _Attempt:
    """What rank 0 knows of a save under way."""

    step: int
    info: dict[str, Any] | None = None
    parts: dict[int, tuple[str, list[int]]] = field(default_factory=dict)
    """rank -> its plan, and the checksums of its file's blocks."""
    fault: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Coordinator:
    """In rank 0's writer: waits for every rank's part of an attempt, publishes it, and tells all."""

    def __init__(self, place: Place, listener: socket.socket) -> None:
        self.place = place
        self.root: Folder = open_folder(place.root)
        self.listener = listener
        self.attempts: dict[str, _Attempt] = {}
        self.verdicts: dict[str, asyncio.Task[dict[str, str]]] = {}
        self.plans: dict[str, Index] = {}
        self._joined: tuple[tuple[str, ...], Index] | None = None

    def start(self) -> None:
        """Serve in a thread until the process ends."""
        threading.Thread(target=lambda: asyncio.run(self._serve()), name="coordinator", daemon=True).start()

    async def _serve(self) -> None:
        self.listener.setblocking(False)
        server = await asyncio.start_server(self._meet, sock=self.listener)
        await server.serve_forever()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One rank's report of one attempt."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ValueError, KeyError):
            message, _ = await _read(reader)
            if hmac.compare_digest(str(message.get("token")), self.place.token):
                if "plan" in message and message["plan"] not in self.plans:
                    await _write(writer, {"send_plan": True})
                    _, plan = await _read(reader)
                    self.plans[message["plan"]] = Index.from_bytes(plan)
                await _write(writer, await asyncio.shield(self._note(message)))
        writer.close()

    def _note(self, message: dict[str, Any]) -> "asyncio.Task[dict[str, str]]":
        """Take a rank's report; what will be the verdict over its attempt."""
        name = message["attempt"]
        if name not in self.attempts:
            self.attempts[name] = _Attempt(message["step"])
            self.verdicts[name] = asyncio.create_task(self._judge(name))
            for old in [key for key, task in self.verdicts.items() if task.done()][:-4]:
                del self.attempts[old], self.verdicts[old]
        attempt = self.attempts[name]
        attempt.info = message.get("info", attempt.info)
        if "fault" in message:
            attempt.fault = attempt.fault or message["fault"]
        else:
            attempt.parts[message["rank"]] = (message["plan"], message["digests"])
        attempt.changed.set()
        return self.verdicts[name]

    async def _judge(self, name: str) -> dict[str, str]:
        attempt = self.attempts[name]
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not attempt.fault and (len(attempt.parts) < self.place.world or attempt.info is None):
            attempt.changed.clear()
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(attempt.changed.wait(), left)
            except TimeoutError:
                late = sorted(set(range(self.place.world)) - set(attempt.parts))
                attempt.fault = (
                    f"the parts of {len(late)} ranks, first of rank {late[0]}, did not come in {PATIENCE_S} s"
                )
        work = self._abandon if attempt.fault else self._publish
        return await asyncio.get_running_loop().run_in_executor(None, _guarded(work), name)

    def _abandon(self, name: str) -> dict[str, str]:
        attempt = self.attempts[name]
        attempt_folder(self.root, attempt.step, name).remove()
        return {"fault": attempt.fault}

    def _publish(self, name: str) -> dict[str, str]:
        attempt = self.attempts[name]
        plans = tuple(attempt.parts[rank][0] for rank in range(self.place.world))
        digests = [np.array(attempt.parts[rank][1], dtype=np.uint64) for rank in range(self.place.world)]
        if self._joined is None or self._joined[0] != plans:
            self._joined = plans, joined([self.plans[plan] for plan in plans])
            self.plans = {plan: index for plan, index in self.plans.items() if plan in plans}
        index = with_digests(self._joined[1], digests)
        info = {**(attempt.info or {}), "saved_at_s": time.time()}
        try:
            path = publish(self.root, name, attempt.step, index, info, self.place.token)
        except (OSError, ValueError) as error:
            attempt.fault = f"{type(error).__name__}: {error}"
            return self._abandon(name)
        retire(self.root, attempt.step, self.place.retention)
        return {"path": str(path)}


def _guarded(work: Callable[[str], dict[str, str]]) -> Callable[[str], dict[str, str]]:
    """A store that fails in an unforeseen way ends the save, and not the waiting ranks."""

    def call(name: str) -> dict[str, str]:
        try:
            return work(name)
        except Exception as error:
            logger.exception("the save %s failed", name)
            return {"fault": f"{type(error).__name__}: {error}"}

    return call


def _enliven(connection: socket.socket) -> None:
    """Notice within a minute that the host at the other end is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


_LENGTHS = struct.Struct("!IQ")


def _framed(message: dict[str, Any], blob: bytes) -> bytes:
    header = json.dumps(message).encode()
    return _LENGTHS.pack(len(header), len(blob)) + header + blob


def send(connection: socket.socket, message: dict[str, Any], blob: bytes = b"") -> None:
    """A JSON object and bytes that go with it."""
    connection.sendall(_framed(message, blob))


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """What `send` sent.

    Raises:
        EOFError: the other end closed before that.
    """
    with connection.makefile("rb") as stream:
        start = stream.read(_LENGTHS.size)
        if len(start) < _LENGTHS.size:
            raise EOFError
        header, blob = _LENGTHS.unpack(start)
        content = stream.read(header), stream.read(blob)
    if len(content[0]) < header or len(content[1]) < blob:
        raise EOFError
    return json.loads(content[0]), content[1]


async def _read(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    header, blob = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
    return json.loads(await reader.readexactly(header)), await reader.readexactly(blob)


async def _write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(_framed(message, b""))
    await writer.drain()
