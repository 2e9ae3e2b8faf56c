"""An fsspec store in memory that fails, is slow or answers short when a test wants it to: `faulty://`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

Rule = Callable[[str, int], "bytes | None"]
"""For a file and the number of the read: raises, or says what is answered instead of the content; None: as it is."""


class FaultyStore(MemoryFileSystem):
    """Counts its reads, and gives each to the rule."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    rule: Rule = staticmethod(lambda path, number: None)
    reads: ClassVar[list[str]] = []
    lock = threading.Lock()

    def cat_file(self, path, start=None, end=None, **kwargs):
        with self.lock:
            self.reads.append(path)
            number = len(self.reads)
        answer = type(self).rule(path, number)
        return super().cat_file(path, start=start, end=end, **kwargs) if answer is None else answer


fsspec.register_implementation("faulty", FaultyStore, clobber=True)


def upload(folder: Path, url: str) -> str:
    """A folder's files under a URL."""
    for path in folder.rglob("*"):
        if path.is_file():
            with fsspec.open(f"{url}/{path.relative_to(folder)}", "wb") as file:
                file.write(path.read_bytes())
    return url


@contextmanager
def reads_meet(rule: Rule) -> Iterator[list[str]]:
    """Let reads meet a rule; yields the files that are read, in their order."""
    FaultyStore.rule, FaultyStore.reads = staticmethod(rule), []
    try:
        yield FaultyStore.reads
    finally:
        FaultyStore.rule = staticmethod(lambda path, number: None)
