"""kill -9 of any rank or writer at random moments: the newest checkpoint loads, and the run continues bit for bit."""

import contextlib
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import find_latest, names_in, state, whole
from strace import traced, unavailable

from goku_mega.checkpoint.load import load_info, load_into
from goku_mega.checkpoint.save import Saver
from goku_mega.checkpoint.state import State
from launch import Running, run_ranks, start_ranks

pytestmark = pytest.mark.slow

WORLD = 2
EVERY = 3
"""Steps from one save to the next."""
STEP_S = 0.005
LIMIT_S = 60
"""A busy machine takes its time."""


def begin(rank: int = 0, world: int = 1) -> State:
    """This rank's part of the state before the first step."""
    return state("rows", rank, world, step=0)


def advance(parts: State, step: int) -> None:
    """One step of training: what the state becomes depends on every step before."""
    for part, shards in parts.items():
        for name, shard in shards.items():
            shard.tensor.mul_(0.75).add_(shard.take(whole(part, name, step)))


class Uninterrupted:
    """The states of a run that nobody kills, at the steps that are saved."""

    def __init__(self) -> None:
        self.now = begin()
        self.step = 0
        self.saved: dict[int, dict[str, torch.Tensor]] = {}

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """Every tensor by part and name."""
        while self.step < step:
            self.step += 1
            advance(self.now, self.step)
            if self.step % EVERY == 0:
                self.saved[self.step] = tensors_of(self.now, copy=True)
        return self.saved[step]


def tensors_of(parts: State, copy: bool = False) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": shard.tensor.clone() if copy else shard.tensor
        for part, shards in parts.items()
        for name, shard in shards.items()
    }


def train(rank: int, folder: Path, pids: Path, steps: int | None) -> int:
    """Train on from the newest checkpoint, for so many steps or for ever, saving as it goes; the last step."""
    mine = begin(rank, WORLD)
    latest, first = find_latest(folder), 1
    if latest is not None:
        load_into(latest, mine)
        first = load_info(latest)["step"] + 1
    noted = 0
    with Saver(folder, mine, keep=2) as saver:
        for step in itertools.count(first) if steps is None else range(first, first + steps):
            if saver.writer_pid != noted:
                noted = note(pids / str(rank), saver.writer_pid)
            time.sleep(STEP_S)
            here = torch.tensor(step)
            dist.all_reduce(here)
            assert here == WORLD * step, "the ranks continued from different steps"
            saver.fence()
            advance(mine, step)
            if step % EVERY == 0:
                saver.save(step, {})
    return step


def note(file: Path, pid: int) -> int:
    """Tell the test the number of the writer, which changes when it is started again."""
    file.with_suffix(".new").write_text(str(pid))
    file.with_suffix(".new").rename(file)
    return pid


def committed_step(folder: Path) -> int:
    """The newest step whose name is there."""
    steps = [int(name.removeprefix("step_")) for name in names_in(folder) if "." not in name] if folder.is_dir() else []
    return max(steps, default=0)


def until_committed(folder: Path, step: int, ranks: Running) -> None:
    """Wait until a later step than this one is saved."""
    deadline = time.monotonic() + LIMIT_S
    while committed_step(folder) <= step:
        assert time.monotonic() < deadline, f"nothing was saved after step {step}"
        assert all(process.is_alive() for process in ranks.processes), "a rank ended"
        time.sleep(0.01)


def is_a_writer(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"goku_mega.checkpoint.writer" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def writers(pids: Path) -> list[int]:
    return [pid for name in names_in(pids) if name.isdigit() and is_a_writer(pid := int((pids / name).read_text()))]


def kill_writers(choose: random.Random, pids: Path, times: int) -> int:
    """Kill so many times any of the writers, one soon after the other; how many there were to kill."""
    killed = 0
    for _ in range(times):
        time.sleep(choose.uniform(0, 0.1))
        if there := writers(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(choose.choice(there), signal.SIGKILL)
                killed += 1
    return killed


def assert_as_uninterrupted(folder: Path, at_least: int, reference: Uninterrupted) -> int:
    """The newest checkpoint holds what an uninterrupted run has at its step; that step."""
    path = find_latest(folder)
    if path is None:
        assert at_least == 0
        return 0
    step = load_info(path)["step"]
    assert step >= at_least, "a committed checkpoint was lost"
    loaded = begin()
    load_into(path, loaded)
    expected = reference.at(step)
    for name, tensor in tensors_of(loaded).items():
        assert torch.equal(tensor, expected[name]), f"{name} at step {step}"
    return step


@pytest.mark.parametrize(("seed", "moments"), [(0, 10), pytest.param(1, 40, marks=pytest.mark.slow)])
def test_after_a_kill_at_any_moment_the_run_continues_bit_for_bit(tmp_path: Path, seed: int, moments: int) -> None:
    choose, reference = random.Random(seed), Uninterrupted()
    folder, pids = tmp_path / "checkpoints", tmp_path / "pids"
    pids.mkdir()
    killed = {"rank": 0, "writer": 0}
    while sum(killed.values()) < moments:
        before = committed_step(folder)
        ranks = start_ranks(train, WORLD, folder, pids, None)
        try:
            if choose.random() < 0.2:  # it is killed while it starts, as like as not
                time.sleep(choose.uniform(0, 0.5))
            else:
                until_committed(folder, before, ranks)
                killed["writer"] += kill_writers(choose, pids, choose.choice([0, 1, 2, 3]))
                until_committed(folder, committed_step(folder), ranks)  # new ones are started, and save
                time.sleep(choose.uniform(0, 0.2))
            victim = choose.choice(ranks.processes)
            committed, left = committed_step(folder), writers(pids)
            os.kill(victim.pid or 0, signal.SIGKILL)
            killed["rank"] += 1
        finally:
            ranks.stop()  # as a launcher does when a rank has died
        assert_as_uninterrupted(folder, committed, reference)
        assert_gone(left)
    last = run_ranks(train, WORLD, folder, pids, 4 * EVERY)
    assert last[0] == last[1]
    final = assert_as_uninterrupted(folder, last[0] - EVERY + 1, reference)
    print(f"{killed} killed, {final} steps")
    assert min(killed.values()) >= moments // 5
    assert names_in(folder) == [f"step_{final - EVERY:08d}", f"step_{final:08d}"]


def assert_gone(pids: list[int]) -> None:
    """A writer does not outlive its rank."""
    deadline = time.monotonic() + LIMIT_S
    while left := [pid for pid in pids if is_a_writer(pid)]:
        assert time.monotonic() < deadline, f"the writers {left} are still there"
        time.sleep(0.01)


def save_twice(rank: int, scratch: Path) -> int:
    """The step of the last outcome, of a save that ends while the process that decides over it is killed."""
    with Saver(scratch / "checkpoints", begin(rank, WORLD), keep=2) as saver:
        saver.save(1, {})
        saver.wait()
        note(scratch / f"{rank}", saver.writer_pid)
        deadline = time.monotonic() + LIMIT_S
        while not (scratch / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        saver.save(2, {})
    assert saver.outcome is not None
    return saver.outcome.step if not saver.outcome.fault else -1


def test_a_writer_killed_when_it_has_told_only_the_others_how_the_save_ended(tmp_path: Path) -> None:
    """It is started again and knows nothing of the save; no later one comes that could say that the others know."""
    if unavailable():
        pytest.skip(unavailable())
    ranks = start_ranks(save_twice, WORLD, tmp_path, timeout_s=LIMIT_S)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not all((tmp_path / str(rank)).exists() for rank in range(WORLD)) and time.monotonic() < deadline:
            time.sleep(0.01)
        # what its main thread writes: its own file, and then the outcome to its rank
        log, kill = tmp_path / "log", "write:signal=KILL:when=2"
        writer = int((tmp_path / "0").read_text())
        with traced(writer, log, kill, calls=("write",), threads=[writer]):
            (tmp_path / "go").touch()
            assert ranks.results() == [2] * WORLD
    finally:
        ranks.stop()
    own_file, outcome = [line for line in log.read_text().splitlines() if line.startswith("write(")]
    assert "__0_0.distcp" in own_file
    assert "distcp" not in outcome
    assert committed_step(tmp_path / "checkpoints") == 2
