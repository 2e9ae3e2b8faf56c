"""Every environment variable this package reads: the launcher's, and the supervisor's (GOKU_*)."""

import functools
import importlib.metadata
import os
import subprocess
from pathlib import Path


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes on this host; all of the job's where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def master_address() -> str:
    """The host of rank 0, as every rank reaches it."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def heartbeats() -> Path | None:
    """The folder on this node in which the supervisor's agent looks for heartbeats; None: the run's own."""
    folder = os.environ.get("GOKU_HEARTBEATS")
    return Path(folder) if folder else None


def generation() -> int:
    """Which start of the ranks this is, by the supervisor's count; 0 without one."""
    return int(os.environ.get("GOKU_GENERATION", "0"))


def stacks_file() -> Path | None:
    """Where the supervisor's agent looks for this rank's stacks."""
    file = os.environ.get("GOKU_STACKS")
    return Path(file) if file else None


@functools.cache
def code_version() -> str:
    """The version of this package, and in a checkout the commit: `0.1.0 3f2a91c`, with `+` if files were changed."""
    folder = Path(__file__).parent
    try:
        version = importlib.metadata.version("goku-mega")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return f"{version} {commit}".strip()
