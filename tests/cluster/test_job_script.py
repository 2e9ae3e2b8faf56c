"""launch/sbatch's job script on real nodes, with a stand-in for goku-ops that writes down how it was called."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import CONTROL, Cluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch/sbatch"
SMALL = ["--gpus-per-node=0"]
AGENT = r"""#!/bin/bash
echo "$(hostname) $*" >> calls
case $1 in
agent) until [[ -e "over" ]]; do sleep 0.1; done; exit "$(cat "over")" ;;
stop) echo 0 > "over.new"; mv over.new over ;;
esac
"""


@pytest.fixture
def folder(cluster, tmp_path) -> Path:
    """A checkout's launch folder with the stand-in; the working folder of jobs."""
    shutil.copytree(SCRIPTS, tmp_path / "launch/sbatch")
    (tmp_path / "bin").mkdir()
    for name, text in (("goku-ops", AGENT), ("goku-mega", "#!/bin/sh\necho 'task: flow'; echo 'run_dir: my run'\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "out/slurm").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def sbatch(cluster, folder) -> Callable[..., str]:
    def sbatch(*words: str, **settings: str) -> str:
        path = f"{folder}/bin:{cluster.environment['PATH']}"
        command = ["sbatch", "--parsable", f"--chdir={folder}", *SMALL, *words]
        environment = {**cluster.environment, "PATH": path, **settings}
        return cluster.exec(CONTROL, command, env=environment, timeout_s=30).strip()

    return sbatch


def calls(folder: Path) -> list[str]:
    return sorted((folder / "calls").read_text().splitlines()) if (folder / "calls").exists() else []


def state(cluster: Cluster, job_id: str) -> str:
    """Such as COMPLETED 0:0: the exit code, and the signal."""
    words = cluster.exec(CONTROL, ["scontrol", "--oneliner", "show", "job", job_id]).split()
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    return f"{fields['JobState']} {fields['ExitCode']}"


def finish(folder: Path, code: int) -> None:
    (folder / "over.new").write_text(f"{code}\n")
    (folder / "over.new").replace(folder / "over")


def test_every_node_gets_the_same_agent_and_the_job_ends_as_the_run_does(cluster, folder, sbatch):
    words = ["a recipe.yaml", "steps=3"]
    settings = {"GOKU_SPARES": "1", "GOKU_MIN_NODES": "2", "GOKU_RANKS_PER_NODE": "4"}
    job_id = sbatch("--nodes=4", "launch/sbatch/train.sbatch", *words, **settings)
    train = "goku-mega train --config a recipe.yaml steps=3"
    agent = f"agent --run-dir my run --nodes 3 --min-nodes 2 --ranks-per-node 4 --check quick -- {train}"
    cluster.wait_for(lambda: calls(folder) == [f"{node} {agent}" for node in cluster.nodes], 15, "four agents")
    finish(folder, 3)
    cluster.wait_for(lambda: state(cluster, job_id) == "FAILED 3:0", 10, "the run's exit code")
    assert "goku-ops status my run" in next((folder / "out/slurm").glob("goku-train-*.log")).read_text()


@pytest.mark.parametrize("size", ["1b", "2b", "8b"])
def test_the_scripts_of_the_sizes_differ_in_nodes_and_recipe(cluster, folder, sbatch, size):
    script = f"launch/sbatch/goku_{size}.sbatch"
    header = next(line for line in (folder / script).read_text().splitlines() if "--nodes=" in line)
    assert int(header.partition("=")[2]) == {"1b": 5, "2b": 9, "8b": 17}[size]
    assert (ROOT / f"launch/recipes/goku_{size}.yaml").exists()
    job_id = sbatch("--nodes=3", "--nodelist=n[1-3]", script, "steps=3")
    train = f"goku-mega train --config launch/recipes/goku_{size}.yaml steps=3"
    agent = f"agent --run-dir my run --nodes 2 --min-nodes 2 --ranks-per-node 8 --check quick -- {train}"
    cluster.wait_for(lambda: calls(folder) == [f"n{number} {agent}" for number in (1, 2, 3)], 15, "three agents")
    finish(folder, 0)
    cluster.wait_for(lambda: state(cluster, job_id) == "COMPLETED 0:0", 10, "the end of the job")


def test_before_its_time_is_up_the_job_saves_and_asks_for_a_requeue(cluster, folder, sbatch):
    job_id = sbatch("--nodes=2", "--nodelist=n[1-2]", "launch/sbatch/train.sbatch", "goku-mega", "train")
    cluster.wait_for(lambda: len(calls(folder)) == 2, 15, "two agents")
    cluster.exec(CONTROL, ["scancel", "--signal=USR1", "--batch", job_id])
    cluster.wait_for(lambda: state(cluster, job_id) == "COMPLETED 0:0", 10, "the end of the job")
    assert calls(folder)[1:2] == ["n1 stop my run --save --requeue"]


def test_a_lost_node_neither_ends_the_job_nor_counts_in_its_exit_code(cluster, folder, sbatch):
    job_id = sbatch("--nodes=3", "--nodelist=n[1-3]", "launch/sbatch/train.sbatch", "goku-mega", "train")
    cluster.wait_for(lambda: len(calls(folder)) == 3, 15, "three agents")
    cluster.power_off("n3")
    cluster.exec("n2", ["scontrol", "update", "nodename=n3", "state=down", "reason=goku: gone"])
    time.sleep(0.5)
    assert state(cluster, job_id).startswith("RUNNING")
    finish(folder, 0)
    cluster.wait_for(lambda: state(cluster, job_id) == "COMPLETED 0:0", 10, "the end of the job")


def test_the_journals_last_word_is_the_jobs_exit_code(cluster, folder, sbatch):
    (folder / "my run/supervisor").mkdir(parents=True)
    finished = '{"seq":9,"kind":"finished","data":{"status":"done","step":3,"reason":"","exit_code":%d}}\n'
    journal = folder / "my run/supervisor/journal.jsonl"
    journal.write_text(finished % 9)  # of the job before
    job_id = sbatch("--nodes=2", "launch/sbatch/train.sbatch", "goku-mega", "train")
    cluster.wait_for(lambda: len(calls(folder)) == 2, 15, "two agents")
    with journal.open("a") as file:
        file.write(finished % 0)
    finish(folder, 137)  # as srun says of a run whose agent was killed on the way
    cluster.wait_for(lambda: state(cluster, job_id) == "COMPLETED 0:0", 10, "the end of the job")


def test_the_last_word_of_the_job_before_is_not_this_jobs(cluster, folder, sbatch):
    (folder / "my run/supervisor").mkdir(parents=True)
    finished = '{"seq":9,"kind":"finished","data":{"status":"done","step":3,"reason":"","exit_code":0}}\n'
    (folder / "my run/supervisor/journal.jsonl").write_text(finished)
    job_id = sbatch("--nodes=2", "launch/sbatch/train.sbatch", "goku-mega", "train")
    cluster.wait_for(lambda: len(calls(folder)) == 2, 15, "two agents")
    finish(folder, 75)  # every agent has crashed
    cluster.wait_for(lambda: state(cluster, job_id) == "FAILED 75:0", 5, "the end of the job")
