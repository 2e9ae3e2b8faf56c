"""Real processes on loopback, one a node: the one with a planted fault is named, and nobody else."""

import json
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

import launch
from goku_infra.checks import collective_check
from goku_infra.checks.collective_check import Report, clock_offset, coordinate, member, odd_versions
from goku_infra.errors import OpsError

NODES = 4
BYTES = 1 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def take_part(rank: int, port: int, faults: dict[int, str]) -> Report | None:
    """Ranks 0 to 3 are nodes, the last one coordinates."""
    address = ("127.0.0.1", port)
    if rank == NODES:
        collective_check.SLOW_FLOOR_S = 0.1  # five processes on the cores of one machine hold each other up
        return coordinate(address, NODES, bytes_=BYTES, group_timeout_s=3.0, join_timeout_s=20.0)
    fault = faults.get(rank, "")
    if fault.startswith("clock="):
        real, offset_s, fault = time.time, float(fault.partition("=")[2]), ""
        collective_check.time.time = lambda: real() + offset_s
    try:
        return member(address, rank, inject=fault, timeout_s=30.0)
    except OpsError:
        return None


def check(faults: dict[int, str]) -> Report:
    *members, report = launch.run_ranks(take_part, NODES + 1, free_port(), faults)
    heard = [answer for answer in members if answer is not None]
    assert heard and all(answer == report for answer in heard)  # everybody gets the coordinator's report
    return report


@pytest.mark.slow
def test_healthy_nodes_are_all_passed():
    report = check({})
    assert report.healthy
    assert set(report.clock_offset_s) == set(range(NODES))
    assert all(abs(offset) < 0.5 for offset in report.clock_offset_s.values())
    assert report.bandwidth_gb_per_s > 0 and report.tests == 3  # all together, then two pairs


@pytest.mark.slow
def test_a_node_that_sends_wrong_numbers_is_named_exactly_even_the_first():
    report = check({0: "corrupt"})
    assert set(report.bad) == {0} and report.links == []
    assert "wrong" in report.bad[0]


@pytest.mark.slow
def test_a_slow_node_is_named_exactly():
    report = check({3: "slow=0.4"})
    assert set(report.bad) == {3} and "is slow" in report.bad[3]


@pytest.mark.slow
def test_two_nodes_that_fail_only_with_each_other_are_a_link():
    report = check({1: "corrupt-with=3"})
    assert report.bad == {} and [set(link) for link in report.links] == [{1, 3}]


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_and_one_whose_clock_is_off_are_named():
    report = check({1: "die", 2: "clock=60"})
    assert set(report.bad) == {1, 2}
    assert "no answer" in report.bad[1] and "+60.0 s" in report.bad[2]


@pytest.mark.slow
def test_the_command_names_the_bad_node_on_every_node():
    """As operators run it: a process a node, and one beside them."""
    store, infra = f"127.0.0.1:{free_port()}", Path(collective_check.__file__).parents[1]

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "goku_infra.checks.collective_check", "--store", store, "--world", "3", *words]
        return subprocess.Popen([*command, "--bytes", str(BYTES)], stdout=subprocess.PIPE, text=True, cwd=infra)

    processes = [start("--coordinate"), *(start("--rank", str(rank)) for rank in (0, 2))]
    processes.append(start("--rank", "1", "--inject", "corrupt"))
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    reports = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert all(set(report["bad"]) == {"1"} and not report["healthy"] for report in reports)
    assert [process.returncode for process in processes] == [1, 0, 0, 1]


def test_no_coordinator_is_one_line_and_exit_2(capsys):
    words = ["--store", f"127.0.0.1:{free_port()}", "--world", "2", "--rank", "0", "--timeout", "1"]
    assert collective_check.main(words) == 2
    assert "cannot reach the store" in capsys.readouterr().err


def test_a_member_waits_long_for_its_next_task_though_it_joins_fast(monkeypatch):
    """Others may be waited for meanwhile."""
    waits, tasks = [], iter([{"kind": "clock"}, {"kind": "end", "report": asdict(Report())}])

    def get(store, name, timeout_s):
        waits.append(timeout_s)
        return json.dumps(next(tasks))

    monkeypatch.setattr(collective_check, "_connect", lambda *address, **how: None)
    monkeypatch.setattr(collective_check, "_set", lambda *answer: None)
    monkeypatch.setattr(collective_check, "_get", get)
    assert member(("none", 1), 0, timeout_s=5.0).healthy
    assert waits == [collective_check.TASK_LIMIT_S] * 2
    assert collective_check.TASK_LIMIT_S >= 300


def test_a_node_that_falls_silent_in_the_first_round_of_speed_is_not_paired_again(monkeypatch):
    tasks = {}

    def answer(store, name, timeout_s):
        _, rank, number = name.split("/")
        asked = tasks[f"task/{rank}/{number}"]
        if rank == "3":
            return None
        return {"error": "lost 3" if 3 in asked["group"] else "", "seconds": 0.01}

    monkeypatch.setattr(collective_check, "_set", lambda store, name, task: tasks.update({name: task}))
    monkeypatch.setattr(collective_check, "_try_get", answer)
    coordinator = collective_check._Coordinator(None, 6, BYTES, 1.0, 1.0, 1.0)
    coordinator._check_speed()
    assert set(coordinator.report.bad) == {3}
    assert [task["group"] for name, task in tasks.items() if name.endswith("/1")] == [[2, 0], [2, 0]]


def test_versions_that_differ_name_the_node_and_what_differs():
    usual = {"torch": "2.13.0", "kernel": "6.1"}
    assert odd_versions({0: usual, 1: usual, 2: usual}) == {}
    odd = odd_versions({0: usual, 1: {**usual, "torch": "2.12.0"}, 2: usual, 3: {"torch": "2.13.0"}})
    assert odd == {1: "has torch 2.12.0, not 2.13.0", 3: "has kernel none, not 6.1"}


@pytest.mark.parametrize("true_offset", [-5.0, 0.0, 3600.0])
def test_a_clocks_offset_is_within_the_error_that_is_given(true_offset):
    """Delays there and back differ; the quickest exchange bounds the error."""
    delays = [(0.010, 0.002), (0.001, 0.0005), (0.2, 0.001)]
    exchanges = [(s := 100.0 + i, s + out + true_offset, s + out + back) for i, (out, back) in enumerate(delays)]
    offset, error = clock_offset(exchanges)
    assert abs(offset - true_offset) <= error == pytest.approx(0.00075)
