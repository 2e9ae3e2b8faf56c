"""What a run reports, and what is left of it after a kill and a resume."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from goku_mega.train.metrics import MetricsLog

WRITER = """
import logging, sys
from pathlib import Path
from goku_mega.train.metrics import MetricsLog

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
logging.basicConfig(level=logging.INFO, format="%(message)s")
with MetricsLog(folder, is_main=True, start_step=0, total_steps=steps) as metrics:
    for step in range(steps):
        metrics.record({"step": step, "loss": 1 / (1 + step), "gradient_norm": 1.0, "tokens_per_s": 2.0,
                        "samples_per_s": 3.0, "mfu": None, "checkpoint_s": float(step == 99)})
"""


def row(step: int, **figures: Any) -> dict[str, Any]:
    figures = {"loss": 0.5, "gradient_norm": 1.0, "tokens_per_s": 9.0, "samples_per_s": 3.0, "mfu": None} | figures
    return {"step": step, "checkpoint_s": 0.0, **figures}


def write(folder: Path, steps: range, **figures: Any) -> None:
    with MetricsLog(folder, is_main=True, start_step=steps.start, total_steps=100) as metrics:
        for step in steps:
            metrics.record(row(step, **figures))


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def board(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_step_is_a_json_line_and_a_point_in_tensorboard(tmp_path: Path):
    write(tmp_path, range(0, 5), loss=0.25)
    assert lines(tmp_path) == [row(step, loss=0.25) for step in range(5)]
    assert board(tmp_path, "loss") == [(step, 0.25) for step in range(5)]


def test_a_resumed_run_replaces_the_rows_after_its_checkpoint(tmp_path: Path):
    write(tmp_path, range(0, 10), loss=1.0)
    write(tmp_path, range(6, 12), loss=2.0)
    expected = [(step, 1.0 if step < 6 else 2.0) for step in range(12)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected
    assert board(tmp_path, "loss") == expected


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 0.5', "\x00\x00\x00", "7", '{"loss": 1}'])
def test_a_line_that_is_not_whole_is_cut_off(tmp_path: Path, torn: str):
    write(tmp_path, range(0, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path, range(3, 5))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_run_from_the_start_keeps_nothing(tmp_path: Path):
    write(tmp_path, range(0, 3), loss=1.0)
    write(tmp_path, range(0, 2), loss=2.0)
    assert [line["loss"] for line in lines(tmp_path)] == [2.0, 2.0]


def test_a_killed_writer_leaves_whole_rows_and_the_checkpoints_steps_in_tensorboard(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), "1000000"], stderr=subprocess.PIPE)
    assert process.stderr is not None
    for message in process.stderr:
        if message.startswith(b"step 150/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()

    steps = [line["step"] for line in lines(tmp_path)]
    assert len(steps) >= 150 and steps == list(range(len(steps)))
    assert [step for step, _ in board(tmp_path, "loss")][:100] == list(range(100))


def test_what_is_not_finite_is_null(tmp_path: Path):
    write(tmp_path, range(0, 1), loss=float("nan"), gradient_norm=float("inf"))
    assert lines(tmp_path) == [row(0, loss=None, gradient_norm=None)]


def test_other_ranks_write_nothing(tmp_path: Path):
    with MetricsLog(tmp_path / "run", is_main=False, start_step=0, total_steps=3) as metrics:
        metrics.record(row(0))
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_a_log_line_every_50_steps_and_at_the_end(tmp_path: Path):
    words = [sys.executable, "-c", WRITER, str(tmp_path), "120"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    reported = [line.split()[1] for line in told.splitlines() if line.startswith("step")]
    assert reported == ["50/120", "100/120", "120/120"]


def test_on_a_terminal_a_bar_with_loss_and_speed(tmp_path: Path):
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    words = [sys.executable, "-c", WRITER, str(tmp_path), "10"]
    with subprocess.Popen(words, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        while block := _read(main):
            shown += block
        assert process.wait() == 0
    os.close(main)
    assert b"10/10" in shown and b"loss 0.1000" in shown and b"3.0 samples/s" in shown
    assert b"step 10/10" not in shown, "a log line would tear the bar"


def _read(terminal: int) -> bytes:
    """What the program has written; nothing once it has closed its side, which Linux tells by an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
