"""torch's flight recorder, asked for from outside: which collectives a rank entered last, on gloo as on NCCL.

Only the rank's own process can read it, so a thread of the rank waits at a named pipe, which costs nothing, and writes
the record into a file when somebody writes into the pipe. A rank that is stopped or holds Python's lock is silent.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""Functions of `torch._C._distributed_c10d` that give a record: of gloo; of NCCL, which a torch without CUDA lacks."""
PIPE = ".ask"
RECORD = ".flight"
ANSWER_S = 0.3
POLL_S = 0.005
KEPT = 3
"""Newest entries of each process group that are kept: the record goes over the network."""


def recorders(module: Any) -> list[Callable[[], bytes]]:
    """What this torch has of `RECORDERS`; `module` is `torch._C._distributed_c10d`."""
    return [getattr(module, name) for name in RECORDERS if hasattr(module, name)]


def offer(path: Path, *records: Callable[[], bytes]) -> None:
    """In a rank: from now on, answer requests at `path` + `.ask` with these flight records, each JSON in one line."""
    pipe = path.with_suffix(PIPE)
    with contextlib.suppress(FileExistsError):
        os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR)  # also for writing: its end never comes
    threading.Thread(target=_answer, args=(descriptor, path, records), name="flight record", daemon=True).start()


def ask(pid: int, deadline: float) -> str:
    """The newest entries of a process's flight record, as JSON; empty if it offers none or does not answer.

    Args:
        deadline: on the monotonic clock.
    """
    pipe = held_file(pid, PIPE)
    if pipe is None:
        return ""
    path = pipe.with_suffix(RECORD)
    before = _stamp(path)
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        os.write(descriptor, b"?")
        os.close(descriptor)
    except OSError:
        return ""
    deadline = min(deadline, time.monotonic() + ANSWER_S)
    while _stamp(path) == before:
        if time.monotonic() > deadline:
            return ""
        time.sleep(POLL_S)
    return _newest(path.read_bytes())


def held_file(pid: int, suffix: str) -> Path | None:
    """The file with this suffix that a process of this host holds open."""
    try:
        targets = [Path(os.readlink(link)) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return None
    return next((target for target in targets if target.suffix == suffix), None)


def _answer(descriptor: int, path: Path, records: Sequence[Callable[[], bytes]]) -> None:
    while os.read(descriptor, 64):
        lines = []
        for record in records:
            with contextlib.suppress(Exception):  # a recorder that fails leaves the other's record
                lines.append(record())
        temporary = path.with_suffix(f"{RECORD}.tmp")
        with contextlib.suppress(OSError):  # a full disk: the next request may find room
            temporary.write_bytes(b"\n".join(lines))
            temporary.replace(path.with_suffix(RECORD))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _newest(record: bytes) -> str:
    """Of all records, by group and backend: a group may have both, and each counts for itself."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in record.splitlines():
        for entry in json.loads(line).get("entries", []):
            backend = str(entry.get("profiling_name", "")).partition(":")[0]
            groups.setdefault((str(entry["process_group"]), backend), []).append(entry)
    return json.dumps({"entries": [entry for entries in groups.values() for entry in entries[-KEPT:]]})
