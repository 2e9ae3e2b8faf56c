"""The journal holds what happened through kills, torn lines and a second writer, in little room."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_infra.record import journal
from goku_infra.record.accounting import account
from goku_infra.record.incidents import incidents
from goku_infra.record.journal import FILE, Event, Journal, read_events


def report(number: int) -> dict:
    return {"step": number, "committed_step": 0, "loss": 1.0, "saving_s": 0.0}


def write_some(folder: Path, count: int = 3, epoch: int = 1) -> list[Event]:
    with Journal(folder, epoch) as opened:
        for number in range(count):
            opened.write("waiting", reason=f"number {number}")
        return list(opened.events)


def test_what_was_written_is_read_again(tmp_path):
    written = write_some(tmp_path)
    assert read_events(tmp_path / FILE) == written
    assert [event.seq for event in written] == [0, 1, 2]
    with Journal(tmp_path, 2) as again:
        assert again.events == written
        assert again.write("waiting", reason="").seq == 3


def test_there_may_be_no_journal_yet(tmp_path):
    assert read_events(tmp_path / FILE) == []


@pytest.mark.parametrize("left", [1, 20, 80])
def test_a_torn_last_line_is_cut_off(tmp_path, left):
    written = write_some(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:left])
    assert read_events(path) == written
    with Journal(tmp_path, 2) as opened:
        new = opened.write("waiting", reason="after")
    assert read_events(path) == [*written, new]
    assert path.read_bytes().startswith(whole)
    assert path.read_bytes().count(b"\n") == 4


def test_a_broken_line_in_the_middle_costs_only_itself(tmp_path):
    write_some(tmp_path)
    path = tmp_path / FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 30 + b"\n" + lines[2])
    with Journal(tmp_path, 2) as opened:
        new = opened.write("waiting", reason="after")
    assert [event.seq for event in read_events(path)] == [0, 2, new.seq]


def test_a_superseded_controller_neither_overwrites_nor_is_believed(tmp_path):
    with Journal(tmp_path, 1) as old:
        first = old.write("waiting", reason="of the first")
        with Journal(tmp_path, 2) as new:
            second = new.write("waiting", reason="of the second")
            old.write("waiting", reason="of a ghost, and longer than what the second one writes")
            third = new.write("waiting", reason="of the second again")
    assert read_events(tmp_path / FILE) == [first, second, third]


def test_an_event_is_on_disk_before_it_has_happened(tmp_path, monkeypatch):
    path = tmp_path / FILE
    with Journal(tmp_path, 1) as opened:
        seen = []

        def fdatasync(handle: int) -> None:
            seen.append((path.read_bytes().count(b"\n"), len(opened.events)))

        monkeypatch.setattr(os, "fdatasync", fdatasync)
        opened.write("incident_opened", incident=1, cause="killed")
        opened.write("progress", **report(1))
        opened.write("generation_started", incident=1)
    assert seen == [(1, 0), (3, 2)]  # written, not yet happened; the report waits for nobody


def test_an_event_that_cannot_be_written_has_not_happened(tmp_path, monkeypatch):
    with Journal(tmp_path, 1) as opened:
        first = opened.write("waiting", reason="")
        write = os.write
        monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[:9]))  # the disk is full
        with pytest.raises(OSError, match="no space"):
            opened.write("finished", status="done")
        monkeypatch.undo()
        assert opened.events == [first]
    with Journal(tmp_path, 2) as again:
        assert again.events == [first]
        second = again.write("waiting", reason="")
    assert read_events(tmp_path / FILE) == [first, second]


def test_a_full_disk_costs_a_report_and_neither_the_controller_nor_the_next_event(tmp_path, monkeypatch):
    with Journal(tmp_path, 1) as opened:
        first = opened.write("waiting", reason="")
        write = os.write
        monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[:9]))
        opened.write("progress", **report(1))
        with pytest.raises(OSError, match="no space"):
            opened.write("finished", status="done")
        monkeypatch.undo()
        last = opened.write("node_excluded", node="n1", reason="sick")
    assert read_events(tmp_path / FILE) == [first, last]


def test_reports_in_a_row_take_the_room_of_one_in_memory_and_all_of_it_on_disk(tmp_path):
    with Journal(tmp_path, 1) as opened:
        for number in range(50):
            opened.write("progress", **report(number))
        opened.write("waiting", reason="")
        opened.write("progress", **report(50))
        opened.generation += 1
        opened.write("progress", **report(51))
        events = opened.events
    assert [event.data.get("step") for event in events] == [49, None, 50, 51]
    assert [event.seq for event in events] == [49, 50, 51, 52]
    assert (tmp_path / FILE).read_bytes().count(b"\n") == 53
    assert read_events(tmp_path / FILE) == events


KIND = st.sampled_from(["progress", "progress", "progress", "waiting", "first_step", "incident_opened", "next"])


@given(kinds=st.lists(KIND, max_size=40), kills=st.sets(st.integers(0, 40)))
@settings(max_examples=60, deadline=None)
def test_a_replay_equals_memory(tmp_path_factory, kinds, kills):
    folder = tmp_path_factory.mktemp("journal")
    epoch = 1
    opened = Journal(folder, epoch)
    for number, kind in enumerate(kinds):
        if number in kills:
            opened.__exit__(None, None, None)
            before, epoch = opened.events, epoch + 1
            opened = Journal(folder, epoch)
            assert opened.events == before
        if kind == "next":
            opened.generation += 1
            opened.write("generation_started", incident=None, nodes=["n0"], skip_steps=[])
        elif kind == "incident_opened":
            opened.write(kind, incident=number, cause="killed", ranks=[1], node="n0", step=number, fault_s=0.0)
        else:
            opened.write(kind, **report(number))
    with opened:
        assert read_events(folder / FILE) == opened.events


def test_accounts_and_incidents_do_not_need_every_report(tmp_path):
    events = [
        Event(0, "run_started", 0.0, 1, 0),
        Event(1, "generation_started", 1.0, 1, 1, {"incident": None}),
        Event(2, "first_step", 2.0, 1, 1, {"step": 1, "resumed_from": 0}),
        *(
            Event(3 + n, "progress", 12.0 + 10 * n, 1, 1, {"step": 2 + n, "saving_s": n // 6 * 0.5})
            for n in range(1000)
        ),
    ]
    end = Event(2000, "incident_opened", 10_010.0, 1, 1, {"incident": 1, "cause": "killed", "fault_s": 10_005.0})
    text = "".join(json.dumps(vars(event), separators=(",", ":")) + "\n" for event in [*events, end])
    (tmp_path / FILE).write_text(text)
    few = read_events(tmp_path / FILE)
    assert len(few) == 5
    assert account(few, 10_020.0) == pytest.approx(account([*events, end], 10_020.0))
    assert incidents(few) == incidents([*events, end])


def test_a_killed_writer_leaves_every_event_that_it_had_told_of(tmp_path):
    program = (
        "import sys, pathlib; from goku_infra.record.journal import Journal\n"
        "with Journal(pathlib.Path(sys.argv[1]), 1) as journal:\n"
        "    while True: print(journal.write('waiting', reason='x' * 3000).seq, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 20:
        pass
    writer.send_signal(signal.SIGKILL)
    told = [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    events = read_events(tmp_path / FILE)
    assert [event.seq for event in events] == list(range(len(events)))
    assert len(events) > max(told, default=20)


def test_months_are_read_in_moments(tmp_path):
    line = '{"seq":%d,"kind":"progress","time_s":%d.5,"epoch":1,"generation":1,"data":{"step":%d,"saving_s":0.5}}\n'
    with (tmp_path / FILE).open("w") as file:
        file.writelines(line % (number, 10 * number, number) for number in range(200_000))
    began = time.thread_time()
    events = journal.read_events(tmp_path / FILE)
    assert time.thread_time() - began < 2.0  # measured: 0.12 s
    assert [event.seq for event in events] == [199_999]
