"""A save happens wholly or not at all, on all ranks: under kill -9 at any point, a full disk, and retention."""

import itertools
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_cases import differences, find_latest, names_in, state

from goku_mega.checkpoint.commit import remove_leftovers
from goku_mega.checkpoint.load import load_info, load_into
from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.checkpoint.storage import LocalFolder
from goku_mega.errors import CheckpointError
from launch import RankFailed, run_ranks, start_ranks

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def save(folder: Path, step: int, *, keep: int = 9, **info: Any) -> Path:
    return save_checkpoint(folder, step, state("rows", step=step), info, keep=keep)


def intact_step(folder: Path) -> int:
    """Step of the latest checkpoint, after checking that it loads and holds that step's values."""
    path = find_latest(folder)
    assert path is not None
    step = load_info(path)["step"]
    mine = state("columns", step=None)
    load_into(path, mine)
    assert differences(mine, step) == []
    return step


def save_and_die(rank: int, folder: Path, step: int, operation: int) -> None:
    """Save; be killed just before the n-th change to the folder."""
    counter = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES and not (event == "open" and arguments[1] in ("r", "rb"))
        if changes and str(folder) in str(arguments[0]) and next(counter) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(folder, step, keep=1, attempt="second")


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, again: bool) -> None:
    step = 1 if again else 2
    found = []
    for operation in itertools.count():
        folder = tmp_path / str(operation)
        save(folder, 1, attempt="first")
        try:
            run_ranks(save_and_die, 1, folder, step, operation)
        except RankFailed as error:
            assert "exit code -9" in str(error)
        else:
            break
        assert intact_step(folder) in (1, step)
        path = find_latest(folder)
        assert path is not None
        found.append(load_info(path)["attempt"])
        assert names_in(save(folder, 3, keep=1).parent) == ["step_00000003"]  # the next save cleans up
    assert operation >= 10
    assert found == sorted(found)  # first ... first, second ... second: never back
    assert set(found) == {"first", "second"}


SAVE_LIMIT_S = 60
"""A busy machine takes its time until the first save of a start is committed."""


def save_for_ever(rank: int, world: int, folder: Path, log: Path) -> None:
    latest = find_latest(folder)
    start = 0 if latest is None else load_info(latest)["step"]
    for step in itertools.count(start + 1):
        save_checkpoint(folder, step, state("rows", rank, world, step=step), {}, keep=2)
        if rank == 0:
            with log.open("a") as file:
                file.write(f"{step}\n")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_at_a_random_moment_never_loses_a_committed_checkpoint(tmp_path: Path, world: int) -> None:
    choose = random.Random(world)
    folder, log = tmp_path / "checkpoints", tmp_path / "committed"
    for _ in range(8):
        before = log.read_text() if log.exists() else ""
        ranks = start_ranks(save_for_ever, world, world, folder, log)
        deadline = time.monotonic() + SAVE_LIMIT_S
        while time.monotonic() < deadline and (not log.exists() or log.read_text() == before):
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.3))
        victim = choose.choice(ranks.processes)
        os.kill(victim.pid or 0, signal.SIGKILL)
        ranks.stop()
        committed = [int(line) for line in log.read_text().split()] if log.exists() else []
        if committed:
            assert intact_step(folder) >= max(committed)
    assert committed, "no save finished: the test proved nothing"


def save_on_a_full_disk(rank: int, folder: Path) -> str:
    save_checkpoint(folder, 1, state("rows", rank, 2, step=1), {}, keep=2)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    try:
        save_checkpoint(folder, 2, state("rows", rank, 2, step=2), {}, keep=2)
    except CheckpointError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()  # rank 0 removes the attempt
    assert names_in(folder) == ["step_00000001"]
    dist.barrier()
    save_checkpoint(folder, 3, state("rows", rank, 2, step=3), {}, keep=2)
    return said


def test_a_full_disk_on_one_rank_raises_on_all_and_publishes_nothing(tmp_path: Path) -> None:
    said = run_ranks(save_on_a_full_disk, 2, tmp_path)
    assert said[0] == said[1]
    assert said[0].startswith(f"saving the checkpoint of step 2 in {tmp_path} failed (rank 1: ")
    assert intact_step(tmp_path) == 3


def save_with_a_bug(rank: int, folder: Path) -> str:
    info = {"not json": object()} if rank == 0 else {}
    try:
        save_checkpoint(folder, 1, state("rows", rank, 2), info, keep=1)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_bug_on_one_rank_raises_on_all_with_its_traceback(tmp_path: Path) -> None:
    said = run_ranks(save_with_a_bug, 2, tmp_path)
    assert said[0] == said[1]
    assert "failed on rank 0:\nTraceback" in said[0]
    assert "object is not JSON serializable" in said[0]
    assert names_in(tmp_path) == []


def save_where_a_file_is(rank: int, folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(folder, 1, state("rows", rank, 2), {}, keep=1)
    return str(error.value)


def test_a_file_in_the_place_of_the_folder_raises_on_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    said = run_ranks(save_where_a_file_is, 2, tmp_path / "checkpoints")
    assert said[0] == said[1]
    assert "FileExistsError" in said[0]


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert names_in(tmp_path) == ["step_00000004", "step_00000005"]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_00000003" / ".metadata").unlink()
    save(tmp_path, 4, keep=2)
    assert names_in(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    save(tmp_path, 5, keep=2)
    assert names_in(tmp_path) == ["step_00000004", "step_00000005"]


def test_retention_after_going_back_never_deletes_the_checkpoint_just_written(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        save(tmp_path, step)
    file = tmp_path / "step_00000009" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))  # damaged, but of the right size
    assert intact_step(tmp_path) == 2
    save(tmp_path, 3, keep=1)
    assert intact_step(tmp_path) == 3


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, attempt="first")
    (tmp_path / "step_00000001" / ".metadata").unlink()
    path = save(tmp_path, 1, attempt="second")
    assert load_info(path)["attempt"] == "second"
    assert intact_step(tmp_path) == 1
    assert names_in(tmp_path) == ["step_00000001"]


def test_leftovers_of_dead_attempts_are_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_00000002.tmp.0123456789ab").mkdir()
    (tmp_path / "step_00000002.tmp.0123456789ab" / "__0_0.distcp").write_bytes(b"part")
    (tmp_path / "notes.txt").write_text("mine")
    assert find_latest(tmp_path) == tmp_path / "step_00000001"
    remove_leftovers(LocalFolder(tmp_path))
    assert names_in(tmp_path) == ["notes.txt", "step_00000001"]
