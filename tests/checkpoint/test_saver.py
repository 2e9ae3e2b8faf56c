"""Saving beside the training: what is saved, what the training waits for, and what is left when it is over."""

import contextlib
import gc
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import differences, find_latest, names_in, state
from strace import traced, unavailable

from goku_mega.checkpoint.commit import OWNER
from goku_mega.checkpoint.load import load_info, load_into
from goku_mega.checkpoint.save import ALERT_AFTER, Saver
from goku_mega.checkpoint.state import State
from goku_mega.errors import CheckpointError
from goku_mega.parallel.shards import Shard
from launch import run_ranks, start_ranks

pytestmark = pytest.mark.slow

LIMIT_S = 60
"""A busy machine takes its time."""


def advance(mine: State, step: int, rank: int = 0, world: int = 1) -> None:
    """Training: the state becomes that of a step."""
    for part, shards in state("rows", rank, world, step=step).items():
        for name, shard in shards.items():
            mine[part][name].tensor.copy_(shard.tensor)


def assert_saved(folder: Path, step: int) -> None:
    """The newest checkpoint is of this step, and holds what the state was then."""
    path = find_latest(folder)
    assert path is not None
    assert load_info(path)["step"] == step
    loaded = state("columns", step=None)
    load_into(path, loaded)
    assert differences(loaded, step) == []


@contextlib.contextmanager
def stopped(saver: Saver) -> Iterator[None]:
    """The writer does nothing meanwhile."""
    pid = saver.writer_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# --- What the training waits for -------------------------------------------------------------------------------------


def test_the_state_may_change_as_soon_as_it_is_copied(tmp_path: Path) -> None:
    mine = state("rows", step=0)
    with Saver(tmp_path, mine, keep=9) as saver:
        for step in range(1, 6):
            saver.wait()
            advance(mine, step)
            with stopped(saver):  # so nothing of it can be written before it changes
                saver.save(step, {})
                saver.fence()
                advance(mine, 100 + step)
            saver.wait()
            assert_saved(tmp_path, step)


def test_a_large_state_is_copied_whole_before_it_may_change(tmp_path: Path) -> None:
    """The copy runs in a thread; here it takes long enough to be caught if `fence` did not wait for it."""
    numbers = torch.zeros(16 * 2**20)
    mine = {"model": {"w": Shard(numbers, tuple(numbers.shape), (0,))}}
    with Saver(tmp_path, mine, keep=1) as saver:
        for step in range(1, 4):
            numbers.fill_(step)
            saver.save(step, {})
            saver.fence()
            numbers.fill_(-step)
            saver.wait()
            path = find_latest(tmp_path, verify=False)
            assert path is not None
            loaded = torch.empty_like(numbers)
            load_into(path, {"model": {"w": Shard(loaded, tuple(loaded.shape), (0,))}})
            assert loaded.unique().tolist() == [step]


def test_the_loop_waits_only_when_the_next_save_is_due_and_then_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    mine = state("rows", step=1)
    with Saver(tmp_path, mine, keep=9) as saver:
        saver.save(1, {})
        saver.wait()
        with stopped(saver):
            began = time.monotonic()
            saver.save(2, {})
            for _ in range(100):  # steps of training
                assert saver.fence() < 30
            advance(mine, 3)
            assert time.monotonic() - began < 60
            assert (saver.waits, caplog.records) == (0, [])
            threading.Timer(1.0, os.kill, (saver.writer_pid, signal.SIGCONT)).start()
            assert saver.save(3, {}) > 0.5
        assert saver.waits == 1
        [said] = [record.getMessage() for record in caplog.records]
        assert "the checkpoint of step 3 is due, but that of step 2 is being written" in said
        saver.wait()
    assert_saved(tmp_path, 3)


def test_an_error_of_the_training_leaves_the_save_under_way_its_time(tmp_path: Path) -> None:
    mine = state("rows", step=4)
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, mine, keep=1) as saver:
        saver.save(4, {})
        raise ZeroDivisionError
    assert_saved(tmp_path, 4)
    assert not alive(saver.writer_pid)


# --- Killed writers --------------------------------------------------------------------------------------------------


def save_while_writers_die(rank: int, world: int, folder: Path, victims: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """Save, and save again while some writers are killed, and once more."""
    mine, seen = state("rows", rank, world, step=0), []
    with Saver(folder, mine, keep=9) as saver:
        for step in (1, 2, 3):
            advance(mine, step, rank, world)
            dist.barrier()  # all have heard how the save before ended
            if rank in victims and step == 2:
                os.kill(saver.writer_pid, signal.SIGSTOP)
            dist.barrier()
            saver.save(step, {})
            saver.fence()
            advance(mine, 100 + step, rank, world)
            if rank in victims and step == 2:
                time.sleep(0.3)  # the others have written by now, and wait for this one
                os.kill(saver.writer_pid, signal.SIGKILL)
            outcome = saver.wait()
            assert outcome is not None
            seen.append((outcome.fault, saver.failures, saver.writer_pid))
    return seen


@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1, 2)], ids=["of rank 0", "of rank 1", "of all ranks"])
def test_a_killed_writer_is_replaced_and_the_same_save_succeeds(tmp_path: Path, victims: tuple[int, ...]) -> None:
    for rank, seen in enumerate(run_ranks(save_while_writers_die, 3, 3, tmp_path, victims, timeout_s=LIMIT_S)):
        assert [(fault, failures) for fault, failures, _ in seen] == [("", 0)] * 3
        pids = [pid for _, _, pid in seen]
        assert (pids[0] != pids[1]) == (rank in victims)
        assert pids[1] == pids[2]
    assert names_in(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    for step in (1, 2, 3):
        loaded = state("columns", step=None)
        load_into(tmp_path / f"step_{step:08d}", loaded)
        assert differences(loaded, step) == []


def save_while_a_writer_dies_anywhere(rank: int, world: int, folder: Path, saves: int) -> list[str]:
    """A writer is killed in each save, at a moment between its begin and its end."""
    mine, faults = state("rows", rank, world, step=0), []
    choose = random.Random(5)
    with Saver(folder, mine, keep=3) as saver:
        saver.save(0, {})
        saver.wait()
        for step in range(1, saves + 1):
            advance(mine, step, rank, world)
            victim, after_s = choose.randrange(world), choose.uniform(0, 0.06)
            dist.barrier()
            saver.save(step, {})
            saver.fence()
            time.sleep(after_s)
            if rank == victim:
                with contextlib.suppress(ProcessLookupError):  # one that died before has not been replaced yet
                    os.kill(saver.writer_pid, signal.SIGKILL)
            outcome = saver.wait()
            assert outcome is not None
            faults.append(outcome.fault)
    return faults


def test_a_writer_killed_at_any_moment_costs_no_save(tmp_path: Path) -> None:
    saves = 15
    assert run_ranks(save_while_a_writer_dies_anywhere, 2, 2, tmp_path, saves) == [[""] * saves] * 2
    assert_saved(tmp_path, saves)
    assert names_in(tmp_path) == [f"step_{step:08d}" for step in range(saves - 2, saves + 1)]


def save_while_a_writer_is_killed_again_and_again(
    rank: int, world: int, folder: Path, victim: int
) -> list[tuple[str, int]]:
    mine, seen = state("rows", rank, world, step=0), []
    with Saver(folder, mine, keep=9) as saver:
        for step in (1, 2, 3):
            advance(mine, step, rank, world)
            dist.barrier()
            over = threading.Event()
            if rank == victim and step == 2:
                os.kill(saver.writer_pid, signal.SIGKILL)
                threading.Thread(target=kill_again_and_again, args=(saver, over)).start()
            saver.save(step, {})
            outcome = saver.wait()
            over.set()
            assert outcome is not None
            seen.append((outcome.fault, saver.failures))
    return seen


def kill_again_and_again(saver: Saver, over: threading.Event) -> None:
    """Every process that is started."""
    while not over.wait(0.002):
        with contextlib.suppress(ProcessLookupError):
            os.kill(saver.writer_pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", [0, 1])
def test_where_a_writer_dies_again_and_again_the_save_fails_on_all_and_the_next_succeeds(
    tmp_path: Path, victim: int
) -> None:
    for seen in run_ranks(save_while_a_writer_is_killed_again_and_again, 2, 2, tmp_path, victim):
        (first, _), (second, failures), (third, none) = seen
        assert (first, third, none) == ("", "", 0)
        assert f"rank {victim}: its writer process died" in second
        assert failures == 1
    assert names_in(tmp_path) == ["step_00000001", "step_00000003"]
    assert_saved(tmp_path, 3)


def save_and_lose_what_commits(rank: int, world: int, folder: Path, log: Path, rename: int) -> list[str]:
    """The process that commits is killed at one of its renames."""
    mine, faults = state("rows", rank, world, step=0), []
    with Saver(folder, mine, keep=1) as saver:
        for step in (1, 2):
            advance(mine, step, rank, world)
            dist.barrier()
            inject: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if rank == 0 and step == 2:
                inject = traced(saver.writer_pid, log, f"rename:signal=KILL:when={rename}")
            with inject:
                dist.barrier()
                saver.save(step, {})
                outcome = saver.wait()
            assert outcome is not None
            faults.append(outcome.fault)
    return faults


# The thread that commits renames index, metadata, info and manifest, then the folder, then the checkpoint that goes.
@pytest.mark.parametrize("rename", [1, 4, 5, 6])
def test_a_commit_that_nobody_heard_of_is_found_and_not_done_again(tmp_path: Path, rename: int) -> None:
    if unavailable():
        pytest.skip(unavailable())
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    assert run_ranks(save_and_lose_what_commits, 2, 2, folder, log, rename) == [["", ""]] * 2
    assert log.read_text().rstrip().endswith("= ?")  # the call that it did not come back from
    assert_saved(folder, 2)
    assert names_in(folder) == ["step_00000002"]


def save_on_nodes_and_lose_what_commits(rank: int, world: int, folder: Path) -> list[str]:
    """Rank 0's writer is killed as it tells its rank of a commit that the other node has heard of."""
    mine, faults = state("rows", rank, world, step=0), []
    with Saver(folder / "store", mine, keep=1, node_folder=str(folder / f"node{rank}"), store_every=9) as saver:
        for step in (1, 2):
            advance(mine, step, rank, world)
            dist.barrier()
            inject: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if rank == 0 and step == 2:
                kill, writer = "write:signal=KILL:when=2", saver.writer_pid  # the first is its own file
                inject = traced(writer, folder / "log", kill, calls=("write",), threads=[writer])
            with inject:
                dist.barrier()
                saver.save(step, {})
                outcome = saver.wait()
            assert outcome is not None
            faults.append(outcome.fault)
    return faults


def test_a_commit_on_all_nodes_is_found_and_not_done_again_on_any(tmp_path: Path) -> None:
    if unavailable():
        pytest.skip(unavailable())
    assert run_ranks(save_on_nodes_and_lose_what_commits, 2, 2, tmp_path) == [["", ""]] * 2
    assert (tmp_path / "log").read_text().count("write(") == 2
    for node in ("node0", "node1"):
        assert names_in(tmp_path / node) == ["step_00000001", "step_00000002"]
        assert {"__0_0.distcp", "__1_0.distcp"} < set(names_in(tmp_path / node / "step_00000002"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def save_for_ever(rank: int, world: int, folder: Path, pids: Path) -> None:
    mine = state("rows", rank, world, step=0)
    with Saver(folder, mine, keep=1) as saver:
        saver.save(1, {})
        saver.wait()
        (pids / f"{rank}.new").write_text(str(saver.writer_pid))
        (pids / f"{rank}.new").rename(pids / str(rank))
        time.sleep(LIMIT_S)


@pytest.mark.parametrize("stop", [False, True], ids=["idle", "stopped"])
def test_a_writer_ends_with_its_rank(tmp_path: Path, stop: bool) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    ranks = start_ranks(save_for_ever, 2, 2, tmp_path / "checkpoints", pids)
    try:
        until(lambda: names_in(pids) == ["0", "1"], "the ranks have not saved")
        writers = [int((pids / name).read_text()) for name in ("0", "1")]
        assert all(map(alive, writers))
        if stop:
            os.kill(writers[1], signal.SIGSTOP)
        os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
        until(lambda: not alive(writers[1]), "the writer outlived its rank")
        assert alive(writers[0])
    finally:
        ranks.stop()
    until(lambda: not alive(writers[0]), "the writer outlived its rank")


def until(done, otherwise: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


# --- Saves that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here; it takes root ({mounted.stderr.strip()})")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


class Said(logging.Handler):
    """What a rank logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[str, str]] = []
        logging.getLogger("goku_mega").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def fill_up(disk: Path) -> Path:
    filler = disk / "filler"
    space = os.statvfs(disk)
    filler.write_bytes(bytes(space.f_bavail * space.f_frsize - 2 * 4096))
    return filler


def save_on_a_full_disk(rank: int, world: int, disk: Path) -> tuple[list[int], list[str], list[tuple[str, str]]]:
    mine, said, failures, changed = state("rows", rank, world, step=1), Said(), [], []
    with Saver(disk / "checkpoints", mine, keep=9) as saver:
        saver.save(1, {})
        saver.wait()
        dist.barrier()
        filler = fill_up(disk) if rank == 0 else disk
        dist.barrier()
        for step in range(2, 2 + ALERT_AFTER):
            advance(mine, step, rank, world)
            saver.save(step, {})
            saver.wait()
            changed += differences(mine, step)
            failures.append(saver.failures)
            dist.barrier()
        if rank == 0:
            filler.unlink()
        dist.barrier()
        advance(mine, 9, rank, world)
        saver.save(9, {})
        saver.wait()
        failures.append(saver.failures)
    return failures, changed, said.lines


def test_saves_on_a_full_disk_fail_on_all_ranks_and_go_on_once_there_is_room(disk: Path) -> None:
    found = run_ranks(save_on_a_full_disk, 2, 2, disk)
    for failures, changed, _ in found:
        assert failures == [*range(1, ALERT_AFTER + 1), 0]
        assert changed == []
    said, silent = (lines for _, _, lines in found)
    assert silent == []
    assert [level for level, _ in said] == ["WARNING"] * (ALERT_AFTER - 1) + ["ERROR"]
    assert all("was not saved" in line and "free" in line and "\n" not in line for _, line in said)
    assert [f"ALERT: {ALERT_AFTER} saves in a row have failed" in line for _, line in said][-2:] == [False, True]
    assert_saved(disk / "checkpoints", 9)
    assert names_in(disk / "checkpoints") == ["step_00000001", "step_00000009"]


def close_on_a_full_disk(rank: int, world: int, disk: Path) -> tuple[str, bool]:
    mine = state("rows", rank, world, step=1)
    saver = Saver(disk / "checkpoints", mine, keep=9)
    saver.save(1, {})
    saver.wait()
    dist.barrier()
    if rank == 0:
        fill_up(disk)
    dist.barrier()
    saver.save(2, {})
    try:
        saver.close()
    except CheckpointError as error:
        return str(error), alive(saver.writer_pid)
    return "", alive(saver.writer_pid)


def test_a_last_save_that_fails_for_good_raises_on_all_ranks(disk: Path) -> None:
    first, second = run_ranks(close_on_a_full_disk, 2, 2, disk)
    assert first == second
    message, writer_left = first
    assert message.startswith("the checkpoint of step 2 could not be saved: rank ")
    assert not writer_left
    assert_saved(disk / "checkpoints", 1)


def test_a_folder_that_somebody_clears_is_made_anew(tmp_path: Path) -> None:
    folder, mine = tmp_path / "checkpoints", state("rows", step=1)
    with Saver(folder, mine, keep=9) as saver:
        for step in (1, 2):
            advance(mine, step)
            saver.save(step, {})
            saver.wait()
            assert saver.failures == 0
            assert_saved(folder, step)
            shutil.rmtree(folder)
        saver.save(3, {})
    assert names_in(folder) == ["step_00000003"]


# --- Two jobs, one folder --------------------------------------------------------------------------------------------


def test_of_two_jobs_in_one_folder_the_older_cannot_commit_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    older, newer = state("rows", step=1), state("rows", step=2)
    with Saver(tmp_path, older, keep=9) as first:
        first.save(1, {})
        first.wait()
        with Saver(tmp_path, newer, keep=9) as second:
            token = (tmp_path / OWNER).read_text()
            under_way = tmp_path / f"step_00000007.tmp.{token}-5"  # what the newer job may be writing just now
            under_way.mkdir()
            for step in (5, 6):
                first.save(step, {})
                outcome = first.wait()
                assert outcome is not None
                assert f"another job has taken over {tmp_path}" in outcome.fault
            assert first.failures == 2
            assert f"another job has taken over {tmp_path}" in caplog.records[-1].getMessage()
            assert under_way.is_dir()
            assert [
                path for path in tmp_path.iterdir() if path.name.startswith(("step_00000005", "step_00000006"))
            ] == []
            second.save(2, {})
            second.wait()
            assert second.failures == 0
            assert_saved(tmp_path, 2)
        with pytest.raises(CheckpointError, match="another job has taken over"):
            first.close()
    assert names_in(tmp_path) == ["step_00000001", "step_00000002"]


# --- What is left ----------------------------------------------------------------------------------------------------


def held() -> dict[str, object]:
    """What this process has: descriptors, images in shared memory, threads, children."""
    gc.collect()
    descriptors = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            descriptors.append(os.readlink(f"/proc/self/fd/{number}").split(":")[0])
    children = [
        pid for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == os.getpid()
    ]  # fmt: skip
    return {
        "descriptors": sorted(descriptors),
        "images": Path("/proc/self/maps").read_text().count("goku-checkpoint"),
        "threads": threading.active_count(),
        "children": len(children),
    }


def parent_of(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def use_a_saver(folder: Path, rank: int, world: int, number: int) -> int:
    mine = state("rows", rank, world, step=number)
    with Saver(folder, mine, keep=1) as saver:
        saver.save(number, {})
        if number % 3 == 0:
            saver.fence()
            os.kill(saver.writer_pid, signal.SIGKILL)
        return saver.writer_pid


def use_many(rank: int, world: int, folder: Path, count: int) -> tuple[dict[str, object], dict[str, object], list[int]]:
    writers = [use_a_saver(folder, rank, world, 1)]  # what is loaded and made once stays
    before = held()
    writers += [use_a_saver(folder, rank, world, number) for number in range(2, count + 2)]
    return before, held(), writers


def test_nothing_is_left_of_twenty_savers(tmp_path: Path) -> None:
    for before, after, writers in run_ranks(use_many, 2, 2, tmp_path, 20):
        assert after == before
        assert not any(map(alive, writers))
    assert names_in(tmp_path) == ["step_00000021"]


def test_a_folder_that_cannot_be_written_to_raises_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mine = state("rows")
    before = held()
    for _ in range(5):
        with pytest.raises(CheckpointError, match="file"):
            Saver(tmp_path / "file", mine, keep=1)
    assert held() == before


def test_the_writers_answer_only_those_who_know_their_token(tmp_path: Path) -> None:
    """Anybody may connect to the port on a shared machine."""
    mine = state("rows", step=1)
    before = listening()
    with Saver(tmp_path, mine, keep=1) as saver:
        [port] = listening() - before
        for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2" + bytes(8) + b"{}", b"\xff" * 12):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(nonsense)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100) == b""
        saver.save(1, {})
    assert_saved(tmp_path, 1)


def listening() -> set[int]:
    """The TCP ports that this process listens at."""
    inodes = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(f"/proc/self/fd/{number}").removeprefix("socket:[").rstrip("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes}
