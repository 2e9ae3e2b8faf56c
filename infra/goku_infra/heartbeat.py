"""The record a rank writes and operators read: who it is, where it is, and when it last moved.

One small memory-mapped file a rank. A beat is a memory copy, so training can afford one a phase, and it
outlives the process: a killed rank leaves its last word.
"""

import json
import mmap
import os
import socket
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint")
"""Where in a step a rank can be; the metrics and the status page use the same words."""
SLOT_BYTES = 512
HEADER_BYTES = 6


@dataclass(frozen=True)
class Beat:
    """One rank's last sign of life."""

    rank: int
    world_size: int
    host: str
    pid: int
    started_ticks: int
    """Start time of the process in clock ticks since boot: tells it from a later one with its pid."""
    number: int
    """Beats of this process so far."""
    step: int
    """Steps done."""
    phase: str
    beat_s: float
    """Unix time of the beat."""
    monotonic_s: float
    """The host's monotonic clock at the beat: ages on the same host do not jump with its calendar."""


class Heartbeat:
    """Writes one rank's record; a context manager that removes it when the run ends well.

    The file has two slots, written in turn, each with a checksum. So a process killed in the middle of a
    beat, or read in the middle of one, still shows the beat before.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            _remove_ranks_from(folder, world_size)
        self.path = _path(folder, rank)
        self._identity = (rank, world_size, socket.gethostname(), os.getpid(), process_started_ticks(os.getpid()) or 0)
        self._number = 0
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(bytes(2 * SLOT_BYTES))
        temporary.replace(self.path)
        with self.path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 2 * SLOT_BYTES)

    def beat(self, step: int, phase: str) -> None:
        """Say that this rank has done `step` steps and is in `phase`."""
        self._number += 1
        beat = Beat(*self._identity, self._number, step, phase, time.time(), time.monotonic())
        record = json.dumps(tuple(vars(beat).values())).encode()
        start = self._number % 2 * SLOT_BYTES
        self._memory[start : start + HEADER_BYTES + len(record)] = _header(record) + record

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.close()
        if kind is None:
            self.path.unlink(missing_ok=True)


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every rank that has written one, by rank."""
    beats = [_read(path) for path in sorted(folder.glob("rank_*")) if not path.suffix]
    return [beat for beat in beats if beat is not None]


def process_started_ticks(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None if it has ended, reaped or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(beat: Beat) -> bool | None:
    """Whether the beat's process still runs; None if it is on another host."""
    if beat.host != socket.gethostname():
        return None
    return process_started_ticks(beat.pid) == beat.started_ticks


def to_json(beat: Beat) -> dict[str, object]:
    """The beat with what an operator asks first: is it alive, and how old is its last sign."""
    here = beat.host == socket.gethostname()
    age_s = time.monotonic() - beat.monotonic_s if here else time.time() - beat.beat_s
    fields = asdict(beat)
    del fields["monotonic_s"]
    return {**fields, "alive": is_alive(beat), "age_s": round(age_s, 3)}


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}"


def _remove_ranks_from(folder: Path, world_size: int) -> None:
    """Records of an earlier, larger start of this run would be ranks that nobody waits for."""
    for path in folder.glob("rank_*"):
        if not path.suffix and path >= _path(folder, world_size):
            path.unlink(missing_ok=True)


def _header(record: bytes) -> bytes:
    return len(record).to_bytes(2, "little") + zlib.crc32(record).to_bytes(4, "little")


def _read(path: Path) -> Beat | None:
    """The newest whole beat in a file; None before the first one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    beats = [_parse(data[start : start + SLOT_BYTES]) for start in (0, SLOT_BYTES)]
    return max((beat for beat in beats if beat is not None), key=lambda beat: beat.number, default=None)


def _parse(slot: bytes) -> Beat | None:
    length = int.from_bytes(slot[:2], "little")
    record = slot[HEADER_BYTES : HEADER_BYTES + length]
    if not length or slot[:HEADER_BYTES] != _header(record):
        return None
    return Beat(*json.loads(record))
