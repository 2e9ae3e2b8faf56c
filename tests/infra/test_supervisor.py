"""One machine under the supervisor: what befalls real ranks is found, blamed on the right one and got over.

The first tests break one long run, one fault after the other, and its losses are compared at the end with those of a
run that nothing befell; the others need a run of their own.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty_train import Plan
from parity import write_dataset
from supervised import Supervised, committed_before, environment, faults_in

from goku_infra.record.incidents import Incident

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVERY = 5
HANG_LIMIT_S = 6.0
PAUSE = {"kind": "sleep", "arguments": {"seconds": 0.05}}
"""At every step: so that the long run does not run on far while a test looks at it."""


def settings(run_dir: Path, dataset: Path, *more: str, steps: int = 100_000) -> list[str]:
    return [
        f"run_dir={run_dir}", f"data.path={dataset}", f"steps={steps}", f"checkpoint.every_steps={EVERY}",
        "data.samples_per_step=6", "data.max_tokens_per_rank=300", "optimizer.learning_rate=3e-3",
        "optimizer.warmup_steps=2", "precision=fp32", *more,
    ]  # fmt: skip


def start(run_dir: Path, dataset: Path, *more: str, plan: Plan, **changes: Any) -> Supervised:
    words = [*plan.command, *settings(run_dir, dataset, *more, **changes)]
    return Supervised(run_dir, words, options=("--hang-limit", str(HANG_LIMIT_S)))


def losses(run: Supervised) -> list[float]:
    """By step: every step once, in order."""
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def goku_ops(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "goku_infra.cli", *words], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Broken(Supervised):
    """The long run."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.plan = Plan(folder / "plan.json", PAUSE)
        words = [*self.plan.command, *settings(folder / "run", dataset)]
        super().__init__(folder / "run", words, options=("--hang-limit", str(HANG_LIMIT_S)))

    def plant(self, kind: str, rank: int, **arguments: Any) -> Callable[[], None]:
        """A fault that will strike once, at the next step."""
        return lambda: self.plan.add({"kind": kind, "rank": rank, "times": 1, "arguments": arguments})

    def check(self, fault: Callable[[], Any], cause: str, ranks: tuple[int, ...], count: int = 1) -> Incident:
        """A fault is blamed on the right ranks and costs no step of the newest checkpoint."""
        incident = self.break_by(fault, count=count)
        assert (incident.cause, incident.ranks) == (cause, ranks), self.story()
        self.check_resumed(incident)
        return incident

    def evidence(self, incident: Incident) -> set[str]:
        """Names of the files that are kept of an incident."""
        return {path.name for path in (self.folder / "incidents" / f"{incident.number:04d}").iterdir()}

    def check_resumed(self, incident: Incident) -> None:
        assert incident.resumed_step is not None
        assert incident.resumed_step >= committed_before(self.events(), incident.detected_s), self.story()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def broken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broken]:
    with Broken(tmp_path_factory.mktemp("broken"), dataset) as run:
        yield run


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_rank(broken, rank):
    incident = broken.check(lambda: broken.signal_rank(rank, signal.SIGKILL), "killed", (rank,))
    assert "SIGKILL" in incident.detail


def test_a_stopped_rank(broken):
    pids = {broken.rank_pid(rank) for rank in (0, 1)}
    incident = broken.check(lambda: broken.signal_rank(1, signal.SIGSTOP), "stopped_process", (1,))
    assert incident.detected_s - incident.fault_s <= HANG_LIMIT_S + 10  # the clock of a busy machine's controller
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert {"stacks_rank_00000.txt", "stacks_rank_00001.txt"} <= broken.evidence(incident)


@pytest.mark.parametrize("kind", ["segfault", "abort"])
def test_a_rank_that_crashes_in_native_code(broken, kind):
    broken.check(broken.plant(kind, 1), "crashed", (1,))


def test_a_rank_that_raises(broken):
    assert "planted fault" in broken.check(broken.plant("exception", 1), "exception", (1,)).detail


def test_a_rank_that_leaves_too_early(broken):
    broken.check(broken.plant("leave", 1), "early_exit", (1,))


def test_a_rank_that_holds_pythons_lock(broken):
    incident = broken.check(broken.plant("hold_lock", 1), "locked", (1,))
    kept = broken.evidence(incident)
    assert "native_rank_00001.txt" in kept and "native_rank_00000.txt" not in kept
    assert len(kept) >= incident.evidence > 0


def test_a_rank_that_sleeps_outside_of_collectives(broken):
    incident = broken.check(broken.plant("sleep", 0, seconds=600), "hang", (0,))
    assert "faulty_train.py" in incident.detail


def test_a_rank_in_another_collective(broken):
    incident = broken.check(broken.plant("other_collective", 1), "other_collective", (0, 1))
    assert "rank 1 in" in incident.detail  # of two ranks no one can say which is the odd one


def test_a_loss_that_is_not_finite_once_is_tried_again(broken):
    incident = broken.break_by(broken.plant("spoil", 1))
    broken.check_resumed(incident)
    assert (incident.cause, incident.ranks) == ("nan_loss", (1,))
    assert not broken.events("generation_started")[-1].data["skip_steps"]


def test_a_damaged_newest_checkpoint_is_passed_over(broken):
    def damage_and_kill() -> int:
        broken.until(lambda: len(list(checkpoints.glob("step_????????"))) >= 2, "two checkpoints")
        os.kill(broken.agent_pid(), signal.SIGSTOP)  # so that nothing is saved in between
        for rank in (0, 1):
            broken.signal_rank(rank, signal.SIGKILL)
        *_, older, newest = sorted(checkpoints.glob("step_????????"))
        file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
        os.kill(broken.agent_pid(), signal.SIGCONT)
        return int(older.name.removeprefix("step_"))

    checkpoints = broken.run_dir / "checkpoints"
    before = len(broken.events("incident_closed"))
    broken.wait_until_it_runs()
    intact = damage_and_kill()
    broken.wait_for("incident_closed", before + 1)
    incident = broken.incident()
    assert (incident.cause, incident.resumed_step) == ("killed", intact)
    logs = broken.folder / "logs" / f"g{max(event.generation for event in broken.events()):04d}"
    assert "passed over the checkpoint" in (logs / "rank_00000.log").read_text()


def test_a_killed_controller_costs_no_step(broken):
    broken.wait_until_it_runs()
    state, controllers = broken.state(), len(broken.events("controller_started"))
    pids = {broken.rank_pid(rank) for rank in (0, 1)}
    os.kill(broken.controller_pid(), signal.SIGKILL)
    broken.wait_for("controller_started", controllers + 1)
    broken.wait_for_step(state["step"] + 5)
    assert broken.state()["generation"] == state["generation"] and all(map(psutil.pid_exists, pids))


def test_a_fault_after_the_controller_was_killed(broken):
    broken.check(lambda: broken.signal_rank(0, signal.SIGKILL), "killed", (0,))


def test_a_killed_agent_takes_its_ranks_along(broken):
    pids = {broken.rank_pid(rank) for rank in (0, 1)}
    incident = broken.break_by(lambda: os.kill(broken.agent_pid(), signal.SIGKILL))
    assert (incident.cause, incident.ranks) == ("agent_lost", (0, 1))
    # They are init's now, which may take a moment to let go of the dead.
    broken.until(lambda: not any(map(psutil.pid_exists, pids)), "end of the ranks")
    broken.check_resumed(incident)


def test_a_restart_by_the_operator_saves_first(broken):
    incident = broken.break_by(lambda: goku_ops("restart", str(broken.run_dir)))
    assert incident.cause == "operator" and incident.lost_steps == 0


def test_status_and_incidents_name_the_culprit(broken):
    incident = broken.check(lambda: broken.signal_rank(1, signal.SIGKILL), "killed", (1,))
    for command in (["status"], ["incident", str(incident.number)]):
        assert incident.text in goku_ops(command[0], str(broken.run_dir), *command[1:])
    listed = goku_ops("incidents", str(broken.run_dir)).splitlines()[incident.number]
    assert listed.split()[0] == str(incident.number)
    assert "killed" in listed and f"rank 1 on {socket.gethostname()}" in listed


def test_a_second_run_in_the_same_folder_is_refused(broken):
    done = subprocess.run(broken.words, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is being trained by job" in done.stderr


def test_every_step_was_taken_once_and_as_without_faults(broken, dataset, tmp_path):
    broken.wait_until_it_runs()
    goku_ops("stop", str(broken.run_dir), "--save")
    broken.finish()
    taken = losses(broken)
    assert [row["data_step"] for row in broken.metrics()] == list(range(len(taken)))
    plan = Plan(tmp_path / "plan.json")
    with start(tmp_path / "run", dataset, plan=plan, steps=len(taken)) as run:
        run.finish()
    assert not faults_in(run.events()) and losses(run) == taken


def test_a_rank_that_always_raises_is_a_crash_loop(dataset, tmp_path):
    plan = Plan(tmp_path / "plan.json", {"kind": "exception", "rank": 1, "step": 3})
    with start(tmp_path / "run", dataset, plan=plan) as run:
        output = run.finish(code=93)
    ends = [line for line in output.splitlines() if line.startswith("goku-ops: error:")]
    assert len(ends) == 1 and "crash loop" in ends[0] and "planted fault" in ends[0], output
    assert run.events("finished")[0].data["exit_code"] == 93
    assert [incident.cause for incident in run_incidents(run)] == ["exception"] * len(run.events("incident_opened"))


def run_incidents(run: Supervised) -> list[Incident]:
    return [run.incident(number) for number in range(len(run.events("incident_opened")))]


def test_data_that_the_loss_cannot_bear_is_left_out(dataset, tmp_path):
    """A loss that is never finite at one place of the data; later, one that jumps at another."""
    bad, high = 7, 40
    plan = Plan(
        tmp_path / "plan.json", PAUSE,
        {"kind": "spoil", "rank": 1, "data_step": bad},
        {"kind": "spoil", "data_step": high, "arguments": {"value": 30.0}},
    )  # fmt: skip
    with start(tmp_path / "run", dataset, plan=plan, steps=60) as run:
        run.finish()
        assert [incident.cause for incident in run_incidents(run)] == ["nan_loss", "nan_loss", "loss_spike"]
        assert run.events("generation_started")[-1].data["skip_steps"] == [bad, high - 1, high]
        assert [row["data_step"] for row in run.metrics()] == [s for s in range(63) if s not in (bad, high - 1, high)]
    with start(
        tmp_path / "clean", dataset, f"data.skip_steps=[{bad},{high - 1},{high}]",
        plan=Plan(tmp_path / "none.json"), steps=60,
    ) as clean:  # fmt: skip
        clean.finish()
    assert losses(run) == losses(clean)


def test_a_flipped_bit_is_found_before_it_is_saved(dataset, tmp_path):
    plan = Plan(tmp_path / "plan.json", {"kind": "flip_bit", "rank": 1, "step": 12, "times": 1})
    with start(tmp_path / "run", dataset, "audit.every_steps=2", plan=plan, steps=20) as run:
        run.finish()
    incident = run.incident()
    assert (incident.cause, incident.ranks) == ("corruption", (1,)) and incident.step <= 14
    assert len(run.events("incident_opened")) == 1
    assert len(losses(run)) == 20


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted, which needs root")
def test_a_full_disk_fails_a_save_and_not_the_run(dataset, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(store)], check=True)
    try:
        plan = Plan(tmp_path / "plan.json", PAUSE)
        with start(tmp_path / "run", dataset, f"checkpoint.store={store}/checkpoints", plan=plan, steps=100) as run:
            run.wait_until_it_runs()
            with NoSpace(store / "filler"):
                alert = run.wait_for("alert")
                assert alert.data["text"].startswith("a save failed, 1 in a row")
            before = run.state()["committed_step"]
            run.until(lambda: run.state()["committed_step"] > before, "another save")
            run.finish()
        assert not faults_in(run.events()) and len(losses(run)) == 100
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)


class NoSpace:
    """The file system of a file has no space left while this is entered."""

    def __init__(self, filler: Path) -> None:
        self.filler = filler

    def __enter__(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass

    def __exit__(self, *_: Any) -> None:
        self.filler.unlink()


def test_a_slow_rank_is_named(dataset, tmp_path):
    plan = Plan(tmp_path / "plan.json", {"kind": "sleep", "rank": 1, "arguments": {"seconds": 0.2}})
    with start(tmp_path / "run", dataset, plan=plan) as run:
        opened = run.wait_for("incident_opened")
        assert (opened.data["cause"], opened.data["ranks"]) == ("straggler", [1])
        run.wait_for("incident_closed")
        assert len(run.events("generation_started")) == 1  # there is no spare: nothing would be better
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        run.wait_until_empty()  # nothing outlives the keeper


def test_settings_that_are_refused_end_the_run_with_one_line(dataset, tmp_path):
    with Supervised(tmp_path / "run", Plan(tmp_path / "p.json").command + settings(tmp_path / "run", tmp_path)) as run:
        output = run.finish(code=2)
    errors = [line for line in output.splitlines() if "goku-ops: error:" in line]
    assert len(errors) == 1 and "dataset.json is missing" in errors[0], output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_ends_everything(dataset, tmp_path, number, code):
    with start(tmp_path / "run", dataset, plan=Plan(tmp_path / "plan.json")) as run:
        run.wait_for("first_step")
        run.process.send_signal(number)
        run.finish(code=code)
    assert run.events("finished")[0].data["status"] == "stopped"


def test_a_stop_outlives_the_controller_that_was_asked_for_it(dataset, tmp_path):
    with start(tmp_path / "run", dataset, plan=Plan(tmp_path / "plan.json", PAUSE)) as run:
        run.wait_until_it_runs()
        pid = run.controller_pid()
        agent = psutil.Process(run.agent_pid())
        agent.suspend()  # it hears of the stop from the next controller only
        run.ask("stop", save=True)
        os.kill(pid, signal.SIGKILL)
        agent.resume()
        run.finish()
    assert len(run.events("controller_started")) == 2
    assert run.events("finished")[0].data["status"] == "stopped"
    assert not run.events("incident_opened")
