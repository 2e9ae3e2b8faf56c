"""The record a rank writes and operators read: who it is, where it is, when it last moved, and whether it waits.

One small memory-mapped file a rank. A beat is a memory copy, so training can afford one a phase, and it outlives the
process: a killed rank leaves its last word. Beside the beats, which stand still in a long phase, a thread of the rank
says that the process lives and what its main thread does: at work, or in a wait for other ranks. Its record stands
still when the process is stopped or dead, or when something holds Python's lock.

`Control` is the way back: the agent asks, the ranks read.
"""

import contextlib
import faulthandler
import json
import linecache
import mmap
import os
import random
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

PHASES = ("start", "load", "data", "forward", "backward", "optimizer", "checkpoint", "leave")
"""Where a rank can be; the metrics and the status page use the same words. "start": process groups and the model;
"load": from a checkpoint; "leave": it has ended well and removed its record, its process closes down (no rank says so
itself); the others are the phases of a step."""
SLOT_BYTES = 512
LIVENESS_SLOT_BYTES = 128
FILE_BYTES = 2 * SLOT_BYTES + 2 * LIVENESS_SLOT_BYTES
HEADER_BYTES = 6
LIVENESS_S = 0.05
"""Mean time between two samples of a rank's main thread."""
STACKS_SIGNAL = signal.SIGRTMIN + 1
"""On this signal a rank writes the Python stacks of its threads, even while Python's lock is held."""
WAITS_IN = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
"""Files whose code, as the innermost, is in a collective."""
WAITS_BY = (
    ".wait(", "wait_tensor(", "dist.all_", "dist.broadcast", "dist.barrier", "dist.reduce_scatter",
    ".item()", ".tolist()", "synchronize(",
)  # fmt: skip
"""What a line that is in a collective or waits for one says, whatever its file (FSDP, pipeline stages, our own). The
last three wait for a GPU, and so for the collectives that it has been given; on the CPU they take next to no time."""

Stop = Literal["", "save", "now"]
"""What the ranks are asked for: nothing; to save and leave; to leave."""
STOPS: tuple[Stop, ...] = ("", "save", "now")


@dataclass(frozen=True)
class Beat:
    """One rank's last sign of life."""

    rank: int
    world_size: int
    host: str
    pid: int
    started_ticks: int
    """Start time of the process in clock ticks since boot: tells it from a later one with its pid."""
    generation: int
    """Which start of the ranks it belongs to; 0 without a supervisor."""
    number: int
    """Beats of this process so far."""
    step: int
    """Steps done."""
    phase: str
    loss: float | None
    """Of the last step; not finite or not known: None."""
    gradient_norm: float | None
    committed_step: int
    """Newest checkpoint that this rank knows to be committed; -1: none."""
    beat_s: float
    """Unix time of the beat."""
    monotonic_s: float
    """The host's monotonic clock at the beat: ages on the same host do not jump with its calendar."""
    alive_monotonic_s: float = 0.0
    """The host's monotonic clock when the rank's liveness thread last ran; at the beat where it never has."""
    busy_s: float = 0.0
    """Seconds of the main thread at work since the start, by samples."""
    waiting_s: float = 0.0
    """Seconds of the main thread in collectives and other waits for ranks since the start, by samples."""


class Heartbeat:
    """Writes one rank's record; a context manager that runs the liveness thread, and removes the record when the run
    ends well.

    What is written has two slots, filled in turn, each with a checksum. So a process killed in the middle of a
    beat, or read in the middle of one, still shows the beat before.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, generation: int = 0) -> None:
        """The calling thread is the one whose work and waits are counted."""
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank_{rank:05d}"
        ticks = process_started_ticks(os.getpid()) or 0
        self._identity = (rank, world_size, socket.gethostname(), os.getpid(), ticks, generation)
        self._number = self._samples = 0
        self._loss: float | None = None
        self._gradient_norm: float | None = None
        self._committed_step = -1
        self._phase = "start"
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(bytes(FILE_BYTES))
        temporary.replace(self.path)
        with self.path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), FILE_BYTES)
        self._watched = threading.get_ident()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="heartbeat", daemon=True)

    def beat(
        self,
        step: int,
        phase: str,
        *,
        loss: float | None = None,
        gradient_norm: float | None = None,
        committed_step: int | None = None,
    ) -> None:
        """Say that this rank has done `step` steps and is in `phase`; what is None stays as it was."""
        self._number += 1
        self._phase = phase
        self._loss = self._loss if loss is None else loss
        self._gradient_norm = self._gradient_norm if gradient_norm is None else gradient_norm
        self._committed_step = self._committed_step if committed_step is None else committed_step
        record = (
            *self._identity, self._number, step, phase, self._loss, self._gradient_norm, self._committed_step,
            time.time(), time.monotonic(),
        )  # fmt: skip
        self._write(self._number % 2 * SLOT_BYTES, record)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        self._memory.close()
        if kind is None or self._phase == "start":  # refused before it began, it leaves nothing half-written either
            self.path.unlink(missing_ok=True)
        if self._phase == "start":
            with contextlib.suppress(OSError):  # another rank's record is there, or somebody else's file
                for path in self._made:
                    path.rmdir()

    def _sample(self) -> None:
        """The liveness thread. Samples come at uneven times, so that no rhythm of the steps hides from them."""
        uneven = random.Random(os.getpid())
        last, seconds = time.monotonic(), {True: 0.0, False: 0.0}
        while True:
            frame = sys._current_frames().get(self._watched)
            now = time.monotonic()
            seconds[frame is not None and is_waiting(frame)] += now - last
            del frame  # it would keep the main thread's tensors
            last = now
            self._samples += 1
            start = 2 * SLOT_BYTES + self._samples % 2 * LIVENESS_SLOT_BYTES
            self._write(start, (self._samples, now, seconds[False], seconds[True]))
            if self._ending.wait(LIVENESS_S * uneven.uniform(0.5, 1.5)):
                return

    def _write(self, start: int, record: tuple[Any, ...]) -> None:
        content = json.dumps(record).encode()
        self._memory[start : start + HEADER_BYTES + len(content)] = _header(content) + content


class Control:
    """What the agent of a node asks of its ranks: one byte in their folder, which both map into memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "control", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(file, 1)
            self._memory = mmap.mmap(file, 1)
        finally:
            os.close(file)

    @property
    def stop_requested(self) -> Stop:
        return STOPS[self._memory[0]]

    def request_stop(self, kind: Stop) -> None:
        """Ask the ranks to stop after the step they are in; "" takes it back, before a new start."""
        self._memory[0] = STOPS.index(kind)


def dump_stacks_on_signal(path: Path) -> None:
    """From now on, `STACKS_SIGNAL` appends the Python stacks of this process's threads to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.register(STACKS_SIGNAL, file=path.open("a"), all_threads=True)  # it keeps the file open


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks."""
    name = frame.f_code.co_filename
    if name.endswith(WAITS_IN):
        return True
    line = linecache.getline(name, frame.f_lineno or 0)  # a running frame may have no line at the moment
    return any(words in line for words in WAITS_BY)


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every rank of the newest start that has written one, by rank."""
    found = [_read(path) for path in sorted(folder.glob("rank_*")) if not path.suffix]
    beats = [beat for beat in found if beat is not None]
    if not beats:
        return []
    newest = max(beats, key=lambda beat: beat.beat_s)
    return [beat for beat in beats if beat.generation == newest.generation and beat.rank < newest.world_size]


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
    del fields["monotonic_s"], fields["alive_monotonic_s"]
    alive_age_s = age_s + beat.monotonic_s - beat.alive_monotonic_s
    return {**fields, "alive": is_alive(beat), "age_s": round(age_s, 3), "alive_age_s": round(alive_age_s, 3)}


def _header(record: bytes) -> bytes:
    return len(record).to_bytes(2, "little") + zlib.crc32(record).to_bytes(4, "little")


def _read(path: Path) -> Beat | None:
    """The newest whole beat in a file with the newest sample; None before the first beat."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) != FILE_BYTES:
        return None
    beats = [Beat(*record) for record in _whole(data, 0, SLOT_BYTES)]
    beat = max(beats, key=lambda beat: beat.number, default=None)
    if beat is None:
        return None
    samples = list(_whole(data, 2 * SLOT_BYTES, LIVENESS_SLOT_BYTES))
    _, alive_s, busy_s, waiting_s = max(samples, default=(0, beat.monotonic_s, 0.0, 0.0))
    return replace(beat, alive_monotonic_s=alive_s, busy_s=busy_s, waiting_s=waiting_s)


def _whole(data: bytes, start: int, size: int) -> Iterator[Any]:
    """Of two slots, the records that are whole."""
    for slot in (data[start : start + size], data[start + size : start + 2 * size]):
        length = int.from_bytes(slot[:2], "little")
        record = slot[HEADER_BYTES : HEADER_BYTES + length]
        if length and slot[:HEADER_BYTES] == _header(record):
            yield json.loads(record)
