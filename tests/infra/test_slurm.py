"""The words that SLURM 22.05 really says, recorded on tests/cluster's nodes, and what is made of them.

What is asked of a running SLURM is tested in tests/cluster/test_slurm_commands.py.
"""

import os
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from goku_infra import slurm
from goku_infra.cli import main
from goku_infra.errors import OpsError
from goku_infra.operating import submit

ROOT = Path(__file__).parents[2]
RUNNING = "RUNNING|None|n[1-3]|n1|1795277608|0|main|(null)|(null)|\n"
WAITING = "PENDING|BeginTime|||N/A|1|main|(null)|(null)|\n"
LOST_BATCH_HOST = "RUNNING|None|n[2-3]|n1|1795277608|0|main|research|high|\n"


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Puts a program on PATH that writes a recorded answer, and returns the file of the words it was called with."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def says(program: str, stdout: str = "", stderr: str = "", code: int = 0, delay_s: float = 0) -> Path:
        log = tmp_path / f"{program}.called"
        (tmp_path / program).write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$*" >> {log}\nsleep {delay_s}\nprintf %s {shlex.quote(stdout)}\n'
            f"printf %s {shlex.quote(stderr)} >&2\nexit {code}\n"
        )
        (tmp_path / program).chmod(0o755)
        return log

    return says


@pytest.mark.parametrize(
    ("answer", "hosts", "state", "nodes", "end_s", "lost"),
    [
        (RUNNING, "n1\nn2\nn3\n", "RUNNING", ("n1", "n2", "n3"), 1795277608.0, False),
        (WAITING, "", "PENDING", (), None, False),
        (LOST_BATCH_HOST, "n2\nn3\n", "RUNNING", ("n2", "n3"), 1795277608.0, True),
    ],
)
def test_a_job_is_read_from_squeue(says, answer, hosts, state, nodes, end_s, lost):
    says("scontrol", hosts)
    called = says("squeue", answer)
    job = slurm.job("7")
    assert (job.state, job.nodes, job.end_s, job.script_lost) == (state, nodes, end_s, lost)
    assert job.account == ("research" if lost else "")
    assert "--jobs=7" in called.read_text()


@pytest.mark.parametrize(
    ("answer", "state", "reason", "usable"),
    [
        ("allocated|none\n", "allocated", "", True),
        ("idle*|none\nidle*|none\n", "idle", "", True),  # in two partitions
        ("drained|goku: bad | gpu 3\n", "drained", "goku: bad | gpu 3", False),
        ("draining*|fan\n", "draining", "fan", False),
        ("down*|Not responding\n", "down", "Not responding", False),
    ],
)
def test_a_node_is_read_from_sinfo(says, answer, state, reason, usable):
    says("sinfo", answer)
    node = slurm.node("n1")
    assert (node.state, node.reason, node.usable) == (state, reason, usable)


def test_a_reason_is_marked_as_ours_once(says):
    says("sinfo", "idle|none\n")
    called = says("scontrol")
    slurm.drain("n1", "slow")
    slurm.drain("n1", "goku: slow")
    assert called.read_text().splitlines() == ["update nodename=n1 state=drain reason=goku: slow"] * 2


def test_denials_are_told_apart_from_other_errors(says):
    says("sinfo", "idle|none\n")
    for words in ("slurm_update error: Invalid user id", "Access/permission denied for job 1"):
        says("scontrol", stderr=words + "\n", code=1)
        with pytest.raises(slurm.NotPermitted, match=words.split(":")[-1].strip()):
            slurm.drain("n1", "slow")
    says("scontrol", stderr="slurm_update error: Unable to contact slurm controller (connect failure)\n", code=1)
    with pytest.raises(OpsError, match="Unable to contact") as caught:
        slurm.drain("n1", "slow")
    assert not isinstance(caught.value, slurm.NotPermitted)


def test_a_slurm_that_does_not_answer_or_is_not_there_is_one_line(says, monkeypatch):
    monkeypatch.setattr(slurm, "LIMIT_S", 0.2)
    says("sinfo", delay_s=5)
    with pytest.raises(OpsError, match="did not answer within"):
        slurm.node("n1")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OpsError, match="squeue is not installed here"):
        slurm.job("1")


NOT_REACHED = "slurm_load_partitions: Unable to contact slurm controller (connect failure)"


def test_a_controller_that_was_not_reached_is_asked_again_within_the_limit(says, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "RETRY_S", 0.01)
    called = says("sinfo", stderr=NOT_REACHED, code=1)
    script = (tmp_path / "sinfo").read_text()
    third = f'if [ "$(wc -l < {called})" -ge 3 ]; then echo "idle|none"; exit 0; fi\n'
    (tmp_path / "sinfo").write_text(script.replace("sleep 0\n", third))
    assert slurm.node("n1") == slurm.Node("n1", "idle", "")
    assert called.read_text().count("--nodes=n1") == 3
    monkeypatch.setattr(slurm, "LIMIT_S", 3.0)
    monkeypatch.setattr(slurm, "RETRY_S", 0.5)
    called = says("sinfo", stderr=NOT_REACHED, code=1)
    called.unlink()
    with pytest.raises(OpsError, match="Unable to contact slurm controller"):
        slurm.node("n1")
    assert called.read_text().count("--nodes=n1") > 1


def test_a_job_is_hastened_only_when_it_has_ended_and_its_credential_is_old(says, monkeypatch):
    order = []
    states = iter(["COMPLETING", "COMPLETING", "PENDING"])
    monkeypatch.setattr(slurm, "job", lambda _: type("Job", (), {"state": order.append("look") or next(states)}))
    monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=time.monotonic, sleep=order.append))
    called = says("scontrol")
    slurm.hasten("7")
    assert order == ["look", 0.1, "look", 0.1, "look", slurm.CREDENTIAL_S]
    assert called.read_text() == "update jobid=7 starttime=now\n"


RECIPE = str(ROOT / "launch/recipes/tiny.yaml")
TRAIN = ["python", "-m", "goku_mega.cli", "train", "--config", RECIPE]
SUBMIT = ["submit", "--nodes", "3", "--spares", "1", "--ranks-per-node", "4"]


def test_submit_asks_for_the_nodes_and_the_spares_and_hands_on_the_settings(capsys):
    more = ["--min-nodes", "2", "--time", "1:00:00", "--sbatch=--account=ours", "--dry-run"]
    assert main([*SUBMIT, *more, "--", *TRAIN, "run_dir=out/x", "steps=7"]) == 0
    printed = shlex.split(capsys.readouterr().out)
    script = str(ROOT / "launch/sbatch/train.sbatch")
    assert printed[printed.index(script) + 1 :] == [*TRAIN, "run_dir=out/x", "steps=7"]
    options = printed[: printed.index(script)]
    assert {"--nodes=4", "--gpus-per-node=4", "--time=1:00:00", "--job-name=tiny", "--account=ours"} <= set(options)
    settings = "GOKU_SPARES=1,GOKU_MIN_NODES=2,GOKU_RANKS_PER_NODE=4,GOKU_RUN_DIR=out/x"
    assert f"--export=ALL,{settings}" in options


def test_a_recipe_stands_for_its_training(monkeypatch, capsys):
    checked = []
    monkeypatch.setattr(submit, "check_command", checked.append)  # goku-mega may not be installed here
    monkeypatch.setattr(submit, "run_dir_of", lambda command: Path("out/x"))
    assert main([*SUBMIT, "--dry-run", "some.yaml", "steps=7"]) == 0
    assert checked == [["goku-mega", "train", "--config", "some.yaml", "steps=7"]]
    assert capsys.readouterr().out.endswith(" goku-mega train --config some.yaml steps=7\n")


@pytest.mark.parametrize("run_dir", ["out/a,b", "out/it's"])
def test_a_run_dir_that_sbatch_would_split_is_refused(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(submit, "check_command", lambda command: None)
    monkeypatch.setattr(submit, "run_dir_of", lambda command: Path(run_dir))
    assert main([*SUBMIT, "--dry-run", "some.yaml"]) == 2
    assert capsys.readouterr().err.count(run_dir) == 1


def test_submit_says_where_to_look(says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    called = says("sbatch", "4711;cluster\n")
    assert main([*SUBMIT, "--", *TRAIN, f"run_dir={tmp_path}/run"]) == 0
    assert capsys.readouterr().out == f"job 4711, run_dir {tmp_path}/run\nlook: goku-ops status {tmp_path}/run\n"
    assert f"train.sbatch {' '.join(TRAIN)}" in called.read_text()
    assert (tmp_path / "out/slurm").is_dir()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes", "0", "--", *TRAIN], "--nodes is 0; it must be 1 or more"),
        (["--nodes", "2", "--min-nodes", "3", "--", *TRAIN], "--min-nodes 3 is more than the 2 nodes"),
        (["--nodes", "2"], "no command"),
        (["--nodes", "2", "--", *TRAIN, "stepz=3"], "steps"),  # found before the job waits in the queue
    ],
)
def test_submit_refuses_what_cannot_work_in_one_line(words, says, capsys):
    assert main(["submit", "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
