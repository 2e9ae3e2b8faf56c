"""What a disk can do to a checkpoint ends in one clear line, and in no loss: here it does it."""

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_cases import differences, find_latest, names_in, state
from strace import traced, unavailable

from goku_mega.checkpoint.load import load_info, load_into
from goku_mega.checkpoint.save import ALERT_AFTER, Saver, save_checkpoint
from goku_mega.checkpoint.state import State
from goku_mega.errors import CheckpointError
from goku_mega.parallel.shards import Shard

WEIGHTS = 100_000
DISK_BYTES = 3 * 2**20
"""The disk of a test: room for several checkpoints of `weights`."""


def weights(value: float) -> State:
    return {"model": {"weight": Shard(torch.full((WEIGHTS,), value), (WEIGHTS,), (0,))}}


def loaded(folder: Path) -> tuple[int, float]:
    """Step and value of the newest checkpoint, which must be whole."""
    path = find_latest(folder)
    assert path is not None
    mine = weights(-1.0)
    load_into(path, mine)
    [value] = mine["model"]["weight"].tensor.unique().tolist()
    return load_info(path)["step"], value


def clear(message: str) -> str:
    """The message, if it is one line without a traceback."""
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# --- Damage ----------------------------------------------------------------------------------------------------------


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def zero_the_tail(file: Path) -> None:
    """What a file system leaves of a file that was not synced."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


HARMS = (flip_a_bit, truncate, zero_the_tail, Path.unlink)
FILES = ("__0_0.distcp", "index.safetensors", "info.json", "manifest.json", ".metadata")


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_said_in_one_line_and_the_older_checkpoint_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: Callable[[Path], None]
) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, step, state("rows", step=step), {}, keep=5)
    harm(tmp_path / "step_00000020" / name)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        path = find_latest(tmp_path)
    assert path == tmp_path / "step_00000010"
    [said] = [clear(record.getMessage()) for record in caplog.records if record.name.startswith("goku_mega")]
    assert f"step_00000020/{name}" in said
    assert "going back to step 10 loses 10 steps" in said
    mine = state("columns", step=None)
    load_into(path, mine)
    assert differences(mine, 10) == []


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_damage_that_came_after_the_checkpoint_was_chosen_is_found_while_it_is_read(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = save_checkpoint(tmp_path, 10, weights(1.0), {}, keep=5)
    harm(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"step_00000010/__0_0\.distcp") as error:
        load_into(path, weights(-1.0))
    clear(str(error.value))


# --- Full and read-only disks ----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, of DISK_BYTES."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here; it takes root ({error})")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def full(disk: Path, free_bytes: int) -> Iterator[None]:
    """Somebody else fills the disk up to so many bytes."""
    space = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(space.f_bavail * space.f_frsize - free_bytes))
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.parametrize("free_bytes", [0, 4096, 4 * WEIGHTS, 4 * WEIGHTS + 3 * 4096])
def test_a_full_disk_refuses_a_save_and_keeps_the_older_checkpoint(disk: Path, free_bytes: int) -> None:
    """From no room at all to room for the tensors, but not for what comes after them."""
    folder = disk / "checkpoints"
    save_checkpoint(folder, 1, weights(1.0), {}, keep=1)
    with full(disk, free_bytes):
        with pytest.raises(CheckpointError) as error:
            save_checkpoint(folder, 2, weights(2.0), {}, keep=1)
        assert "No space left on device" in clear(str(error.value))
        assert "step 2" in str(error.value)
        assert loaded(folder) == (1, 1.0)
        assert names_in(folder) == ["step_00000001"]  # nothing of the attempt takes room
    save_checkpoint(folder, 3, weights(3.0), {}, keep=1)
    assert loaded(folder) == (3, 3.0)


def test_training_goes_on_beside_a_full_disk_and_an_alert_is_raised(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, live = disk / "checkpoints", weights(1.0)
    caplog.set_level(logging.WARNING)
    with Saver(folder, live, keep=1) as saver:
        saver.save(1, {})
        saver.wait()
        with full(disk, 4096):
            for failure in range(1, ALERT_AFTER + 1):
                caplog.clear()
                saver.save(1 + failure, {})
                saver.fence()
                live["model"]["weight"].tensor.fill_(1.0 + failure)  # the training goes on
                outcome = saver.wait()
                assert outcome is not None
                assert clear(outcome.fault)
                assert saver.failures == failure
                [said] = [clear(record.getMessage()) for record in caplog.records]
                assert f"step {1 + failure} was not saved" in said
                assert ("ALERT" in said) == (failure == ALERT_AFTER)
                assert loaded(folder) == (1, 1.0)
        saver.save(9, {})
    assert saver.failures == 0
    assert loaded(folder) == (9, 1.0 + ALERT_AFTER)


def test_the_last_save_on_a_full_disk_is_not_lost_in_silence(disk: Path) -> None:
    folder = disk / "checkpoints"
    save_checkpoint(folder, 1, weights(1.0), {}, keep=1)
    saver = Saver(folder, weights(2.0), keep=1)
    with full(disk, 4096):
        saver.save(2, {})
        with pytest.raises(CheckpointError, match="step 2") as error:
            saver.close()
    clear(str(error.value))
    assert loaded(folder) == (1, 1.0)


def test_a_read_only_disk_refuses_a_save_and_can_be_loaded_from(disk: Path) -> None:
    folder = disk / "checkpoints"
    save_checkpoint(folder, 1, weights(1.0), {}, keep=1)
    mount("-o", "remount,ro", str(disk))
    for attempt in (
        lambda: save_checkpoint(folder, 2, weights(2.0), {}, keep=1),
        lambda: Saver(folder, weights(2.0), keep=1),
    ):
        with pytest.raises(CheckpointError, match="Read-only file system") as error:
            attempt()
        clear(str(error.value))
    assert loaded(folder) == (1, 1.0)
    mount("-o", "remount,rw", str(disk))
    save_checkpoint(folder, 3, weights(3.0), {}, keep=1)
    assert loaded(folder) == (3, 3.0)


def test_a_disk_that_becomes_read_only_while_training_runs(disk: Path) -> None:
    folder = disk / "checkpoints"
    with Saver(folder, weights(1.0), keep=1) as saver:
        saver.save(1, {})
        saver.wait()
        mount("-o", "remount,ro", str(disk))
        saver.save(2, {})
        outcome = saver.wait()
        mount("-o", "remount,rw", str(disk))
        assert outcome is not None
        assert "Read-only file system" in clear(outcome.fault)
        assert loaded(folder) == (1, 1.0)
        saver.save(3, {})
    assert loaded(folder)[0] == 3


# --- A slow store ----------------------------------------------------------------------------------------------------


def test_a_slow_store_is_waited_for_only_when_the_next_save_is_due_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if unavailable():
        pytest.skip(unavailable())
    folder, live = tmp_path / "checkpoints", weights(1.0)
    caplog.set_level(logging.WARNING)
    with Saver(folder, live, keep=9) as saver:
        saver.save(1, {})
        saver.wait()
        assert saver.waits == 0
        with traced(saver.writer_pid, tmp_path / "log", "fsync,fdatasync:delay_enter=100000"):
            began = time.monotonic()
            saver.save(2, {})
            saver.fence()
            live["model"]["weight"].tensor.fill_(2.0)
            assert time.monotonic() - began < 0.8  # a busy machine takes its time, but not for a dozen syncs
            caplog.clear()
            saver.save(3, {})
            saver.wait()
    assert saver.waits == 1
    [said] = [clear(record.getMessage()) for record in caplog.records]
    assert "step 3 is due" in said
    assert "step 2 is being written" in said
    for step, value in ((2, 1.0), (3, 2.0)):
        mine = weights(-1.0)
        load_into(folder / f"step_{step:08d}", mine)
        assert mine["model"]["weight"].tensor.unique().tolist() == [value]
