"""The controller's ears and mouth: a connection for every agent, one answer for every operator, the keepers' doors."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

from goku_infra.control import policy
from goku_infra.control.run_state import RunState
from goku_infra.messages import LINE_LIMIT, encode, ensure_token, is_known, prove

BACKLOG = 4096
"""Agents that may connect at the same moment."""
KEEPER_TIMEOUT_S = 0.2
KEEPER_TRIES = 2


class Hearer(Protocol):
    """What is done about what comes in."""

    def joins(self, name: str, generation: int) -> None:
        """An agent says hello and brings along the ranks of a generation (0: none); its node is as it was before."""

    def joined(self, name: str, generation: int) -> None:
        """It is one of the fleet now."""

    def heard(self, name: str, message: dict[str, Any]) -> None: ...

    async def gone(self, name: str) -> None:
        """An agent's connection has closed."""

    async def asked(self, request: dict[str, Any]) -> dict[str, Any]:
        """An operator's command; the answer to it."""


class Connections:
    """Whoever knows the run's token is heard."""

    def __init__(self, state: RunState, over: int | None) -> None:
        """over: the exit code to tell every agent, of a run that is over already."""
        self.token = ensure_token(state.folder)
        self.heard_any_at = time.monotonic()
        self.hearer: Hearer
        self._state = state
        self._over = over
        self._writers: dict[str, asyncio.StreamWriter] = {}

    async def listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, self._state.host, 0, limit=LINE_LIMIT, backlog=BACKLOG)

    @property
    def names(self) -> list[str]:
        """Nodes whose agents are connected."""
        return list(self._writers)

    def send(self, name: str, message: dict[str, Any]) -> None:
        """To an agent, or to nobody if it is gone."""
        if name in self._writers:
            self._writers[name].write(encode(message))

    def send_all(self, message: dict[str, Any], names: Iterable[str] | None = None) -> None:
        line = encode(message)
        for name in self.names if names is None else names:
            if name in self._writers:
                self._writers[name].write(line)

    def abort(self, name: str) -> None:
        """Hear no more of an agent, even if it is held up only."""
        self._writers.pop(name).transport.abort()

    async def keeper_answers(self, name: str) -> bool:
        """Whether what started the agent still lives: it listens on the agent's node, whose kernel answers for it."""
        node = self._state.fleet.nodes[name]
        if not node.keeper_port:
            return False
        for _ in range(KEEPER_TRIES):
            try:
                door = asyncio.open_connection(node.address, node.keeper_port)
                _, writer = await asyncio.wait_for(door, KEEPER_TIMEOUT_S)
                writer.close()
                return True
            except TimeoutError:
                continue
            except OSError:
                return False
        return False

    async def say_farewell(self, exit_code: int, error: str) -> None:
        """Tell every agent to leave; the first of them says the error, if there is one."""
        names = sorted(self.names, key=lambda name: self._state.fleet.nodes[name].index)
        for place, name in enumerate(names):
            self.send(name, {"kind": "leave", "exit_code": exit_code, "error": "" if place else error})
        for writer in list(self._writers.values()):
            with suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 1.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            message = json.loads(await reader.readline() or b"{}")
            if not is_known(self.token, self._state.journal.epoch, message.get("key")):
                return
            writer.write(prove(self.token, message["nonce"]))
            if message["kind"] == "ops":
                await _say(writer, await self.hearer.asked(message))
            elif message["kind"] == "hello":
                await self._serve_agent(message, reader, writer)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # gone, or it talks nonsense
            pass
        except asyncio.CancelledError:  # the run is over
            pass
        finally:
            writer.close()

    async def _serve_agent(
        self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        settings = self._state.settings
        if hello["job_id"] != settings.job_id:
            error = f"{settings.run_dir} is being trained by job {settings.job_id}; give another run_dir"
            await _say(writer, {"kind": "leave", "exit_code": policy.EXIT_BAD_INPUT, "error": error})
            return
        self.heard_any_at = time.monotonic()
        if self._over is not None:
            await _say(writer, {"kind": "leave", "exit_code": self._over, "error": ""})
            return
        name = hello["node"]
        self._welcome(hello, writer)
        try:
            while line := await reader.readline():
                if self._writers.get(name) is not writer:
                    return
                self._hear(name, json.loads(line))
        except (OSError, ValueError):
            pass
        finally:
            if self._writers.get(name) is writer and self._state.exit_code is None:
                del self._writers[name]
                await self.hearer.gone(name)

    def _welcome(self, hello: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        name = hello["node"]
        self.hearer.joins(name, hello["generation"])
        node = self._state.fleet.welcome(name, hello, time.monotonic())
        self._writers[name] = writer
        self._state.journal.write(
            "node_joined", node=name, place=node.index, host=node.address, keeper_port=node.keeper_port,
            slots=node.slots, running=hello["generation"],
        )  # fmt: skip
        self.hearer.joined(name, hello["generation"])
        for ended in hello["ended"]:
            self._hear(name, ended)

    def _hear(self, name: str, message: dict[str, Any]) -> None:
        self.heard_any_at = time.monotonic()
        self._state.fleet.hear(name, message, self._state.journal.generation, self.heard_any_at)
        self.hearer.heard(name, message)


async def until(condition: Callable[[], Any], limit_s: float) -> None:
    """Wait for a state that messages bring about, at most so long."""
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


async def _say(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(encode(message))
    await writer.drain()
