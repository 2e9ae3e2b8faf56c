"""What befalls nodes, to a real training job on a real SLURM: found, blamed on the right node, repaired, and in the
losses never to be seen.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cluster import CONTROL, Cluster
from parity import write_dataset
from supervised import committed_before, faults_in
from supervised_job import ROOT, SupervisedJob

from goku_infra.record.incidents import Incident, incidents

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

EVERY = 10
GONE = ("link_lost", "node_lost")
"""What a node without power, or without a link, is from afar."""
REFERENCE_STEPS = 150
SETTINGS = (f"checkpoint.every_steps={EVERY}", "data.samples_per_step=6", "optimizer.warmup_steps=2")
NOT_AN_ADMINISTRATOR = """#!/bin/sh
# The owner of a job may hold and requeue it, but what concerns a node is asked by another than SLURM's administrator.
case "$*" in
*nodename=*) exec setpriv --reuid=65534 --regid=65534 --clear-groups {scontrol} "$@" ;;
esac
exec {scontrol} "$@"
"""
BUSY = """#!/bin/sh
# A slurmctld that has no time, and in the end answers nothing.
case "$*" in
*nodename=*) if [ -e {busy} ]; then while [ -e {busy} ]; do sleep 0.1; done; exit 1; fi ;;
esac
exec {scontrol} "$@"
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory) -> dict[int, float]:
    """The losses of a run on one machine that nothing befell, as many ranks as the jobs."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "goku_mega.cli",
        "train", f"run_dir={run_dir}", f"data.path={dataset}", f"steps={REFERENCE_STEPS}", *SETTINGS,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return {row["step"]: row["loss"] for row in _rows(run_dir)}


def start(cluster: Cluster, dataset: Path, run_dir: Path, **sizes: object) -> SupervisedJob:
    return SupervisedJob(cluster, run_dir, [f"data.path={dataset}", "steps=100000", *SETTINGS], **sizes)


def recovered(job: SupervisedJob, number: int) -> Incident:
    """The incident once the run trains again."""
    job.wait_for("incident_closed", incident=number)
    job.wait_for_more_steps(EVERY + 2)
    found = incidents(job.events())
    assert [incident.number for incident in found] == list(range(1, number + 1)), job.story()
    incident = found[-1]
    assert incident.status == "recovered"
    assert incident.resumed_step is not None
    assert incident.resumed_step >= committed_before(job.events(), incident.detected_s), incident
    return incident


def nodes(job: SupervisedJob) -> list[str]:
    """Of the newest generation, in the order of ranks."""
    return job.events("generation_started")[-1].data["nodes"]


def choose(job: SupervisedJob) -> tuple[str, tuple[int, ...], list[str]]:
    """A node that trains, not the first of the job; its ranks; the other nodes that train."""
    training = nodes(job)
    victim = next(node for node in training if node != "n1")
    return victim, (training.index(victim),), [node for node in training if node != victim]


def role(job: SupervisedJob, node: str) -> str:
    state = job.state()
    return next((row["role"] for row in state["nodes"] if row["name"] == node), "") if state else ""


def assert_losses(run_dir: Path, expected: dict[int, float], *, bitwise_until: int | None = None) -> None:
    """Every step once, with the loss of the uninterrupted run."""
    rows = _rows(run_dir)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    common = min(len(rows), len(expected))
    same = common if bitwise_until is None else min(common, bitwise_until)
    assert same > EVERY
    assert [row["loss"] for row in rows[:same]] == [expected[step] for step in range(same)]
    np.testing.assert_allclose(
        [row["loss"] for row in rows[same:common]], [expected[step] for step in range(same, common)], rtol=1e-5
    )


def assert_nothing_is_left(job: SupervisedJob) -> None:
    for node in job.cluster.nodes:
        if job.cluster.is_on(node):
            job.until(lambda node=node: not job.processes(node), f"the end of all on {node}: {job.processes(node)}")
            assert not [name for name in job.cluster.exec(node, ["ls", "/dev/shm"]).split() if "goku" in name]


def test_nodes_links_agents_and_controllers_are_lost_in_one_run(cluster, dataset, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    with start(cluster, dataset, run_dir, nodes=3, spares=1, min_nodes=2) as job:
        job.wait_for_more_steps(EVERY + 5)
        assert len(nodes(job)) == 3
        spare = next(node for node in cluster.nodes if node not in nodes(job))

        # The controller: the ranks do not notice.
        before = len(job.events("controller_started"))
        job.kill_controller()
        job.wait_for("controller_started", before + 1)
        job.wait_for_more_steps(5)
        assert len(job.events("generation_started")) == 1 and not faults_in(job.events())

        # A link: the spare takes over; with the link back the node is the spare, and nothing else happens.
        victim, blamed, others = choose(job)
        cluster.link(victim, up=False)
        job.wait_for("incident_closed")
        cluster.link(victim, up=True)
        incident = recovered(job, 1)
        assert incident.cause in GONE and (incident.node, incident.ranks) == (victim, blamed)
        assert nodes(job) == sorted([*others, spare])
        job.until(lambda: role(job, victim) == "spare", f"{victim} as a spare")
        job.until(lambda: not job.ranks(victim), "the end of its old rank")

        # An agent: its ranks end with it. The next one is there at once, so all four nodes can train.
        victim, blamed, _ = choose(job)
        job.kill_agent(victim)
        incident = recovered(job, 2)
        assert (incident.cause, incident.node, incident.ranks) == ("agent_lost", victim, blamed)
        (idle,) = set(cluster.nodes) - set(nodes(job))
        job.until(lambda: role(job, idle) == "spare", f"{idle} as the spare")

        # The first node: the job's script, and perhaps the controller.
        cluster.power_off("n1")
        incident = recovered(job, 3)
        assert incident.cause in GONE and (incident.node, incident.ranks) == ("n1", (0,))
        assert nodes(job) == ["n2", "n3", "n4"]

        # An agent without a spare: waited for.
        job.kill_agent("n4")
        incident = recovered(job, 4)
        assert (incident.cause, incident.node, incident.ranks) == ("agent_lost", "n4", (2,))
        assert nodes(job) == ["n2", "n3", "n4"]

        # The second node, without a spare, and the controller at the same time: the run shrinks.
        job.kill_controller()
        cluster.power_off("n3")
        incident = recovered(job, 5)
        assert incident.cause in GONE and (incident.node, incident.ranks) == ("n3", (1,))
        assert nodes(job) == ["n2", "n4"]
        shrunk_at = incident.resumed_step

        # Nobody but the controller can end a job whose script is lost.
        job.ops("stop", str(run_dir), "--save", node="n2")
        job.finish("CANCELLED")
        assert_nothing_is_left(job)
    assert_losses(run_dir, uninterrupted, bitwise_until=shrunk_at)


def test_a_run_with_too_few_nodes_or_too_little_time_goes_back_into_the_queue(
    cluster, dataset, uninterrupted, tmp_path
):
    run_dir = tmp_path / "run"
    with start(cluster, dataset, run_dir, nodes=3) as job:
        job.wait_for_more_steps(EVERY + 5)
        victim = nodes(job)[-1]
        cluster.power_off(victim)
        job.wait_for("finished", status="requeued")
        job.wait_for("first_step", 2)
        assert nodes(job) == [node for node in cluster.nodes if node != victim]
        (incident,) = incidents(job.events())
        assert incident.node == victim and incident.ranks == (2,)
        assert cluster.states()[victim].startswith("down")
        assert "goku: " in cluster.exec(CONTROL, ["sinfo", "--noheader", f"--nodes={victim}", "--format=%E"])
        cluster.boot(victim)
        job.wait_for_more_steps(5)

        # The time is nearly up: saved, and gone on where it was.
        cluster.exec(CONTROL, ["scancel", "--signal=USR1", "--batch", job.job_id])
        saved = job.wait_for("finished", count=2, status="requeued").data["step"]
        assert job.wait_for("first_step", 3).data["resumed_from"] == saved
        assert job.slurm()["Restarts"] == "2"
        job.wait_for_more_steps(5)

        # Another job on the same folder is refused in one line, and disturbs nothing.
        cluster.exec(CONTROL, ["scontrol", "update", f"nodename={victim}", "state=resume"])
        cluster.wait_for(lambda: cluster.states()[victim] == "idle", 30, f"{victim} idle")
        with start(cluster, dataset, run_dir, nodes=1) as second:
            assert second.finish("FAILED")["ExitCode"] == "2:0"
            errors = [line for line in second.log.read_text().splitlines() if line.startswith("goku-ops: error")]
            assert len(errors) == 1 and f"is being trained by job {job.job_id}" in errors[0]
        job.wait_for_more_steps(5)
        assert json.loads((job.folder / "settings.json").read_text())["job_id"] == job.job_id

        job.ops("stop", str(run_dir), "--save")
        job.finish("COMPLETED")
        assert len(incidents(job.events())) == 1
        assert_nothing_is_left(job)
    assert_losses(run_dir, uninterrupted)


def test_an_unfit_node_does_not_train_and_a_drain_without_rights_is_asked_for(cluster, dataset, tmp_path):
    run_dir, programs = tmp_path / "run", tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(NOT_AN_ADMINISTRATOR.format(scontrol=shutil.which("scontrol")))
    (programs / "scontrol").chmod(0o755)
    environment = {"PATH": f"{programs}:{cluster.environment['PATH']}", "GOKU_CHECK": "quick"}
    _fill_the_disk(cluster, "n1", run_dir)
    with start(cluster, dataset, run_dir, nodes=2, spares=2, environment=environment) as job:
        job.wait_for_more_steps(3)
        training = nodes(job)
        (spare,) = {"n2", "n3", "n4"} - set(training)
        victim, stays = training[1], training[0]
        job.wait_for("node_joined", node=spare)
        excluded = job.wait_for("node_excluded", node="n1")
        assert "No space left" in excluded.data["reason"]
        first = job.wait_for("request", node="n1").data["request"]

        job.ops("drain", str(run_dir), victim, "its fan stands still", node=stays)
        second = job.wait_for("request", node=victim).data["request"]
        job.wait_for("incident_closed")
        assert nodes(job) == sorted([stays, spare])
        status = job.ops("status", str(run_dir))
        assert "its fan stands still" in status and f"goku-ops approve {run_dir} {second}" in status
        assert "drain" not in cluster.states()[victim]
        job.ops("approve", str(run_dir), str(second))
        assert cluster.states()[victim].startswith("drain")
        job.ops("approve", str(run_dir), str(first), "--refuse")
        assert "drain" not in cluster.states()["n1"]
        job.until(lambda: "goku-ops approve" not in job.ops("status", str(run_dir)), "no open request")

        job.ops("stop", str(run_dir))
        job.finish("COMPLETED")
        assert_nothing_is_left(job)


def test_who_may_drain_does_also_when_the_controller_dies_while_it_asks(cluster, dataset, tmp_path):
    run_dir, programs, busy = tmp_path / "run", tmp_path / "bin", tmp_path / "busy"
    programs.mkdir()
    (programs / "scontrol").write_text(BUSY.format(busy=busy, scontrol=shutil.which("scontrol")))
    (programs / "scontrol").chmod(0o755)
    environment = {"PATH": f"{programs}:{cluster.environment['PATH']}"}
    with start(cluster, dataset, run_dir, nodes=1, spares=1, environment=environment) as job:
        job.wait_for_more_steps(3)
        (victim,) = nodes(job)
        job.wait_for("node_joined", 2)
        (spare,) = {event.data["node"] for event in job.events("node_joined")} - {victim}
        busy.touch()
        job.ops("drain", str(run_dir), victim, "its fan stands still")
        job.wait_for("incident_closed")
        assert nodes(job) == [spare] and not job.events("request")
        controllers = len(job.events("controller_started"))
        job.kill_controller()
        assert not job.events("node_drained")
        busy.unlink()
        job.wait_for("controller_started", controllers + 1)
        job.wait_for("node_drained", node=victim)
        cluster.wait_for(lambda: cluster.states()[victim].startswith("drain"), 20, f"{victim} draining")
        reason = cluster.exec(CONTROL, ["sinfo", "--noheader", f"--nodes={victim}", "--format=%E"]).strip()
        assert reason == "goku: its fan stands still"
        job.ops("stop", str(run_dir))
        job.finish("COMPLETED")


def test_nodes_are_checked_together_and_the_odd_one_stays_out(cluster, dataset, tmp_path):
    """On one node somebody has edited the checkout: alone it is fit, beside the others it is not."""
    run_dir = tmp_path / "run"
    edited, original = tmp_path / "edited.py", ROOT / "goku_mega/seeding.py"
    edited.write_text(original.read_text() + "\n# tried out\n")
    cluster.exec("n2", ["mount", "--bind", str(edited), str(original)])
    asked = {"environment": {"GOKU_CHECK": "full"}, "options": ["--nodelist=n[1-3]"]}
    with start(cluster, dataset, run_dir, nodes=2, spares=1, **asked) as job:
        job.wait_for_more_steps(3)
        assert nodes(job) == ["n1", "n3"]
        excluded = job.wait_for("node_excluded", node="n2")
        assert "goku_mega" in excluded.data["reason"]
        job.ops("stop", str(run_dir))
        job.finish("COMPLETED")
        assert_nothing_is_left(job)


def _fill_the_disk(cluster: Cluster, node: str, folder: Path) -> None:
    """The node finds the folder's disk full, but for the supervisor's part of it."""
    (folder / "supervisor").mkdir(parents=True)
    aside = cluster.local / "aside"
    script = f"""
        mkdir {aside} && mount --bind {folder}/supervisor {aside} && mount -t tmpfs -o size=64k full {folder} &&
        mkdir {folder}/supervisor && mount --bind {aside} {folder}/supervisor
    """
    cluster.exec(node, ["sh", "-c", script])


def _rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
