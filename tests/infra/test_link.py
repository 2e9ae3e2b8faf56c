"""When an agent raises a controller: soon where there is none any more, never where one lives."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from goku_infra.messages import CONTROLLER_FILE, encode, prove, replace_file, sign, supervisor_folder
from goku_infra.node import link as link_module
from goku_infra.node.link import (
    FIRST_STAGGER_S,
    MUTE_S,
    PROBE_AFTER_S,
    RAISE_STAGGER_S,
    REFUSED_STILL_S,
    RETRY_S,
    SILENCE_LIMIT_S,
    STARTING_S,
    STILL_S,
    Link,
    Member,
)

STEP_S = RETRY_S + 0.001
SIGN_S = 0.2


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.01))


class Raised:
    """In the place of a controller on standby."""

    def __init__(self, *_: object) -> None:
        self.epochs: list[int] = []

    def prepare(self) -> None:
        pass

    def become_controller(self, epoch: int) -> None:
        self.epochs.append(epoch)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(link_module, "time", clock)
    monkeypatch.setattr(link_module, "Standby", Raised)
    return clock


@pytest.fixture
def silent_controller() -> Iterator[socket.socket]:
    """Its kernel takes connections; it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def link_of(run_dir: Path, place: int) -> Link:
    return Link(Member(run_dir, "local-1", f"n{place}", place, "127.0.0.1", 1))


def controller_was_here(run_dir: Path, port: int, epoch: int = 1) -> None:
    folder = supervisor_folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"epoch_{epoch:05d}").touch()
    replace_file(folder / CONTROLLER_FILE, json.dumps({"host": "127.0.0.1", "port": port, "epoch": epoch}))


def unreachable(monkeypatch, error: type[OSError]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(link_module.socket, "create_connection", fail)


def raised_after_s(link: Link, clock: Clock, limit_s: float, *, signs: bool = False) -> float | None:
    """Seconds until this link raises a controller; None: not within the limit."""
    began, signed = clock.now, 0.0
    while clock.now - began < limit_s:
        if signs and clock.now - signed >= SIGN_S:
            signed = clock.now
            sign(link.folder)
        if not link.connected:
            link.connect({})
        link.receive()
        if link._standby.epochs:
            return clock.now - began
        clock.now += STEP_S
    return None


@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_first_controller_is_raised_by_the_first_node_that_is_there(clock, tmp_path, place):
    link = link_of(tmp_path, place)
    after_s = raised_after_s(link, clock, 10)
    assert after_s == pytest.approx(place * FIRST_STAGGER_S, abs=2 * STEP_S)
    assert link._standby.epochs == [1] and (link.folder / "epoch_00001").exists()


def test_of_many_that_try_one_raises(clock, tmp_path):
    links = [link_of(tmp_path, 0) for _ in range(4)]
    for link in links:
        link.connect({})
    assert sum(len(link._standby.epochs) for link in links) == 1


@pytest.mark.parametrize(
    ("error", "still_s"), [(TimeoutError, STILL_S), (ConnectionRefusedError, REFUSED_STILL_S)], ids=["gone", "refused"]
)
@pytest.mark.parametrize("place", [0, 2])
def test_a_controller_that_neither_answers_nor_signs_is_replaced(clock, monkeypatch, tmp_path, error, still_s, place):
    controller_was_here(tmp_path, 1)
    link = link_of(tmp_path, place)
    link._first = False  # it has been connected
    unreachable(monkeypatch, error)
    after_s = raised_after_s(link, clock, 10)
    assert after_s == pytest.approx(still_s + place * RAISE_STAGGER_S, abs=2 * STEP_S)
    assert link._standby.epochs == [2]


@pytest.mark.parametrize("error", [TimeoutError, ConnectionRefusedError])
def test_one_that_signs_lives_behind_a_broken_link_and_is_not_replaced(clock, monkeypatch, tmp_path, error):
    controller_was_here(tmp_path, 1)
    link = link_of(tmp_path, 0)
    unreachable(monkeypatch, error)
    assert raised_after_s(link, clock, 60, signs=True) is None


def test_one_that_was_raised_has_time_to_start(clock, monkeypatch, tmp_path):
    controller_was_here(tmp_path, 1)
    (supervisor_folder(tmp_path) / "epoch_00002").touch()
    link = link_of(tmp_path, 0)
    unreachable(monkeypatch, ConnectionRefusedError)
    after_s = raised_after_s(link, clock, 60)
    assert after_s == pytest.approx(STARTING_S, abs=2 * STEP_S)
    assert link._standby.epochs == [3]


def test_a_slow_controller_on_a_machine_that_answers_has_longer(clock, silent_controller, tmp_path):
    controller_was_here(tmp_path, silent_controller.getsockname()[1])
    link = link_of(tmp_path, 0)
    assert link.connect({})
    began = clock.now
    while link.connected:
        clock.now += STEP_S
        link.receive()
    assert clock.now - began == pytest.approx(SILENCE_LIMIT_S, abs=2 * STEP_S)
    assert raised_after_s(link, clock, 60) is not None
    assert clock.now - began >= MUTE_S + SILENCE_LIMIT_S


def test_orders_of_somebody_who_has_taken_a_controllers_port_are_not_obeyed(clock, silent_controller, tmp_path):
    controller_was_here(tmp_path, silent_controller.getsockname()[1])
    link = link_of(tmp_path, 0)
    assert link.connect({})
    connection, _ = silent_controller.accept()
    said = connection.makefile("rb").readline()
    for proof in (b"", prove("a guess", json.loads(said)["nonce"])):
        connection.sendall(proof + encode({"kind": "start", "command": ["rm"]}))
        heard: list[object] = []
        while link.connected:
            heard += link.receive()
        assert not heard and link._token.encode() not in said
        clock.now += STEP_S
        assert link.connect({})  # perhaps it is the controller now
        connection, _ = silent_controller.accept()
        said = connection.makefile("rb").readline()
    assert raised_after_s(link, clock, 60) is not None


def test_a_controller_that_knows_the_token_is_heard(clock, silent_controller, tmp_path):
    controller_was_here(tmp_path, silent_controller.getsockname()[1])
    link = link_of(tmp_path, 0)
    assert link.connect({})
    connection, _ = silent_controller.accept()
    proof = prove(link._token, json.loads(connection.makefile("rb").readline())["nonce"])
    heard: list[object] = []
    for part in (proof[:20], proof[20:], encode({"kind": "stop"})[:3], encode({"kind": "stop"})[3:]):
        connection.sendall(part)
        time.sleep(0.02)
        heard += link.receive()
    assert heard == [{"kind": "stop"}] and link.connected


def test_a_machine_that_is_gone_is_missed_sooner(clock, silent_controller, monkeypatch, tmp_path):
    controller_was_here(tmp_path, silent_controller.getsockname()[1])
    link = link_of(tmp_path, 0)
    assert link.connect({})
    unreachable(monkeypatch, TimeoutError)
    began = clock.now
    while link.connected:
        clock.now += STEP_S
        link.receive()
    assert clock.now - began == pytest.approx(PROBE_AFTER_S, abs=2 * STEP_S)
    after_s = raised_after_s(link, clock, 60)
    assert after_s is not None and clock.now - began <= PROBE_AFTER_S + STILL_S + 3 * STEP_S


def test_a_node_that_slurm_does_not_answer_either_raises_nothing(clock, monkeypatch, tmp_path):
    link = Link(Member(tmp_path, "17", "n0", 0, "127.0.0.1", 1))
    monkeypatch.setattr(link_module.slurm, "answers", lambda: False)
    assert raised_after_s(link, clock, 30) is None


def test_a_folder_that_takes_nothing_is_tried_again(clock, tmp_path):
    link = link_of(tmp_path, 0)
    folder, link.folder = link.folder, tmp_path / "gone"
    assert raised_after_s(link, clock, 1) is None
    link.folder = folder
    assert raised_after_s(link, clock, 1) is not None


def test_a_controller_that_cannot_be_started_ends_no_agent(clock, monkeypatch, tmp_path):
    def fail(epoch: int) -> None:
        raise OSError("no process more")

    link = link_of(tmp_path, 0)
    monkeypatch.setattr(link._standby, "become_controller", fail)
    assert raised_after_s(link, clock, 1) is None and link._newest_epoch() == 1


def test_epochs_are_those_seen_last_while_the_folder_is_stale(clock, monkeypatch, tmp_path):
    def stale(*_: object) -> None:
        raise OSError("stale file handle")

    link = link_of(tmp_path, 0)
    link._epoch = 3
    monkeypatch.setattr(Path, "glob", stale)
    assert link._newest_epoch() == 3


def test_a_late_word_of_an_old_connection_does_not_close_the_new_one(clock, tmp_path):
    link = link_of(tmp_path, 0)
    old, new = socket.socket(), socket.socket()
    link.socket = new
    link._lose(old)
    assert link.connected and new.fileno() >= 0 and old.fileno() < 0
    link._lose(new)
    assert not link.connected
