"""What `goku_infra.slurm` does to a real SLURM."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import CONTROL, Cluster

from goku_infra.slurm import CREDENTIAL_S, Job, Node

pytestmark = pytest.mark.slow

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def ask(cluster: Cluster, call: str, node: str = CONTROL, prefix: list[str] | None = None) -> Any:
    """The value of `slurm.CALL` on a node; its errors are RuntimeErrors with the name and the message."""
    code = f"from goku_infra import slurm; print(repr(slurm.{call}))"
    answer = cluster.exec(node, [*(prefix or []), sys.executable, "-c", code])
    return eval(answer, {"Job": Job, "Node": Node})


@pytest.fixture
def submit(cluster, tmp_path) -> Callable[..., str]:
    """Submits a script of some lines."""

    def submit(script: str, *options: str) -> str:
        path = tmp_path / "job.sh"
        path.write_text("#!/bin/bash\n" + script + "\n")
        options = (f"--output={tmp_path}/log", "--open-mode=append", *options)
        return ask(cluster, f"submit({str(path)!r}, ['a word'], {options})")

    return submit


def wait_for_state(cluster: Cluster, job_id: str, state: str, timeout_s: float = 15) -> Job:
    def reached() -> Job | None:
        job = ask(cluster, f"job({job_id!r})")
        return job if job.state == state else None

    return cluster.wait_for(reached, timeout_s, f"job {job_id} {state}")


def test_a_job_is_submitted_with_its_words_seen_with_its_nodes_and_limit_and_cancelled(cluster, submit, tmp_path):
    job_id = submit('echo "$1"; sleep 100', "--nodelist=n[1-3]", "--time=30")
    job = wait_for_state(cluster, job_id, "RUNNING")
    assert (job.job_id, job.reason, job.nodes, job.batch_host) == (job_id, "None", ("n1", "n2", "n3"), "n1")
    assert (job.restarts, job.partition, job.account) == (0, "main", "")
    assert job.end_s == pytest.approx(time.time() + 30 * 60, abs=60)
    assert not job.script_lost
    cluster.wait_for(lambda: _text(tmp_path / "log") == "a word\n", 5, "the job's output")
    ask(cluster, f"cancel({job_id!r})")
    wait_for_state(cluster, job_id, "CANCELLED")
    ask(cluster, f"cancel({job_id!r})")  # and again: it has ended
    with pytest.raises(RuntimeError, match="OpsError: .*Invalid job id"):
        ask(cluster, "job('999')")


def test_a_requeued_job_starts_again_at_once_and_runs(cluster, submit, tmp_path):
    job_id = submit("echo start ${SLURM_RESTART_COUNT:-0}; sleep 100", "--nodes=2", "--requeue")
    wait_for_state(cluster, job_id, "RUNNING")
    for restarts in (1, 2, 3):  # SLURM alone: 121 s each. Too early a start would have failed for good.
        begin = time.monotonic()
        ask(cluster, f"requeue({job_id!r})")
        job = wait_for_state(cluster, job_id, "RUNNING")
        assert job.restarts == restarts
        assert CREDENTIAL_S < time.monotonic() - begin < 60
    cluster.wait_for(lambda: "start 3" in _text(tmp_path / "log"), 5, "the last start's output")
    assert [line for line in _text(tmp_path / "log").splitlines() if line.startswith("start")] == [
        f"start {count}" for count in range(4)
    ]


def test_a_job_requeues_itself_and_starts_again_at_once(cluster, submit, tmp_path):
    (tmp_path / "again.py").write_text(
        "import os; from goku_infra import slurm; slurm.requeue(os.environ['SLURM_JOB_ID'])"
    )
    first = f'[[ -n "${{SLURM_RESTART_COUNT:-}}" ]] || {sys.executable} {tmp_path}/again.py'
    begin = time.monotonic()
    job_id = submit(f'echo "start ${{SLURM_RESTART_COUNT:-0}}."\n{first}\nsleep 100', "--nodes=4", "--requeue")
    cluster.wait_for(lambda: _text(tmp_path / "log").endswith("start 1.\n"), 20, "its second start")
    assert time.monotonic() - begin < 60
    assert ask(cluster, f"job({job_id!r})").restarts == 1


def test_a_drain_names_its_reason_and_only_ours_is_undone(cluster):
    ask(cluster, "drain('n4', 'GPU 3 has fallen off the bus')")
    assert ask(cluster, "node('n4')") == Node("n4", "drained", "goku: GPU 3 has fallen off the bus")
    assert not ask(cluster, "node('n4')").usable
    ask(cluster, "drain('n4', 'another')")  # the first finding stays
    assert ask(cluster, "node('n4')").reason.endswith("off the bus")
    assert ask(cluster, "undrain('n4')") is True
    assert ask(cluster, "node('n4')").reason == ""
    cluster.exec(CONTROL, ["scontrol", "update", "nodename=n4", "state=drain", "reason=fan replaced by Ada"])
    ask(cluster, "drain('n4', 'slow')")
    ask(cluster, "mark_down('n4', 'gone')")
    assert ask(cluster, "node('n4')").reason == "fan replaced by Ada"
    assert ask(cluster, "undrain('n4')") is False
    assert not ask(cluster, "node('n4')").usable


def test_a_node_marked_down_leaves_a_job_that_goes_on_without_it_and_comes_back(cluster, submit):
    job_id = submit("sleep 100", "--nodelist=n[1-3]", "--no-kill")
    wait_for_state(cluster, job_id, "RUNNING")
    cluster.power_off("n3")
    begin = time.monotonic()
    ask(cluster, "mark_down('n3', 'no answer since 2 s')", node="n2")
    job = ask(cluster, f"job({job_id!r})")
    assert time.monotonic() - begin < 30  # SLURM alone: SlurmdTimeout and more
    assert (job.state, job.nodes, job.script_lost) == ("RUNNING", ("n1", "n2"), False)
    cluster.boot("n3")
    assert ask(cluster, "undrain('n3')") is True
    cluster.wait_for(lambda: cluster.states()["n3"] == "idle", 20, "n3 idle")


def test_the_other_nodes_of_a_job_outlive_its_batch_host_but_nothing_ends_it(cluster, submit, tmp_path):
    (tmp_path / "work.sh").write_text("for i in {1..40}; do echo $i; sleep 0.1; done")
    step = f"srun --no-kill --kill-on-bad-exit=0 --output={tmp_path}/%N bash {tmp_path}/work.sh"
    job_id = submit(step, "--nodelist=n[1-3]", "--no-kill")
    cluster.wait_for(lambda: all(_text(tmp_path / node) for node in ("n1", "n2", "n3")), 10, "work on all nodes")
    cluster.power_off("n1")
    ask(cluster, "mark_down('n1', 'gone')", node="n2")
    cluster.wait_for(lambda: (tmp_path / "n3").read_text().split()[-1:] == ["40"], 10, "n3 to do all its work")
    assert (tmp_path / "n1").read_text().split()[-1] != "40"
    job = ask(cluster, f"job({job_id!r})")
    assert (job.state, job.nodes, job.batch_host, job.script_lost) == ("RUNNING", ("n2", "n3"), "n1", True)
    ask(cluster, f"cancel({job_id!r})")
    wait_for_state(cluster, job_id, "CANCELLED", 30)  # 14 s: SLURM's stepds look for the dead batch host


def test_who_is_no_administrator_is_told_so_and_changes_nothing(cluster, submit):
    job_id = submit("sleep 100", "--nodes=1", "--requeue")
    for call in ("drain('n4', 'x')", "mark_down('n4', 'x')", f"requeue({job_id!r})", f"cancel({job_id!r})"):
        with pytest.raises(RuntimeError, match="NotPermitted"):
            ask(cluster, call, prefix=NOBODY)
    assert ask(cluster, "node('n4')") == Node("n4", "idle", "")
    assert ask(cluster, f"job({job_id!r})").state in ("PENDING", "RUNNING")


def test_what_slurm_refuses_is_one_line(cluster):
    for call, words in (
        ("node('n9')", "no node n9"),
        ("drain('n9', 'x')", "no node n9"),
        ("submit('/nowhere.sh')", "Unable to open file"),
        ("submit('/dev/null', (), ['--partition=gold'])", "gold|script"),
        ("requeue('999')", "Invalid job id"),
        ("expand_nodes('n[1')", "not a list"),
    ):
        with pytest.raises(RuntimeError, match=f"OpsError: [^\n]*({words})[^\n]*$"):
            ask(cluster, call)
    assert ask(cluster, "expand_nodes('n[1-3,07-09],x4')") == ("n1", "n2", "n3", "n07", "n08", "n09", "x4")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
