"""A rank gives its flight record when asked, and one that cannot costs next to no time."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from goku_infra.diagnosis import flight_record

OFFER = """
import ctypes, json, sys, time
from pathlib import Path
from goku_infra.diagnosis import flight_record

def entry(number):
    return {"record_id": number, "process_group": ["0", "all"] if number % 2 else ["1", "pair"]}

flight_record.offer(Path(sys.argv[1]), lambda: json.dumps({"entries": [entry(n) for n in range(100)]}).encode())
print("ready", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    processes = []

    def run(code: str) -> int:
        words = [sys.executable, "-c", code, str(tmp_path / "rank_00000.stacks")]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == b"ready\n"
        return processes[-1].pid

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_the_newest_entries_of_every_group_are_given_as_often_as_asked(start) -> None:
    pid = start(f"{OFFER}time.sleep(600)")
    for _ in range(3):
        entries = json.loads(flight_record.ask(pid, time.monotonic() + 5))["entries"]
        assert sorted(entry["record_id"] for entry in entries) == [94, 95, 96, 97, 98, 99]


@pytest.mark.parametrize("code", [f"{OFFER}ctypes.PyDLL(None).sleep(600)", "print('ready', flush=True); input()"])
def test_no_answer_is_waited_for_for_long(start, code) -> None:
    pid = start(code)
    time.sleep(0.2)
    started = time.monotonic()
    assert flight_record.ask(pid, started + 100) == ""
    assert time.monotonic() - started < 50


def test_the_entries_of_several_recorders_are_given_together_and_one_that_fails_costs_only_its_own(start) -> None:
    more = (
        "def record(backend): return json.dumps({'entries': [{'record_id': n, 'profiling_name': backend + ':sum',"
        " 'process_group': ['0', 'all']} for n in range(9)]}).encode()\n"
        "def fails(): raise RuntimeError\n"
        "flight_record.offer(Path(sys.argv[1]), fails, lambda: record('gloo'), lambda: b'{}', lambda: record('nccl'))\n"
    )
    code = OFFER.partition("flight_record.offer")[0] + more + "print('ready', flush=True)\ntime.sleep(600)"
    entries = json.loads(flight_record.ask(start(code), time.monotonic() + 5))["entries"]
    found = [(entry["profiling_name"], entry["record_id"]) for entry in entries]
    assert found == [(f"{backend}:sum", n) for backend in ("gloo", "nccl") for n in (6, 7, 8)]


def test_a_torch_without_nccl_has_one_recorder() -> None:
    gloo, nccl = flight_record.RECORDERS
    assert flight_record.recorders(SimpleNamespace(**{gloo: 1})) == [1]
    assert flight_record.recorders(SimpleNamespace(**{gloo: 1, nccl: 2})) == [1, 2]


def test_a_new_start_offers_at_the_same_place(start) -> None:
    for _ in range(2):
        assert flight_record.ask(start(f"{OFFER}time.sleep(600)"), time.monotonic() + 5)
