"""The controller with simulated agents: who is heard, what its snapshot holds, and what it makes of faults."""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.controller_scale import Agent, Run, write_months
from goku_infra.control import connections
from goku_infra.control.controller import Controller
from goku_infra.messages import credentials, encode, ensure_token, prove, read_address, supervisor_folder
from goku_infra.record.history import History
from goku_infra.record.journal import FILE, Event, Journal, read_events
from goku_infra.settings import Settings, write_settings

AGENTS, RANKS_PER_NODE = 24, 8


class Fleet:
    """A controller in this process and the agents that it has."""

    def __init__(self, run_dir: Path, controller: Controller) -> None:
        self.run_dir = run_dir
        self.controller = controller
        self.run = Run(AGENTS)
        self.agents = [Agent(self.run, index) for index in range(AGENTS)]

    @property
    def events(self) -> list[Event]:
        return read_events(supervisor_folder(self.run_dir) / FILE)

    @property
    def address(self) -> dict[str, Any]:
        return read_address(supervisor_folder(self.run_dir)) or {}

    async def until(self, kind: str, generation: int = 0) -> Event:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for event in self.controller.state.journal.events:
                if event.kind == kind and event.generation >= generation:
                    return event
            await asyncio.sleep(0.01)
        raise TimeoutError(kind)

    async def say(self, *lines: bytes) -> bytes:
        """What is answered to somebody who comes with these lines."""
        reader, writer = await asyncio.open_connection(self.address["host"], self.address["port"])
        for line in lines:
            writer.write(line)
        writer.write_eof()
        try:
            return await asyncio.wait_for(reader.read(), 30)
        except ConnectionResetError:
            return b""
        finally:
            writer.close()


@asynccontextmanager
async def fleet(run_dir: Path, **settings) -> AsyncIterator[Fleet]:
    made = Settings(
        run_dir=str(run_dir), command=("train",), job_id="bench", nodes=AGENTS, min_nodes=1,
        ranks_per_node=RANKS_PER_NODE, node_silence_s=30.0, **settings,
    )  # fmt: skip
    write_settings(made)
    folder = supervisor_folder(run_dir)
    with Journal(folder, 1) as journal:
        controller = Controller(made, folder, journal, "127.0.0.1")
        serving = asyncio.create_task(controller.serve())
        while read_address(folder) is None:
            await asyncio.sleep(0.01)
        them = Fleet(run_dir, controller)
        agents = [asyncio.create_task(agent.serve(them.address, ensure_token(folder))) for agent in them.agents]
        try:
            await them.until("generation_started")
            yield them
        finally:
            controller.state.finish("stopped", "the test is over", 0)
            await asyncio.wait_for(serving, 30)
            await asyncio.gather(*agents)


@pytest.mark.slow
def test_a_run_of_many_ranks_is_started_seen_whole_and_got_over_an_end(tmp_path):
    async def scenario() -> None:
        async with fleet(tmp_path) as them:
            await them.until("first_step")
            state = ask_of(await them.say(request("state", ensure_token(supervisor_folder(tmp_path)))))["state"]
            assert [rank["rank"] for rank in state["ranks"]] == list(range(AGENTS * RANKS_PER_NODE))
            assert {rank["phase"] for rank in state["ranks"]} <= {"data", "forward", "backward", "optimizer"}
            assert len(state["nodes"]) == AGENTS
            assert set(state) == set(json.loads((supervisor_folder(tmp_path) / "state.json").read_text()))
            them.agents[1].end(9, -9, ["killed"])
            fault_s = time.time()
            opened = await them.until("incident_opened")
            assert opened.time_s - fault_s < 5.0  # 0.05 s where nothing else runs
            assert (opened.data["cause"], opened.data["ranks"]) == ("killed", [9])
            await them.until("first_step", generation=2)

    asyncio.run(scenario())


@pytest.mark.slow
def test_the_end_of_all_ranks_at_once_is_one_incident(tmp_path):
    async def scenario() -> None:
        async with fleet(tmp_path) as them:
            await them.until("first_step")
            for agent in them.agents:
                for rank in agent.ranks:
                    lost = rank != 5
                    words = "RuntimeError: Connection closed by peer" if lost else "ValueError: the culprit"
                    agent.end(rank, 1, ["Traceback (most recent call last):", words])
            await them.until("first_step", generation=2)
            opened = [event for event in them.events if event.kind == "incident_opened"]
            assert [(event.data["cause"], event.data["ranks"]) for event in opened] == [("exception", [5])]

    asyncio.run(scenario())


def request(command: str, token: str, epoch: int = 1) -> bytes:
    return encode({"kind": "ops", **credentials(token, epoch), "command": command})


def ask_of(answered: bytes) -> dict[str, Any]:
    """The answer after the controller's proof."""
    proof, answer = answered.splitlines()
    assert json.loads(proof).keys() == {"proof"}
    return json.loads(answer)


def test_strangers_get_no_answer_and_do_no_harm(tmp_path):
    async def scenario() -> None:
        async with fleet(tmp_path) as them:
            token = ensure_token(supervisor_folder(tmp_path))
            for line in (
                request("stop", "wrong"), request("stop", token[:-1]), request("stop", ""), b"", b"\n", b"no json\n",
                b"[]\n", b"null\n", b"3\n", b'{"key": 7}\n', request("stop", token)[:-9], b"\xff\xfe\n",
                request("stop", token, epoch=0), request("stop", token, epoch=2),  # of other controllers
                encode({"kind": "ops", "key": token, "nonce": "", "command": "stop"}),
                encode({"kind": "ops", "key": credentials(token, 1)["key"], "command": "stop"}),
            ):  # fmt: skip
                assert await them.say(line) == b"", line
            known = credentials(token, 1)
            for message in ({}, {"kind": "x"}, {"kind": "hello"}, {"kind": "ops"}):
                assert await them.say(encode(known | message)) == prove(token, known["nonce"]), message
            assert ask_of(await them.say(request("dance", token)))["ok"] is False
            await them.until("first_step")
            assert not any(event.kind in ("finished", "stop_requested") for event in them.events)

    asyncio.run(scenario())


def test_a_line_past_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "LINE_LIMIT", 100_000)

    async def scenario() -> None:
        async with fleet(tmp_path) as them:
            token = ensure_token(supervisor_folder(tmp_path))
            assert await them.say(request("x" * 300_000, token)) == b""
            assert ask_of(await them.say(request("state", token)))["ok"]

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_controller_that_stood_still_does_not_blame_the_nodes(tmp_path):
    async def scenario() -> None:
        async with fleet(tmp_path) as them:
            await them.until("first_step")
            them.controller.state.settings = Settings(**{**vars(them.controller.state.settings), "node_silence_s": 1.5})
            time.sleep(4.0)  # the agents of this test stand still, too: nothing waits to be read
            await asyncio.sleep(0.2)
            assert not any(event.kind == "node_left" for event in them.events)
            them.agents[3].silent = True
            left = await them.until("node_left")
            assert left.data["node"] == "n0003"

    asyncio.run(scenario())


def test_months_of_history_are_followed_once(tmp_path):
    write_months(tmp_path / FILE, nodes=2, days=6)
    events = read_events(tmp_path / FILE)
    history = History()
    history.follow(events[:100])
    history.follow(events)
    again = History()
    again.follow(events)
    until_s = events[-1].time_s
    assert history.ledger.totals(until_s) == again.ledger.totals(until_s)
    assert history.incidents.all() == again.incidents.all()
    assert sum(again.ledger.totals(until_s).values()) == pytest.approx(until_s - events[0].time_s)
    assert len(history.alerts) == 20
    looks_s = []
    for _ in range(100):
        began = time.thread_time()
        history.follow(events)
        history.ledger.totals(until_s)
        history.incidents.newest(20)
        looks_s.append(time.thread_time() - began)
    assert statistics.median(looks_s) < 0.005  # measured: 0.0001 s; a search for garbage may fall into one of them
