"""Files that appear with all their bytes, by a rename, whatever is killed when; and the hash of all their bytes."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

BLOCK_BYTES = 8 * 2**20
TEMPORARY = ".tmp"
"""How the name of a file ends that is not whole yet."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears with all its bytes."""
    with appearing(path) as file:
        file.write(data)


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A file under a name of this process's own until all of it is on the disk."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """A name that no other process, on this node or another, gives."""
    return f".{name}.{platform.node()}.{os.getpid()}{TEMPORARY}"


def xxh3_of(path: str | Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
