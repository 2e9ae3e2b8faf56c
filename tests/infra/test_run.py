"""`goku-ops run` and `agent` before and beside the agent: addresses, what is shown, and that a node answers."""

import signal
import socket
import subprocess
import sys

import pytest
from supervised import environment

from goku_infra import slurm
from goku_infra.errors import OpsError
from goku_infra.node import run
from goku_infra.node.keeper import Keeper


@pytest.fixture
def step(monkeypatch):
    """A step of SLURM on these nodes, of which n1 is this one; its name stands for an address."""

    def of(nodes: tuple[str, ...], address: str) -> None:
        monkeypatch.setenv("SLURMD_NODENAME", "n1")
        monkeypatch.setattr(slurm, "expand_nodes", lambda _: nodes)
        monkeypatch.setattr(socket, "gethostbyname", {"n1": address}.__getitem__)

    return of


@pytest.mark.parametrize(
    ("nodes", "address", "found"),
    [
        (("n1",), "127.0.1.1", "127.0.1.1"),  # alone
        ((), "127.0.0.12", "127.0.0.12"),  # without SLURM
        (("n0", "n1"), "10.1.2.3", "10.1.2.3"),
        (("n1", "n2"), "127.0.1.1", "10.1.2.4"),
    ],
)
def test_a_loopback_address_is_replaced_where_others_must_reach_this_node(step, monkeypatch, nodes, address, found):
    asked = []
    monkeypatch.setattr(run, "own_address", lambda peer: asked.append(peer[0]) or "10.1.2.4")
    step(nodes, address)
    assert run._address_of("n1") == found
    assert asked == (["n2"] if found == "10.1.2.4" else [])


def test_an_address_that_cannot_be_told_is_one_line(step):
    step(("n1", "no-such-node.invalid"), "127.0.1.1")
    with pytest.raises(OpsError, match="no address of n1 as no-such-node.invalid reaches it"):
        run._address_of("n1")


def test_an_unfit_node_that_found_no_controller_to_tell_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "REPORT_LIMIT_S", 0.01)
    assert not run._report_unfit(tmp_path, "n1", "too hot")
    monkeypatch.setattr(run, "ask", lambda *_, **__: {})
    assert run._report_unfit(tmp_path, "n1", "too hot")


def test_the_newest_generation_is_found_by_number(tmp_path):
    assert run._newest_generation(tmp_path) == 0
    for name in ("g9999", "g10000", "gone", "agent_n1.log"):
        (tmp_path / name).mkdir()
    assert run._newest_generation(tmp_path) == 10_000


@pytest.mark.parametrize(("parent", "code"), [(1, 0), (12345, -signal.SIGKILL)])
def test_only_another_parent_than_the_expected_one_is_a_sign_of_its_end(parent, code):
    """The first process of a container is a parent like any other."""
    program = (
        "import os; from goku_infra.node.worker import die_with_the_parent\n"
        f"os.getppid = lambda: 1; die_with_the_parent({parent})"
    )
    assert subprocess.run([sys.executable, "-c", program], env=environment()).returncode == code


class Door:
    """A listening socket for which there is no file at first; closed after it was opened once."""

    def __init__(self) -> None:
        self.tries = 0

    def fileno(self) -> int:
        return 3 if self.tries < 2 else -1

    def accept(self) -> tuple[socket.socket, str]:
        self.tries += 1
        if self.tries == 1:
            raise OSError("too many open files")
        return socket.socket(), ""


def test_a_keeper_answers_again_after_an_error():
    keeper = Keeper.__new__(Keeper)
    keeper._answering = door = Door()
    keeper._answer()
    assert door.tries == 2
