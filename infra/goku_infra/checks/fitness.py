"""Is this node fit to train: what a keeper finds out before it starts an agent.

`quick`: what one node can see within a second. `full`: the job's nodes also compute and reduce together, and all of a
node's own checks are made; that takes as long as the slowest node, a minute at most.
"""

import json
import subprocess
import sys
from pathlib import Path

from goku_infra import environment, slurm
from goku_infra.checks import node_check

LEVELS = ("full", "quick", "off")
JOIN_S = 60.0
"""How long the nodes of a job wait for each other."""
GROUP_LIMIT_S = 300.0
PORTS = range(20_000, 30_000)
"""Where the first node offers the store of the check; which of them follows from the job."""


def reason_against(folder: Path, level: str, job_id: str) -> str:
    """Why this node must not train, in one line; empty: it may."""
    if level == "off":
        return ""
    bad = _group_finding(job_id) if level == "full" else ""
    if not bad:
        checks = node_check.check_node(folder, node_check.read_limits(None), quick=level == "quick")
        bad = next((check.text for check in checks if not check.ok), "")
    return bad


def _group_finding(job_id: str) -> str:
    """What the nodes of this job's step find wrong with this one when they work together."""
    nodes, rank = environment.slurm_step_nodes(), environment.slurm_node_index()
    names = slurm.expand_nodes(nodes)
    if len(names) < 2:
        return ""
    store = f"{names[0]}:{PORTS[int(job_id) % len(PORTS)]}"
    device = "cuda:0" if Path("/proc/driver/nvidia/gpus").exists() else "cpu"
    words = ["--store", store, "--world", str(len(names)), "--device", device, "--timeout", f"{JOIN_S:g}"]
    leader = _start([*words, "--coordinate"]) if rank == 0 else None
    member = _start([*words, "--rank", str(rank)])
    try:
        output, errors = member.communicate(timeout=GROUP_LIMIT_S)
        if leader is not None:
            leader.communicate(timeout=GROUP_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"the check of all nodes together took longer than {GROUP_LIMIT_S:g} s"
    finally:
        for process in (member, leader):
            if process is not None and process.poll() is None:
                process.kill()
    if member.returncode == 0:
        return ""
    if not output.strip():
        return (errors.strip().splitlines() or [f"exit code {member.returncode}"])[-1]
    report = json.loads(output.splitlines()[-1])
    bad, links = report["bad"].get(str(rank)), [link for link in report["links"] if rank in link]
    return f"this node {bad}" if bad else f"the links {links} between the nodes {names} fail"


def _start(words: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "goku_infra.checks.collective_check", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=node_check.INFRA,
    )  # fmt: skip
