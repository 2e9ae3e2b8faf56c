"""Where the writers of a job meet: each serves the others, and rank 0's decides over every save.

It waits until every rank's file is written, then publishes the checkpoint in the folder that all see, or has the first
rank of each node publish it in its node's folder, and tells all how it ended.
"""

import asyncio
import contextlib
import hmac
import logging
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from goku_mega.checkpoint.commit import (
    assembled,
    attempt_folder,
    clear,
    joined,
    publish,
    published,
    retire,
    with_digests,
)
from goku_mega.checkpoint.index import Index
from goku_mega.checkpoint.manifest import INDEX, INFO, MANIFEST, TORCH_METADATA
from goku_mega.checkpoint.messages import PIECE_BYTES, Message, answer, ask, read
from goku_mega.checkpoint.retention import Retention
from goku_mega.checkpoint.storage import Folder, open_folder

logger = logging.getLogger(__name__)

PATIENCE_S = 1800.0
"""How long rank 0 waits for the files of the other ranks."""
TELLING_S = 5.0
"""How long rank 0's rank waits for the others to hear how a save ended."""
BACKLOG = 8192
"""Connections that may wait to be taken: all ranks report within the same moment."""
NODE_KEEP = Retention(2)
"""What the nodes' own folders keep: one may be incomplete when a node is lost."""


@dataclass(frozen=True)
class Place:
    """Where a job writes, and how its writers find each other."""

    store: str
    """The folder that all ranks see."""
    node: str
    """The folder on this rank's own node; empty: there is none."""
    token: str
    """Known to this job only."""
    rank: int
    addresses: tuple[tuple[str, int], ...]
    """Of every rank's writer."""
    leaders: tuple[int, ...]
    """The first rank of each node."""
    peer: int
    """The rank on another node that keeps a copy of this rank's file; -1: there is no other node."""
    retention: Retention

    @property
    def world(self) -> int:
        return len(self.addresses)

    def root(self, tier: str) -> Folder:
        """The folder of checkpoints of a tier, "node" or "store"."""
        return open_folder(self.node if tier == "node" else self.store)


@dataclass
class _Attempt:
    """What rank 0 knows of a save under way."""

    tier: str
    step: int
    info: dict[str, Any] | None = None
    parts: dict[int, tuple[str, list[int]]] = field(default_factory=dict)
    """rank -> its plan, and the checksums of its file's blocks."""
    fault: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    know: set[int] = field(default_factory=set)
    """Ranks that have been told how it ended."""
    others_know: asyncio.Event = field(default_factory=asyncio.Event)


class Coordinator:
    """One writer's end for the others."""

    def __init__(self, place: Place, listener: socket.socket) -> None:
        self.place = place
        self.listener = listener
        self.attempts: dict[tuple[str, str], _Attempt] = {}
        self.verdicts: dict[tuple[str, str], asyncio.Task[Message]] = {}
        self.plans: dict[str, Index] = {}
        self._joined: tuple[tuple[str, ...], Index] | None = None

    def start(self) -> None:
        """Serve in a thread until the process ends."""
        threading.Thread(target=lambda: asyncio.run(self._serve()), name="coordinator", daemon=True).start()

    async def _serve(self) -> None:
        self.listener.setblocking(False)
        server = await asyncio.start_server(
            self._meet, sock=self.listener, limit=PIECE_BYTES, backlog=BACKLOG,
        )  # fmt: skip
        await server.serve_forever()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ValueError, KeyError):
            message, content = await read(reader)
            if hmac.compare_digest(str(message.get("token")), self.place.token):
                serve = {"part": self._part, "copy": self._copy, "publish": self._publish_here}[message["about"]]
                await answer(writer, await serve(message, content, reader, writer))
                if message["about"] == "part":
                    self._told(message)
        writer.close()

    async def _part(
        self, message: Message, content: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Message:
        """A rank has written its file, or cannot: how the whole save ends."""
        if "plan" in message and message["plan"] not in self.plans:
            await answer(writer, {"send_plan": True})
            _, content = await read(reader)
            self.plans[message["plan"]] = Index.from_bytes(await reader.readexactly(content))
        name = message["tier"], message["attempt"]
        if name not in self.attempts:
            attempt = self.attempts[name] = _Attempt(message["tier"], message["step"])
            if self.place.world == 1:
                attempt.others_know.set()
            self.verdicts[name] = asyncio.create_task(self._judge(name))
            for old in [key for key, task in self.verdicts.items() if task.done()][:-4]:
                del self.attempts[old], self.verdicts[old]
            self._give_up_all_but_the_newest()
        attempt = self.attempts[name]
        attempt.info = message.get("info", attempt.info)
        if "fault" in message:
            attempt.fault = attempt.fault or message["fault"]
        else:
            attempt.parts[message["rank"]] = (message["plan"], message["digests"])
        attempt.changed.set()
        verdict = await asyncio.shield(self.verdicts[name])
        if message["rank"] == 0:
            # Rank 0 hears it last: it is the one that would start this writer again if it were killed before all know.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(attempt.others_know.wait(), TELLING_S)
        return verdict

    def _told(self, message: Message) -> None:
        """Note that a rank has been answered."""
        attempt = self.attempts.get((message["tier"], message["attempt"]))
        if attempt is not None:
            attempt.know.add(message["rank"])
            if len(attempt.know | {0}) == self.place.world:
                attempt.others_know.set()

    def _give_up_all_but_the_newest(self) -> None:
        """A rank that has begun another save writes nothing more for those before it, whoever reports them when."""
        newest = max(_number(name) for _, name in self.attempts)
        for (tier, name), attempt in self.attempts.items():
            if _number(name) < newest and not self.verdicts[tier, name].done():
                attempt.fault = attempt.fault or "a rank has begun the next one"
                attempt.changed.set()

    async def _judge(self, name: tuple[str, str]) -> Message:
        attempt, loop = self.attempts[name], asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        done = await loop.run_in_executor(None, self._done, attempt, name[1])
        while not done and not attempt.fault and (len(attempt.parts) < self.place.world or attempt.info is None):
            attempt.changed.clear()
            try:
                await asyncio.wait_for(attempt.changed.wait(), deadline - loop.time())
            except TimeoutError:
                late = sorted(set(range(self.place.world)) - set(attempt.parts))
                attempt.fault = f"{len(late)} ranks, rank {late[0]} for one, have not written in {PATIENCE_S} s"
        return await _guarded(self._commit, attempt, name[1])

    def _done(self, attempt: _Attempt, name: str) -> bool:
        """Whether one that was killed since has published it: those that have heard so do not come again."""
        with contextlib.suppress(OSError):
            return published(self.place.root(attempt.tier), attempt.step, name) is not None
        return False

    def _commit(self, attempt: _Attempt, name: str) -> Message:
        """Publish what every rank has written, or remove it; in a thread."""
        root = self.place.root(attempt.tier)
        before = published(root, attempt.step, name)
        if before is not None:
            content = {file: before.read(file) for file in (INDEX, TORCH_METADATA, INFO, MANIFEST)}
            retire(root, attempt.step, self._retention(attempt.tier), whole=attempt.tier == "store")
            fault = self._publish_on_nodes(attempt, name, content) if attempt.tier == "node" else ""
            return {"fault": fault} if fault else {"path": str(before)}
        if not attempt.fault:
            try:
                # The same bytes each time: what a killed one had asked of a store may still come over these.
                info = {**(attempt.info or {}), "attempt": name}
                content = assembled(self._index(attempt), attempt.step, info)
                folder = publish(root, name, attempt.step, content, self.place.token, whole=attempt.tier == "store")
                retire(root, attempt.step, self._retention(attempt.tier), whole=attempt.tier == "store")
                attempt.fault = self._publish_on_nodes(attempt, name, content) if attempt.tier == "node" else ""
            except (OSError, ValueError) as error:
                attempt.fault = f"{type(error).__name__}: {error}"
        if attempt.fault:
            attempt_folder(root, attempt.step, name).remove()
            return {"fault": attempt.fault}
        return {"path": str(folder)}

    def _index(self, attempt: _Attempt) -> Index:
        plans = tuple(attempt.parts[rank][0] for rank in range(self.place.world))
        if self._joined is None or self._joined[0] != plans:
            whole = joined([self.plans[plan] for plan in plans])
            whole.check_complete()
            self._joined = plans, whole
            self.plans = {plan: self.plans[plan] for plan in plans}
        digests = [np.array(attempt.parts[rank][1], dtype=np.uint64) for rank in range(self.place.world)]
        return with_digests(self._joined[1], digests)

    def _retention(self, tier: str) -> Retention:
        return NODE_KEEP if tier == "node" else self.place.retention

    def _publish_on_nodes(self, attempt: _Attempt, name: str, content: dict[str, bytes]) -> str:
        """Have the other nodes publish what rank 0's has; what went wrong, or nothing."""
        order = {
            "token": self.place.token, "about": "publish", "tier": attempt.tier, "attempt": name, "step": attempt.step,
            "files": {file: len(data) for file, data in content.items()},
        }  # fmt: skip
        everything = b"".join(content.values())

        def tell(leader: int) -> str:
            try:
                return ask(self.place.addresses[leader], order, everything).get("fault", "")
            except OSError as error:
                return f"rank {leader}: {error}"

        others = [leader for leader in self.place.leaders if leader != self.place.rank]
        with ThreadPoolExecutor(min(64, max(1, len(others)))) as pool:
            return next((fault for fault in pool.map(tell, others) if fault), "")

    async def _publish_here(
        self, message: Message, content: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Message:
        """In the writer of a node's first rank: publish in the node's folder what rank 0 says."""
        files, everything = {}, await reader.readexactly(content)
        for file, size in message["files"].items():
            files[file], everything = everything[:size], everything[size:]

        def commit() -> Message:
            root = self.place.root(message["tier"])
            publish(root, message["attempt"], message["step"], files, self.place.token, whole=False)
            clear(root, message["step"], message["attempt"])  # what came once more after a first commit
            retire(root, message["step"], self._retention(message["tier"]), whole=False)
            return {}

        return await _guarded(commit)

    async def _copy(
        self, message: Message, content: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Message:
        """Keep a copy of the file of a rank on another node."""
        pieces: queue.Queue[bytes] = queue.Queue(maxsize=4)
        folder = attempt_folder(self.place.root("node"), message["step"], message["attempt"])

        def keep() -> Message:
            if folder.write(message["file"], iter(pieces.get, b"")) != content:
                raise ConnectionResetError("the rank that sends it is gone")
            return {}

        loop = asyncio.get_running_loop()
        kept = asyncio.ensure_future(_guarded(keep))
        left = content
        try:
            while left and not kept.done():
                piece = await reader.readexactly(min(left, PIECE_BYTES))
                left -= len(piece)
                await loop.run_in_executor(None, _offer, pieces, piece, kept)
        finally:
            await loop.run_in_executor(None, _offer, pieces, b"", kept)
        return await kept


def _number(attempt: str) -> int:
    """Which of the job's saves it is."""
    return int(attempt.rsplit("-", 1)[1])


def _offer(pieces: "queue.Queue[bytes]", piece: bytes, kept: "asyncio.Future[Message]") -> None:
    """Hand a piece to the thread that writes, unless that has ended."""
    while not kept.done():
        with contextlib.suppress(queue.Full):
            pieces.put(piece, timeout=0.1)
            return


async def _guarded(work: Callable[..., Message], *arguments: Any) -> Message:
    """Do it in a thread. What fails there ends the save, and not the waiting ranks."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)
    except OSError as error:
        return {"fault": f"{type(error).__name__}: {error}"}
    except Exception as error:
        logger.exception("a save failed")
        return {"fault": f"{type(error).__name__}: {error}"}
