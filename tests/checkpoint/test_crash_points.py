"""A save killed, or failing, at every system call that changes its folder leaves the old checkpoint or the new one."""

import itertools
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import differences, find_latest, state
from strace import Call, Victim, calls_in, traced, unavailable

from goku_mega.checkpoint import save as saving
from goku_mega.checkpoint.commit import OWNER
from goku_mega.checkpoint.load import load_info, load_into
from goku_mega.checkpoint.save import Saver, save_checkpoint
from goku_mega.checkpoint.writer import Outcome
from goku_mega.errors import CheckpointError

pytestmark = pytest.mark.slow

SYNCS = ("fsync", "fdatasync")
RENAMES = ("rename", "renameat", "renameat2")


@pytest.fixture(autouse=True)
def _strace() -> None:
    if unavailable():
        pytest.skip(unavailable())


def save(folder: Path, step: int, attempt: str) -> str:
    save_checkpoint(folder, step, state("rows", step=step), {"said": attempt}, keep=1)
    return "saved"


def attempt_found(folder: Path) -> str:
    """Which attempt find_latest finds, after checking that it loads and holds its step's values bit for bit."""
    path = find_latest(folder)
    assert path is not None
    info = load_info(path)
    mine = state("columns", step=None)
    load_into(path, mine)
    assert differences(mine, info["step"]) == []
    return info["said"]


def assert_next_save_cleans_up(folder: Path) -> None:
    assert save(folder, 3, "third") == "saved"
    assert attempt_found(folder) == "third"
    assert sorted(os.listdir(folder)) == [OWNER, "step_00000003"]


def calls_of_a_save(folder: Path, log: Path, step: int) -> list[Call]:
    """What the second save of a process changes, call by call, while nothing goes wrong."""
    with Victim(save, folder) as victim:
        victim.ask(1, "first")
        with traced(victim.pid, log):
            assert victim.ask(step, "second") == "saved"
        return checked(calls_in(log, folder))


def checked(calls: list[Call]) -> list[Call]:
    """The calls, if they are those of a whole save."""
    names = Counter(call.name for call in calls)
    print(f"{len(calls)} calls: {dict(names)}")
    assert {"openat", "write", "fsync"} <= set(names)
    assert names["fsync"] >= 5
    return calls


def commit(calls: list[Call]) -> Call:
    """The rename to the final name."""
    [found] = [call for call in calls if is_commit(call)]
    return found


def is_commit(call: Call) -> bool:
    final = r'step_\d+\.tmp[^"]*", (AT_FDCWD<[^>]*>, )?"[^"]*/step_\d+"'
    return call.name in RENAMES and re.search(final, call.arguments) is not None


def one_by_one(tmp_path: Path, calls: list[Call]) -> Iterator[tuple[Call, Path, Path]]:
    """Each call with a folder of its own and a place for the log."""
    for number, call in enumerate(calls):
        yield call, tmp_path / f"{number}" / "checkpoints", tmp_path / f"{number}.log"


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_kill_at_any_call_finds_the_old_checkpoint_before_the_commit_and_the_new_one_after_it(
    tmp_path: Path, step: int
) -> None:
    calls = calls_of_a_save(tmp_path / "dry", tmp_path / "dry.log", step)
    point_of_no_return = commit(calls).order
    for call, folder, log in one_by_one(tmp_path, calls):
        with Victim(save, folder) as victim:
            victim.ask(1, "first")
            with traced(victim.pid, log, f"{call.name}:signal=KILL:when={call.number}"):
                assert victim.ask(step, "second") is None, f"no kill at {call}"
        expected = "first" if call.order <= point_of_no_return else "second"
        assert attempt_found(folder) == expected, f"killed at {call}"
        assert_next_save_cleans_up(folder)


def test_a_kill_at_any_call_of_the_first_save_leaves_nothing_or_a_whole_checkpoint(tmp_path: Path) -> None:
    with Victim(save) as victim:
        victim.ask(tmp_path / "warm up", 1, "first")
        with traced(victim.pid, tmp_path / "log"):
            victim.ask(tmp_path / "dry", 1, "first")
        calls = checked(calls_in(tmp_path / "log", tmp_path / "dry"))
    point_of_no_return = commit(calls).order
    for call, folder, log in one_by_one(tmp_path, calls):
        folder.parent.mkdir()
        with Victim(save) as victim:
            victim.ask(tmp_path / f"warm up {call}", 1, "first")
            with traced(victim.pid, log, f"{call.name}:signal=KILL:when={call.number}"):
                assert victim.ask(folder, 1, "first") is None, f"no kill at {call}"
        if call.order <= point_of_no_return:
            assert find_latest(folder) is None
        else:
            assert attempt_found(folder) == "first"
        assert_next_save_cleans_up(folder)


def test_before_the_commit_every_file_and_folder_is_on_the_disk(tmp_path: Path) -> None:
    """After a power cut, only what was synced is sure to be there: a rename must not come before its contents."""
    calls = calls_of_a_save(tmp_path / "dry", tmp_path / "dry.log", 2)
    committing = commit(calls)
    attempt = re.search(r'"([^"]*/step_00000002\.tmp[^"]*)"', committing.arguments)
    assert attempt is not None
    synced: dict[str, int] = {}
    written: dict[str, int] = {}
    named: dict[str, int] = {}  # folder -> the last change of its names
    for call in calls:
        path = re.match(r"\d+<([^>]*)>", call.arguments)
        if call.name in SYNCS and path is not None:
            synced[path[1]] = call.order
        elif path is not None and "write" in call.name:
            written[path[1]] = call.order
        for name in re.findall(r'"([^"]*)"', call.arguments) if call.name in {*RENAMES, "openat"} else ():
            if str(Path(name).parent) == attempt[1]:
                named[attempt[1]] = call.order
    assert written
    for place, order in {**written, **named}.items():
        assert order < synced.get(place, -1) < committing.order, f"{place} is not synced before the commit"
    assert synced[str(tmp_path / "dry")] > committing.order


def failures(calls: list[Call]) -> list[tuple[Call, str]]:
    """An error for each call: one in three is a full disk where that can be, the others are disk errors."""
    choose = random.Random(4)
    full = {"openat", "write", "pwrite64", "writev", "pwritev", "mkdir", "rename", "fsync"}
    return [(call, "ENOSPC" if call.name in full and choose.random() < 1 / 3 else "EIO") for call in calls]


def test_an_error_at_any_call_is_one_clear_line_and_loses_nothing(tmp_path: Path) -> None:
    planned = failures(calls_of_a_save(tmp_path / "dry", tmp_path / "dry.log", 2))
    answers: Counter[str] = Counter()
    for (call, error), (_, folder, log) in zip(
        planned, one_by_one(tmp_path, [call for call, _ in planned]), strict=True
    ):
        with Victim(save, folder) as victim:
            victim.ask(1, "first")
            with traced(victim.pid, log, f"{call.name}:error={error}:when={call.number}"):
                answer = victim.ask(2, "second")
            where = f"{error} at {call}: {answer}"
            assert "(INJECTED)" in log.read_text(), where
            found = attempt_found(folder)
            if answer == "saved":  # it was in the removal of the older checkpoint, or a second try succeeded
                assert found == "second", where
            else:
                assert isinstance(answer, CheckpointError), where
                assert "\n" not in str(answer), where
                assert "step 2" in str(answer), where
                assert error in ("EIO", "ENOSPC"), where
                assert ("No space left" if error == "ENOSPC" else "Input/output error") in str(answer), where
            answers[f"{call.name} {error}: {'saved' if answer == 'saved' else 'refused'}"] += 1
            assert victim.ask(3, "third") == "saved", where  # the same process, the next time
        assert sorted(os.listdir(folder)) == [OWNER, "step_00000003"], where
    print(dict(answers))


def test_a_disk_that_takes_its_time_to_sync_only_takes_time(tmp_path: Path) -> None:
    folder, delay_us = tmp_path / "checkpoints", 100_000
    with Victim(save, folder) as victim:
        victim.ask(1, "first")
        with traced(victim.pid, tmp_path / "log", f"fsync,fdatasync:delay_enter={delay_us}"):
            assert victim.ask(2, "second") == "saved"
    assert "(DELAYED)" in (tmp_path / "log").read_text()
    assert attempt_found(folder) == "second"


# --- The process that saves in the background -----------------------------------------------------------------------


class Training:
    """Saves in the background, in a process of its own, as it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, command: str, *arguments: Any) -> Any:
        return getattr(self, command)(*arguments)

    def start(self) -> int:
        """Save step 1, more than once, so that all threads of the writer are there; the writer's process."""
        self.state = state("rows", step=None)
        self.saver = Saver(self.folder, self.state, keep=1)
        for _ in range(3):
            assert self.save(1, "first").fault == ""
        return self.saver.writer_pid

    def save(self, step: int, attempt: str) -> Outcome:
        """How the save of a step ended; the state is gone when the writer still writes it."""
        for part, shards in state("rows", step=step).items():
            for name, shard in shards.items():
                self.state[part][name].tensor.copy_(shard.tensor)
        self._blocked_s = self.saver.save(step, {"said": attempt}) + self.saver.fence()
        for shards in self.state.values():
            for shard in shards.values():
                shard.tensor.fill_(float("nan"))
        outcome = self.saver.wait()
        assert outcome is not None
        return outcome

    def die_with_the_writer(self) -> str:
        """As when the machine is lost: no new writer is started after a killed one."""

        def die(process: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        saving._WriterProcess.start = die  # type: ignore[method-assign, assignment]
        return "will die"

    def writer(self) -> int:
        return self.saver.writer_pid

    def blocked_s(self) -> float:
        """What the last save took of the training's time."""
        return self._blocked_s

    def close(self) -> str:
        self.saver.close()
        return "closed"


def calls_of_the_writer(folder: Path, log: Path) -> list[Call]:
    with Victim(Training(folder)) as victim:
        writer = victim.ask("start")
        with traced(writer, log):
            assert victim.ask("save", 2, "second").fault == ""
    return checked(calls_in(log, folder))


def names_of(calls: list[Call]) -> list[str]:
    """Kinds of calls to kill at. A kill at the opening of a file leaves what one at the call before it leaves, and how
    many openings a thread makes depends on whether it has looked for an earlier commit as well.
    """
    return sorted({call.name for call in calls} - {"openat"})


def threads_beside(pid: int) -> list[int]:
    return sorted({int(name) for name in os.listdir(f"/proc/{pid}/task")} - {pid})


def kills(calls: list[Call], *, main_thread: bool) -> Counter[str]:
    """How many there will be before and after the commit, of those that change the folder."""
    writes_its_file = calls[0].thread
    mine = [call for call in calls if call.name in names_of(calls) and (call.thread == writes_its_file) == main_thread]
    return Counter("before" if call.order <= commit(calls).order else "after" for call in mine)


@pytest.mark.slow
@pytest.mark.parametrize("main_thread", [True, False], ids=["its own file", "the commit"])
def test_a_machine_lost_at_any_call_of_the_writer_has_the_old_or_the_new_checkpoint(
    tmp_path: Path, main_thread: bool
) -> None:
    """The commit is in another thread than the writing, and not always in the same one, so calls have no fixed number:
    the kill comes at the first call of a kind, the second, and so on until there are no more.
    """
    calls = calls_of_the_writer(tmp_path / "dry", tmp_path / "dry.log")
    found: Counter[str] = Counter()
    for name in names_of(calls):
        number = 1
        for attempt in itertools.count():
            folder, log = tmp_path / f"{name} {attempt}" / "checkpoints", tmp_path / f"{name} {attempt}.log"
            with Victim(Training(folder)) as victim:
                writer = victim.ask("start")
                victim.ask("die_with_the_writer")
                kill = f"{name}:signal=KILL:when={number}"
                with traced(writer, log, kill, threads=[writer] if main_thread else threads_beside(writer)):
                    killed = victim.ask("save", 2, "second") is None
            committed = any(is_commit(call) and call.arguments.endswith("= 0") for call in calls_in(log, folder))
            if not killed:
                if main_thread or committed:
                    break  # it has no such call any more
                continue  # the commit came to a new thread, which nobody watched: once more
            if main_thread:  # when its file is there it waits for the commit, and then it only tells its rank
                committed = str(folder) not in log.read_text().splitlines()[-1]
            assert attempt_found(folder) == ("second" if committed else "first"), f"killed at {name} {number}"
            assert_next_save_cleans_up(folder)
            found["after" if committed else "before"] += 1
            number += 1
    print(dict(found))
    expected = kills(calls, main_thread=main_thread)
    if main_thread:
        expected["after"] += 1  # it tells its rank
    assert found == expected


@pytest.mark.slow
def test_a_writer_killed_at_any_call_is_started_again_and_saves(tmp_path: Path) -> None:
    calls = calls_of_the_writer(tmp_path / "dry", tmp_path / "dry.log")
    folder, steps, killed = tmp_path / "checkpoints", itertools.count(2), Counter[str]()
    with Victim(Training(folder)) as victim:
        writer = victim.ask("start")
        for name in names_of(calls):
            for number in itertools.count(1):
                step = next(steps)
                with traced(writer, tmp_path / "log", f"{name}:signal=KILL:when={number}"):
                    outcome = victim.ask("save", step, f"{step}")
                assert outcome.fault == "", f"killed at {name} {number}"
                assert attempt_found(folder) == f"{step}"
                before, writer = writer, victim.ask("writer")
                if writer == before:
                    break
                killed[name] += 1
                step = next(steps)
                assert victim.ask("save", step, f"{step}").fault == ""
                assert sorted(os.listdir(folder)) == [OWNER, f"step_{step:08d}"]
        assert victim.ask("close") == "closed"
    # A thread's own calls are counted, the commit's or those for the rank's file.
    assert killed == {name: max(call.number for call in calls if call.name == name) for name in names_of(calls)}


def test_an_error_at_a_call_of_the_writer_is_tried_again_or_one_clear_line(tmp_path: Path) -> None:
    planned = failures(calls_of_the_writer(tmp_path / "dry", tmp_path / "dry.log"))
    chosen = random.Random(5).sample(planned, 16)  # each takes as long as the writer pauses before it tries again
    answers: Counter[str] = Counter()
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    with Victim(Training(folder)) as victim:
        writer, before = victim.ask("start"), "first"
        for step, (call, error) in zip(range(2, 200, 2), chosen, strict=False):
            with traced(writer, log, f"{call.name}:error={error}:when={call.number}"):
                outcome = victim.ask("save", step, f"{step}")
            where = f"{error} at {call}: {outcome.fault}"
            injected = "(INJECTED)" in log.read_text()  # not if the commit came to another thread than before
            if outcome.fault == "":
                assert attempt_found(folder) == f"{step}", where
            else:
                assert injected, where
                assert "\n" not in outcome.fault, where
                assert ("No space left" if error == "ENOSPC" else "Input/output error") in outcome.fault, where
                assert attempt_found(folder) in (before, f"{step}"), where
            answers[f"{call.name} {error}: {'refused' if outcome.fault else 'saved'}"] += injected
            before = f"{step + 1}"
            assert victim.ask("save", step + 1, before).fault == "", where  # the same writer, the next time
            assert sorted(os.listdir(folder)) == [OWNER, f"step_{step + 1:08d}"], where
        assert victim.ask("writer") == writer
        assert victim.ask("close") == "closed"
    print(dict(answers))
    assert answers.total() >= sum(call.name != "openat" for call, _ in chosen) >= 8


def test_the_writer_needs_no_torch(tmp_path: Path) -> None:
    """It is started beside every rank, and again when it was killed: torch would cost a second and much memory."""
    with Victim(Training(tmp_path / "checkpoints")) as victim:
        writer = victim.ask("start")
        assert "torch" not in Path(f"/proc/{writer}/maps").read_text()
        assert victim.ask("close") == "closed"


def test_training_does_not_wait_for_a_disk_that_takes_its_time_to_sync(tmp_path: Path) -> None:
    folder, delay_us = tmp_path / "checkpoints", 200_000
    with Victim(Training(folder)) as victim:
        writer = victim.ask("start")
        with traced(writer, tmp_path / "log", f"fsync,fdatasync:delay_enter={delay_us}"):
            outcome = victim.ask("save", 2, "second")
        blocked_s = victim.ask("blocked_s")
        assert victim.ask("close") == "closed"
    syncs = (tmp_path / "log").read_text().count("(DELAYED)")
    assert syncs >= 5
    assert outcome.fault == ""
    assert outcome.seconds > 0.9 * syncs * delay_us / 1e6
    assert blocked_s < 0.5 * syncs * delay_us / 1e6  # none, but a busy machine takes its time
    assert attempt_found(folder) == "second"
