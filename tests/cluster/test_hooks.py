"""The scripts that SLURM itself starts on a node: no job on an unfit node, nothing of a job left behind."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import CONTROL, Cluster, available

pytestmark = pytest.mark.slow

HOOKS = Path(__file__).parents[2] / "infra/slurm"
FINDING = "disk: 3 GiB free on /local; needs 20 GiB"


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that run the hooks; a node is unfit while the file `unfit_NODE` lies beside them."""
    reason = available()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hooks")
    for script in HOOKS.glob("*.sh"):
        shutil.copy(script, folder)
    settings = [f"Prolog={folder}/prolog.sh", f"Epilog={folder}/epilog.sh", "PrologFlags=Alloc"]
    settings += [f"HealthCheckProgram={folder}/health.sh", "HealthCheckInterval=4", "HealthCheckNodeState=ANY"]
    cluster = Cluster(2, settings=settings)
    conf = cluster.conf.read_text()
    cluster.conf.write_text(conf.replace("batch_sched_delay=0", "batch_sched_delay=0,nohold_on_prolog_fail"))
    (folder / "goku.env").write_text(f"SLURM_CONF={cluster.conf}\nGOKU_OPS={folder}/goku-ops\n")
    (folder / "goku-ops").write_text(
        f'#!/bin/bash\n[[ "$*" == "check-node --quick" ]] || exit 2\n'
        f'[[ ! -e "{folder}/unfit_$SLURMD_NODENAME" && ! -e "{folder}/unfit_$(hostname)" ]] && exit 0\n'
        f'echo "{FINDING}"; echo "and more"; exit 1\n'
    )
    (folder / "goku-ops").chmod(0o755)
    with cluster as running:
        running.hooks = folder  # type: ignore[attr-defined]
        yield running


@pytest.fixture
def unfit(hooked) -> Iterator[Path]:
    yield hooked.hooks / "unfit_n1"
    (hooked.hooks / "unfit_n1").unlink(missing_ok=True)
    hooked.restore()


def reason(cluster: Cluster, node: str) -> str:
    return cluster.exec(CONTROL, ["sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%E"]).strip()


def test_an_unfit_node_is_drained_with_the_finding_before_a_job_starts_there(hooked, unfit, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nhostname\n")
    unfit.touch()
    job_id = hooked.exec(
        CONTROL, ["sbatch", "--parsable", f"--output={tmp_path}/log", "--requeue", str(script)]
    ).strip()
    hooked.wait_for(lambda: hooked.states()["n1"] == "drained", 10, "n1 drained")
    assert reason(hooked, "n1") == f"goku: check-node: {FINDING}"
    assert hooked.states()["n2"] in ("idle", "allocated", "mixed", "completing")
    # The job has not been held: it runs on the fit node.
    hooked.exec(CONTROL, ["scontrol", "update", f"jobid={job_id}", "starttime=now+2"])
    hooked.wait_for((tmp_path / "log").exists, 15, "the job's output")
    hooked.wait_for(lambda: (tmp_path / "log").read_text() == "n2\n", 5, "a run on n2")


def test_the_health_check_drains_and_gives_back_only_what_it_has_drained(hooked, unfit):
    unfit.touch()
    hooked.wait_for(lambda: hooked.states()["n1"] == "drained", 15, "n1 drained")
    unfit.unlink()
    hooked.wait_for(lambda: hooked.states()["n1"] == "idle", 15, "n1 idle")
    for theirs in ("fan replaced by Ada", "goku: rank 3 computes other numbers than its replicas"):
        hooked.exec(CONTROL, ["scontrol", "update", "nodename=n1", "state=drain", f"reason={theirs}"])
        unfit.touch()
        hooked.exec("n1", [str(hooked.hooks / "health.sh")])
        unfit.unlink()
        hooked.exec("n1", [str(hooked.hooks / "health.sh")])
        assert reason(hooked, "n1") == theirs


def test_what_a_job_leaves_behind_is_ended_and_other_processes_are_not(hooked, unfit, tmp_path):
    other = hooked.popen("n1", ["sleep", "2000"])
    files = "mkdir -p /dev/shm/goku-agent-x; echo $! > /dev/shm/goku-agent-x/pid"
    # setsid twice over: neither the process group nor the parent tells that it belongs to the job.
    leave = f"setsid --fork setsid --fork sleep 1000 <&- >&- 2>&-; sleep 0.2; {files}"
    hooked.exec(CONTROL, ["srun", "--nodelist=n1", "bash", "-c", leave])
    hooked.wait_for(lambda: "sleep 1000" not in hooked.processes("n1").values(), 10, "the end of what was left")
    assert other.poll() is None and "sleep 2000" in hooked.processes("n1").values()
    hooked.wait_for(lambda: hooked.exec("n1", ["ls", "/dev/shm"]) == "", 5, "the agent's files gone")
    other.kill()
