"""What is asked of SLURM: the only file that speaks to it.

Every answer comes from a format made for programs (`--Format` with separators, `--parsable`), with times in Unix
seconds. Every command has a time limit; what goes wrong is one line.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from goku_infra import environment
from goku_infra.errors import OpsError

LIMIT_S = 20.0
"""For one command: slurmctld may be busy, or moving to its backup."""
UNREACHED = "unable to contact slurm controller"
"""What a command says that has not reached slurmctld: nothing has been done, so it may be said again."""
RETRY_S = 0.5
OUR_MARK = "goku: "
"""Begins the reason of every drain of ours. A drain with another reason is an operator's, and is left alone."""
JOB_FIELDS = ("State", "Reason", "NodeList", "BatchHost", "EndTime", "RestartCnt", "Partition", "Account", "QOS")
REQUEUE_LIMIT_S = 120.0
"""For a job's processes to end: stepds that look for a dead batch host took 15 s."""
CREDENTIAL_S = 1.0
"""SLURM revokes what a job was started with to the second: a start within that second fails for good."""
DENIED = ("invalid user id", "permission denied", "operation not permitted")


class NotPermitted(OpsError):
    """SLURM allows this only to its administrators (or to the owner of the job)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as SLURM sees it."""

    job_id: str
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it waits or has failed; "None" otherwise."""
    nodes: tuple[str, ...]
    """What it has now: a node that is down has left the list of a job with --no-kill."""
    batch_host: str
    """Where the job's script runs, or ran."""
    end_s: float | None
    """Unix time of its limit, or of its end if it has ended; None: no limit, or not started."""
    restarts: int
    """How often it was requeued."""
    partition: str
    account: str
    qos: str

    @property
    def script_lost(self) -> bool:
        """Whether its batch host is gone: its other nodes work on, but no signal warns them of the job's limit.

        Nothing ends such a job either: whoever finishes its work must `cancel` it.
        """
        return self.state == "RUNNING" and self.batch_host not in self.nodes


@dataclass(frozen=True)
class Node:
    """A node as SLURM sees it."""

    name: str
    state: str
    """idle, allocated, mixed, drained, draining, down, ...; without SLURM's marks such as `*` for no response."""
    reason: str
    """Why it is drained or down; empty otherwise."""

    @property
    def usable(self) -> bool:
        """Whether SLURM would start a job there, now or when the present one has ended."""
        return self.state in ("idle", "allocated", "mixed", "completing", "planned", "reserved")


def job(job_id: str) -> Job:
    """A job that runs, waits, or has ended within the last minutes.

    Raises:
        OpsError: SLURM does not know it (any more).
    """
    fields = ",".join(f"{name}:|" for name in JOB_FIELDS)
    answer = _run("squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--Format={fields}")
    values = answer.strip().split("|")
    if len(values) != len(JOB_FIELDS) + 1:
        raise OpsError(f"SLURM does not know job {job_id}")
    state, reason, nodes, batch_host, end, restarts, partition, account, qos = values[:-1]
    end_s = float(end) if end.isdigit() else None
    account, qos = (value.replace("(null)", "") for value in (account, qos))
    return Job(
        job_id=job_id, state=state, reason=reason, nodes=expand_nodes(nodes), batch_host=batch_host, end_s=end_s,
        restarts=int(restarts), partition=partition, account=account, qos=qos,
    )  # fmt: skip


def node(name: str) -> Node:
    """The state of one node.

    Raises:
        OpsError: SLURM has no such node.
    """
    lines = _run("sinfo", "--noheader", "--Node", f"--nodes={name}", "--format=%T|%E").splitlines()
    if not lines:
        raise OpsError(f"SLURM has no node {name}")
    state, _, reason = lines[0].partition("|")  # a line for each partition, all alike
    return Node(name, state.rstrip("*~#!%$@^-+"), "" if reason == "none" else reason)


def answers(limit_s: float = 1.0) -> bool:
    """Whether slurmctld can be reached from here within `limit_s`."""
    try:
        return "is UP" in _run("scontrol", "ping", limit_s=limit_s)
    except OpsError:
        return False


def expand_nodes(node_list: str) -> tuple[str, ...]:
    """The nodes of a list such as `n[1-3,7],m1`, in its order; none for the empty list."""
    if node_list in ("", "(null)", "None"):
        return ()
    names = _run("scontrol", "show", "hostnames", node_list).split()
    if any("[" in name or "]" in name for name in names):
        raise OpsError(f"{node_list!r} is not a list of nodes")
    return tuple(names)


def submit_command(script: Path | str, arguments: Sequence[str] = (), options: Sequence[str] = ()) -> list[str]:
    """The sbatch command that `submit` runs."""
    return ["sbatch", "--parsable", *options, str(script), *arguments]


def submit(script: Path | str, arguments: Sequence[str] = (), options: Sequence[str] = ()) -> str:
    """Submit a batch script with arguments, under options of sbatch; returns the job's id."""
    return _run(*submit_command(script, arguments, options)).strip().partition(";")[0]


def drain(name: str, reason: str) -> None:
    """Let no further job start on a node; what runs there goes on. A node that is drained already stays as it is.

    Raises:
        NotPermitted: only an administrator may.
        OpsError: SLURM has no such node, or cannot be reached.
    """
    if node(name).usable:
        _update_node(name, "drain", ours(reason))


def mark_down(name: str, reason: str) -> None:
    """Tell SLURM at once that a node is gone: it would find out by itself after SlurmdTimeout.

    A job with --no-kill then goes on without it; any other is requeued. An operator's reason is kept.

    Raises:
        NotPermitted: only an administrator may.
        OpsError: SLURM has no such node, or cannot be reached.
    """
    now = node(name)
    _update_node(name, "down", ours(reason) if now.usable else now.reason or ours(reason))


def undrain(name: str) -> bool:
    """Give a node back that we have drained or marked down; False if it was not us, and nothing is done.

    Raises:
        NotPermitted: only an administrator may.
        OpsError: SLURM has no such node, or cannot be reached.
    """
    if not node(name).reason.startswith(OUR_MARK):
        return False
    _run("scontrol", "update", f"nodename={name}", "state=resume")
    return True


def ours(reason: str) -> str:
    """A reason with the mark by which `undrain` knows it again."""
    return reason if reason.startswith(OUR_MARK) else OUR_MARK + reason


def cancel(job_id: str) -> None:
    """End a job and its processes. One that has ended is no error."""
    _run("scancel", job_id)


def requeue(job_id: str) -> None:
    """End a job and start it again, under its id, as soon as there are nodes for it.

    SLURM itself starts a requeued job only 121 s later. Asked from outside, this waits until the job may start and
    has it start now (some seconds). A process of the job itself does not live to see that: it leaves the second half
    to a small job of its own, and ends. Should that job never run, SLURM's 121 s hold.

    Raises:
        NotPermitted: the job is another user's.
        OpsError: SLURM does not know the job, was not allowed to requeue it (`sbatch --requeue`), or did not end it.
    """
    inside = environment.slurm_job_id() == job_id
    if inside:
        with suppress(OpsError):  # then SLURM's own delay it is
            _submit_hastening(job(job_id))
    _run("scontrol", "requeue", job_id)
    if not inside:
        hasten(job_id)


def hasten(job_id: str) -> None:
    """Wait until a job that is being requeued has ended, and have it start now instead of after SLURM's delay.

    Raises:
        OpsError: it has not ended in time, or SLURM does not know it.
    """
    end = time.monotonic() + REQUEUE_LIMIT_S
    while (now := job(job_id)).state != "PENDING":
        if time.monotonic() > end:
            raise OpsError(f"job {job_id} is still {now.state} {REQUEUE_LIMIT_S:.0f} s after its requeue")
        time.sleep(0.1)
    time.sleep(CREDENTIAL_S)
    _run("scontrol", "update", f"jobid={job_id}", "starttime=now")


def _submit_hastening(job: Job) -> None:
    """A job of one task that calls `hasten`; it waits in the queue for a place, at the latest for the job's own."""
    options = ["--job-name=goku-requeue", "--nodes=1", "--ntasks=1", "--time=5", "--output=/dev/null", "--no-requeue"]
    options += [f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(job, name))]
    _run("sbatch", "--parsable", *options, f"--wrap={sys.executable} -m goku_infra.slurm {job.job_id}")


def _update_node(name: str, state: str, reason: str) -> None:
    _run("scontrol", "update", f"nodename={name}", f"state={state}", f"reason={reason}")


def _run(program: str, *arguments: str, limit_s: float | None = None) -> str:
    """What a command of SLURM writes to stdout."""
    limit_s = LIMIT_S if limit_s is None else limit_s
    if shutil.which(program) is None:
        raise OpsError(f"{program} is not installed here; run this on a node of the SLURM cluster")
    # Its own words in English, and times as Unix seconds, whatever the operator's settings are.
    command = ["env", "LC_ALL=C", "SLURM_TIME_FORMAT=%s", program, *arguments]
    end = time.monotonic() + limit_s
    while True:
        left_s = max(0.0, end - time.monotonic())
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left_s, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise OpsError(f"{program} did not answer within {limit_s:.0f} s; is slurmctld up?") from None
        if not done.returncode or UNREACHED not in done.stderr.lower() or time.monotonic() + RETRY_S > end:
            break
        time.sleep(RETRY_S)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        kind = NotPermitted if any(word in said.lower() for word in DENIED) else OpsError
        raise kind(f"{program} {' '.join(arguments)}: {said}")
    return done.stdout


if __name__ == "__main__":
    hasten(sys.argv[1])
