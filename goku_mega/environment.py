"""Every environment variable this package reads: the launcher's."""

import os


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
