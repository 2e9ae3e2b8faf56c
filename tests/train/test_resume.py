"""A run that is killed goes on as if nothing had happened: same layout bitwise, another layout to rounding."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import run_command, start_command

from benchmarks.recovery import write_dataset
from launch import RankFailed

pytestmark = pytest.mark.slow

STEPS = 12
EVERY = 4
LIMIT_S = 240

# Its state has every part a checkpoint can have: a momentum for Muon's matrices, both moments of AdamW for the rest.
OPTIMIZER = ("optimizer.name=muon", "optimizer.learning_rate=3e-3", "optimizer.warmup_steps=2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    return folder


def words(dataset: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        "train", f"run_dir={run_dir}", f"data.path={dataset}", f"steps={STEPS}", f"checkpoint.every_steps={EVERY}",
        "data.samples_per_step=8", *OPTIMIZER, *overrides,
    ]  # fmt: skip


def finish(dataset: Path, run_dir: Path, ranks: int, *overrides: str) -> str:
    """Train to the end; what was printed."""
    return run_command(words(dataset, run_dir, *overrides), ranks, run_dir.with_suffix(".log"), timeout_s=LIMIT_S)


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return {row["step"]: row["loss"] for row in rows}


def kill_after_checkpoint(dataset: Path, run_dir: Path, *overrides: str) -> None:
    """SIGKILL one of two ranks once the first checkpoint is committed and a later step has begun."""
    from goku_infra.heartbeat import read_beats

    ranks = start_command(words(dataset, run_dir, *overrides), 2, run_dir.with_suffix(".log"), timeout_s=LIMIT_S)
    try:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            beats = read_beats(run_dir / "heartbeats") if (run_dir / "heartbeats").exists() else []
            if any(beat.step > EVERY for beat in beats) and (run_dir / "checkpoints" / f"step_{EVERY:08d}").exists():
                ranks.processes[1].kill()
                break
            time.sleep(0.02)
        with pytest.raises(RankFailed, match="rank 1 died with exit code -9"):
            ranks.results()
    finally:
        ranks.stop()


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory) -> dict[int, float]:
    run_dir = tmp_path_factory.mktemp("unbroken")
    finish(dataset, run_dir, 2)
    return losses(run_dir)


@pytest.fixture(scope="module")
def killed(dataset, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("killed")
    kill_after_checkpoint(dataset, run_dir, "layout.tp=1")
    return run_dir


def copy(run_dir: Path, target: Path) -> Path:
    subprocess.run(["cp", "-r", str(run_dir), str(target)], check=True)
    return target


def test_the_same_layout_goes_on_bitwise_under_torchrun(dataset, unbroken, killed, tmp_path):
    run_dir = copy(killed, tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["goku_mega.cli", *words(dataset, run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr
    assert losses(run_dir) == unbroken


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, ()), (2, ("layout.tp=2",)), (2, ("layout.cp=2",)), (2, ("layout.pp=2", "layout.pp_chunks=2"))],
)
def test_another_layout_goes_on_with_the_same_losses(dataset, unbroken, killed, tmp_path, ranks, layout):
    run_dir = copy(killed, tmp_path / "run")
    finish(dataset, run_dir, ranks, *layout)
    continued = losses(run_dir)
    assert continued.keys() == unbroken.keys()
    np.testing.assert_allclose(list(continued.values()), list(unbroken.values()), rtol=1e-5)


def test_pipeline_stages_save_what_one_process_goes_on_from(dataset, unbroken, tmp_path):
    run_dir = tmp_path / "run"
    kill_after_checkpoint(dataset, run_dir, "layout.pp=2")
    assert "resumed from" in finish(dataset, run_dir, 1)
    np.testing.assert_allclose(list(losses(run_dir).values()), list(unbroken.values()), rtol=1e-5)


def test_a_damaged_newest_checkpoint_is_passed_over(dataset, unbroken, killed, tmp_path):
    run_dir = copy(killed, tmp_path / "run")
    finish(dataset, run_dir, 1, "checkpoint.keep=9")
    newest = max((run_dir / "checkpoints").glob("step_*"))
    shard = next(newest.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    output = finish(dataset, run_dir, 1)
    assert "passed over the checkpoint of step 12" in output
    np.testing.assert_allclose(list(losses(run_dir).values()), list(unbroken.values()), rtol=1e-5)


def kept(run_dir: Path) -> dict[str, bytes]:
    """Every file of a run but the heartbeats: who comes next replaces the killed one's records, and removes its own."""
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(run_dir)): path.read_bytes() for path in files if path.parent != run_dir / "heartbeats"
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", "seed is 1 but"),
        ("optimizer.learning_rate=1e-4", "optimizer is"),
        ("layout.tp=3", "start a multiple of 3 processes"),
        ("data.path=nowhere", "nowhere/dataset.json is missing; make the data set with"),
        ("size=3b", "size '3b' is not one of"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(dataset, killed, tmp_path, override, expected):
    run_dir = copy(killed, tmp_path / "run")
    before = kept(run_dir)
    log = tmp_path / "log"
    assert start_command(words(dataset, run_dir, override), 1, log, timeout_s=LIMIT_S).results() == [2]
    lines = [line for line in log.read_text().splitlines() if line.startswith("goku-mega: error:")]
    assert len(lines) == 1 and expected in lines[0], log.read_text()
    assert "Traceback" not in log.read_text()
    assert kept(run_dir) == before
