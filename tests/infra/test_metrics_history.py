"""The rows of a run for its charts: bounded, however long the run, and no spike is lost."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from goku_infra.pages import metrics_history
from goku_infra.pages.metrics_history import THINNED, WHOLE, MetricsHistory

SPIKE, FALL = 97.5, -3.25


def row(step: int, **changes: float | None) -> str:
    figures = {"step": step, "loss": 2.0 + step % 97 / 97, "gradient_norm": 1.0 + step % 31 / 31}
    figures |= {"tokens_per_s": 1e6, "samples_per_s": 60.0, "checkpoint_s": None}
    return json.dumps(figures | changes) + "\n"


def kept(history: MetricsHistory) -> int:
    return len(history._older) + len(history._newest)


def test_history_follows_a_file_that_grows_is_cut_and_is_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = MetricsHistory(path)
    assert history.rows() == []
    path.write_text('{"step": 0, "loss": 3}\n{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert [row["loss"] for row in history.rows()] == [3, 2]
    with path.open("a") as file:
        file.write('ss": 1}\nnot json\n[]\n')
    assert [row["step"] for row in history.rows()] == [0, 1, 2]
    shorter = tmp_path / "new"
    shorter.write_text('{"step": 0, "loss": 9}\n')
    shorter.replace(path)
    assert [row["loss"] for row in history.rows()] == [9]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_long_run_takes_bounded_memory_and_keeps_extremes_and_the_newest(tmp_path, at_once):
    steps = 60_000
    spikes = {steps // 3: SPIKE, steps // 2: FALL, 7: SPIKE - 1}
    path = tmp_path / "metrics.jsonl"
    history = MetricsHistory(path)
    with path.open("w") as file:
        for step in range(steps):
            file.write(row(step, loss=spikes[step]) if step in spikes else row(step))
            if not at_once and step % 2_000 == 0:
                file.flush()
                history.rows()
                assert kept(history) <= THINNED + 2 * WHOLE
    history.catch_up()
    assert kept(history) <= THINNED + 2 * WHOLE
    rows = history.rows(points=600)
    found = {row["step"]: row["loss"] for row in rows}
    assert len(rows) <= 600 and list(found) == sorted(found) and rows[-1]["step"] == steps - 1
    assert spikes.items() <= found.items()
    gaps = [later - earlier for earlier, later in zip(found, list(found)[1:], strict=False)]
    assert max(gaps) < steps / 40, "everywhere as densely"
    newest = history.rows(since=steps - WHOLE - 1, points=10 * WHOLE)
    assert [row["step"] for row in newest] == list(range(steps - WHOLE, steps))


def test_memory_does_not_grow_with_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.writelines(row(step) for step in range(24_000))
    history, most = MetricsHistory(path), []
    tracemalloc.start()
    while history._read_on():
        most.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(most[len(most) // 2 :]) <= 1.2 * max(most[: len(most) // 2])


@pytest.mark.parametrize("points", [1, 2, 4, 5, 9, 50, 599])
def test_never_more_points_than_asked_for_and_always_the_newest(tmp_path, points):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row(step, loss=None if step % 3 else 1.0) for step in range(1000)))
    rows = MetricsHistory(path).rows(points=points)
    assert 1 <= len(rows) <= points and rows[-1]["step"] == 999


@pytest.mark.parametrize("back_to", [0, 1, 10_500, 29_000, 29_999])
def test_a_restart_goes_back_to_its_checkpoint_without_reading_all_again(tmp_path, monkeypatch, back_to):
    lines = [row(step) for step in range(30_000)]
    path, shorter = tmp_path / "metrics.jsonl", tmp_path / "new"
    path.write_text("".join(lines))
    history = MetricsHistory(path)
    history.catch_up()
    before = {row["step"] for row in history.rows(points=100_000)}
    again = [row(step, loss=5.0) for step in range(back_to, back_to + 40)]
    shorter.write_text("".join(lines[:back_to] + again))
    shorter.replace(path)
    taken: list[bytes] = []
    take = MetricsHistory._take
    monkeypatch.setattr(MetricsHistory, "_take", lambda self, line: (taken.append(line), take(self, line))[1])
    history.catch_up()
    rows = {row["step"]: row["loss"] for row in history.rows(points=100_000)}
    assert {step for step in rows if step < back_to} >= {step for step in before if step < back_to}
    assert [rows.get(step) for step in range(back_to, back_to + 40)] == [5.0] * 40 and max(rows) == back_to + 39
    assert len(taken) < 40 + 2000, "only what comes after the last row that both have, and its neighbours left out"


def test_rows_come_in_order_whatever_is_asked_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_history, "CHUNK_BYTES", 5000)
    path = Path(tmp_path / "metrics.jsonl")
    path.write_text("".join(row(step) for step in range(20_000)))
    history, lengths = MetricsHistory(path), []
    rng = random.Random(0)
    while not lengths or lengths[-1] < 20_000:
        steps = [row["step"] for row in history.rows(points=rng.choice([1, 100, 10_000]))]
        assert steps == sorted(set(steps))
        lengths.append(steps[-1] + 1)
    assert lengths == sorted(lengths)
