"""The folder of a node's agent in memory: heartbeats, orders to ranks, their stacks, the fork server's socket.

It has one name for all agents of the node in this run, and whoever keeps them removes it at the end: nothing is left
for good of an agent that was killed.
"""

import hashlib
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path


def scratch_folder(run_dir: Path, node: str) -> Path:
    """Where it is: on this node, in memory where that can be."""
    key = hashlib.sha256(f"{run_dir.resolve()} {node}".encode()).hexdigest()[:16]
    base = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    return Path(base, f"goku-agent-{os.getuid()}-{key}")


def fresh_scratch_folder(run_dir: Path, node: str) -> Path:
    """The folder, empty."""
    remove_scratch_folder(run_dir, node)
    folder = scratch_folder(run_dir, node)
    folder.mkdir(mode=0o700)
    return folder


def name_semaphores_after(folder: Path) -> None:
    """Let this process's semaphores, which torch elastic makes for every rank, be known for the folder's."""
    multiprocessing.current_process()._config["semprefix"] = f"/{folder.name}"  # type: ignore[attr-defined]


def remove_scratch_folder(run_dir: Path, node: str) -> None:
    """Remove the folder with all that is in it, and the semaphores that a killed agent has left."""
    folder = scratch_folder(run_dir, node)
    shutil.rmtree(folder, ignore_errors=True)
    for semaphore in folder.parent.glob(f"sem.{folder.name}-*"):
        semaphore.unlink(missing_ok=True)
