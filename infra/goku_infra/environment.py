"""Every environment variable this package reads: SLURM's, and those that operators set."""

import os


def slurm_job_id() -> str:
    """The present job's number; empty outside of SLURM."""
    return os.environ.get("SLURM_JOB_ID", "")


def slurm_node_name() -> str:
    return os.environ.get("SLURMD_NODENAME", "")


def slurm_node_index() -> int:
    """This node's place in the allocation, from 0."""
    return int(os.environ.get("SLURM_NODEID", "0"))


def slurm_step_nodes() -> str:
    """The nodes of the present step, as SLURM writes them: `n[1-4]`."""
    return os.environ.get("SLURM_STEP_NODELIST", "")


def slurm_restart_count() -> int:
    """How often the present job has been requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def rank() -> str:
    """This process's number among all of the run, as torch elastic gives it."""
    return os.environ["RANK"]


def add(variables: dict[str, str]) -> None:
    """Give variables to this process and to what it starts."""
    os.environ.update(variables)
