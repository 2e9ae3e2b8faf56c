"""Every row of a run's metrics is seen once, whatever restarts do to the file."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_infra.control import metrics_tail
from goku_infra.control.metrics_tail import MetricsTail


def row(step: int, attempt: int = 0, **more) -> dict:
    return {"step": step, "loss": 1.0 + attempt, "seconds": random.random(), **more}


def text(*rows: dict) -> str:
    return "".join(json.dumps(each) + "\n" for each in rows)


def cut_from(path: Path, step: int) -> None:
    """As a restarted run does it: a new file in the place of the old one."""
    kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] < step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def test_rows_come_as_they_are_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.past == tail.read() == []
    rows = [row(step) for step in range(4)]
    path.write_text(text(*rows[:2]))
    assert tail.read() == rows[:2]
    assert tail.read() == []
    with path.open("a") as file:
        file.write(text(*rows[2:]))
    assert tail.read() == rows[2:]
    assert tail.last == rows[3]


@pytest.mark.parametrize("torn_at", [1, 10, 30])
def test_a_torn_line_is_waited_for(tmp_path, torn_at):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    first, second = row(0), row(1)
    path.write_text(text(first) + text(second)[:torn_at])
    assert tail.read() == [first]
    path.write_text(text(first, second))
    assert tail.read() == [second]


@pytest.mark.parametrize("garbage", ["\0\0\0\n", "[]\n", "{}\n", '{"step": null}\n', "3\n", "\n"])
def test_a_line_that_is_no_row_is_passed_over(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    rows = [row(0), row(1), row(2)]
    path.write_text(text(rows[0]) + garbage + text(rows[1]))
    assert tail.read() == rows[:2]
    with path.open("a") as file:
        file.write(garbage + text(rows[2]))
    assert tail.read() == rows[2:]


def test_steps_done_again_before_anyone_looks_are_all_seen(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    path.write_text(text(*(row(step) for step in range(100))))
    assert len(tail.read()) == 100
    cut_from(path, 80)
    again = [row(step, attempt=1) for step in range(80, 83)]
    with path.open("a") as file:
        file.write(text(*again))
    assert tail.read() == again
    cut_from(path, 80)
    assert tail.read() == []
    with path.open("a") as file:
        file.write(text(*again))
    assert tail.read() == again  # the same figures, but done once more


def test_seconds_of_saves_are_summed_from_the_start_of_a_generation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text(row(0, checkpoint_s=3.0)))
    tail = MetricsTail(path)
    assert tail.past[0]["checkpoint_s"] == 3.0
    assert tail.saving_s == 0.0  # of before: another controller has counted it
    tail.restart(5.0)
    with path.open("a") as file:
        file.write(text(row(1, checkpoint_s=0.5), row(2, checkpoint_s=None), row(3)))
    tail.read()
    assert tail.saving_s == 5.5
    tail.restart()
    assert tail.saving_s == 0.0


def test_of_a_long_file_only_the_end_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_tail, "LOOK_BACK_BYTES", 1000)
    path = tmp_path / "metrics.jsonl"
    rows = [row(step) for step in range(500)]
    path.write_text(text(*rows))
    tail = MetricsTail(path)
    assert tail.past == rows[-len(tail.past) :]
    assert 5 < len(tail.past) < 20
    cut_from(path, 495)
    again = [row(step, attempt=1) for step in range(495, 498)]
    with path.open("a") as file:
        file.write(text(*again))
    assert tail.read() == again


def test_what_is_remembered_of_rows_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_tail, "REMEMBERED", 50)
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    for start in range(0, 400, 40):
        with path.open("a") as file:
            file.write(text(*(row(step) for step in range(start, start + 40))))
        assert len(tail.read()) == 40
    assert len(tail._seen) == 50


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(1, 5)),
        st.tuples(st.just("tear"), st.integers(1, 40)),
        st.tuples(st.just("restart"), st.integers(0, 12)),
        st.tuples(st.just("look"), st.just(0)),
    ),
    max_size=40,
)


@given(actions=ACTIONS)
@settings(max_examples=150, deadline=None)
def test_no_row_is_seen_twice_or_missed(tmp_path_factory, actions):
    """Rows that stand in the file when someone looks: those cut off before anyone has looked cannot be seen."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    tail = MetricsTail(path)
    step, serial, torn = 0, 0, ""
    seen: list[int] = []
    for action, amount in [*actions, ("look", 0)]:
        if action == "train":
            with path.open("a") as file:
                file.write(torn and "\n")  # the next writer cuts it off; here it ends as a broken line
                torn = ""
                for _ in range(amount):
                    file.write(json.dumps({"step": step, "serial": serial, "loss": 1.0}) + "\n")
                    step, serial = step + 1, serial + 1
        elif action == "tear":
            torn = '{"step": 3, "serial": 77, "loss": 1.0, "x": "'[:amount]
            with path.open("a") as file:
                file.write(torn)
        elif action == "restart" and path.exists():
            step = max(0, step - amount)
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("0}")]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(each) + "\n" for each in rows if each["step"] < step))
            temporary.replace(path)
            torn = ""
        else:
            found = [each["serial"] for each in tail.read()]
            standing = [json.loads(line) for line in (path.read_text() if path.exists() else "").splitlines()
                        if line.endswith("0}")]  # fmt: skip
            assert found == [each["serial"] for each in standing if each["serial"] not in set(seen)]
            seen += found
    assert len(seen) == len(set(seen))
