"""Where a process stands, written down before it is killed: /proc always, Python's stacks by what is at hand.

py-spy reads them from outside (also of a stopped process); a process that registered
`heartbeat.STACKS_SIGNAL` writes them itself; where neither works, gdb is asked. Native ones are a second step, for
those at fault: reading torch's symbols takes a second of CPU for each process. Every tool has its share of
the time and none may raise: half an answer in time is worth more than a whole one after the restart.
"""

import contextlib
import linecache
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from goku_infra.diagnosis import flight_record
from goku_infra.heartbeat import STACKS_SIGNAL

logger = logging.getLogger(__name__)

PROC_FILES = ("stat", "status", "wchan", "syscall", "stack", "cmdline")
PROC_LINES = 60
STACKS_FILE = ".stacks"
"""How the file ends into which a process writes its stacks itself."""
STOPPED = ("T", "t")
ENDED = ("Z", "X", "-")
SOURCE_MARK = "  # "
"""Between a frame and its line of code."""
FRAME_OF_PY_SPY = re.compile(r"^\s+(?P<function>.+?) \((?P<file>[^()]+):(?P<line>\d+)\)")
FRAME_OF_FAULTHANDLER = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+?)(?:  # |$)')
STACKS = re.compile(r"^(Thread|Current thread) ", re.MULTILINE)
"""How both writers begin a thread's stack."""
POLL_S = 0.005
SETTLED_S = 0.02
"""A file of stacks that has not grown for so long is whole."""
SIGNAL_S = 0.5
"""Longest wait for a process's own dump; one that can write takes milliseconds."""
GDB_WORDS = ("-batch", "-ex", "thread apply all bt 30")
GDB_S = 1.0
"""gdb is not started with less time left: it reads all symbols of torch first."""


def dump(pid: int, folder: Path, rank: int, timeout_s: float) -> str:
    """What is known of a process of this host, in sections headed `== name ==`.

    It is also written to `stacks_rank_NNNNN.txt`, if the disk takes it.
    """
    deadline = time.monotonic() + timeout_s
    state = process_state(pid)
    sections = {"process": f"rank {rank} pid {pid} state {state}"}
    if state not in ENDED:
        sections.update(_proc(pid))
        sections.update(_python_stacks(pid, state, deadline))
        sections["flight recorder"] = "" if state in STOPPED else flight_record.ask(pid, deadline)
    text = "".join(f"== {name} ==\n{text.strip()}\n" for name, text in sections.items())
    _keep(text, file_of(folder, rank))
    return text


def dump_texts(pids: Mapping[int, int], folder: Path, timeout_s: float) -> dict[int, str]:
    """`dump` of many ranks (rank -> pid) at the same time."""
    with ThreadPoolExecutor(max_workers=max(1, len(pids))) as pool:
        waiting = {rank: pool.submit(dump, pid, folder, rank, timeout_s) for rank, pid in pids.items()}
        return {rank: answer.result() for rank, answer in waiting.items()}


def dump_native(pids: Mapping[int, int], folder: Path, timeout_s: float) -> dict[int, str]:
    """Python's frames and the native ones among them of some ranks (rank -> pid), also in `native_rank_NNNNN.txt`."""

    def one(rank: int, pid: int) -> str:
        text = _native(pid, time.monotonic() + timeout_s)
        _keep(text, folder / f"native_rank_{rank:05d}.txt")
        return text

    with ThreadPoolExecutor(max_workers=max(1, len(pids))) as pool:
        waiting = {rank: pool.submit(one, rank, pid) for rank, pid in pids.items()}
        return {rank: answer.result() for rank, answer in waiting.items()}


def file_of(folder: Path, rank: int) -> Path:
    """Where `dump` writes."""
    return folder / f"stacks_rank_{rank:05d}.txt"


def _keep(text: str, path: Path) -> None:
    """In a file, if the disk takes it."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:  # often the very fault that is looked into
        logger.warning("%s cannot be kept: %s", path.name, error)
        with contextlib.suppress(OSError):
            temporary.unlink()


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat; `-` when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "-"


def _proc(pid: int) -> dict[str, str]:
    found = {}
    for name in PROC_FILES:
        try:
            text = Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError as error:
            text = f"({error.strerror})"
        found[f"/proc/{name}"] = "\n".join(text.splitlines()[:PROC_LINES])
    return found


def _python_stacks(pid: int, state: str, deadline: float) -> dict[str, str]:
    spy = _py_spy()
    sections = {}
    if spy:
        half = time.monotonic() + (deadline - time.monotonic()) / 2
        words = [spy, "dump", "--full-filenames", "--pid", str(pid)]
        text = "" if state in STOPPED else _run(words, half)
        if not STACKS.search(text) and half > time.monotonic():
            text = _run([*words, "--nonblocking"], half)  # one that is stopped, by now at the latest, cannot be paused
        sections["py-spy"] = _with_source(text)
    else:
        sections["py-spy"] = "(not installed; install it with `pip install py-spy`)"
    if not STACKS.search(sections["py-spy"]) and state not in STOPPED:
        sections["faulthandler"] = _with_source(_ask_for_dump(pid, deadline))
        wanted = not STACKS.search(sections["faulthandler"]) and deadline - time.monotonic() > GDB_S
        if wanted and shutil.which("gdb"):
            sections["gdb"] = _run(["gdb", *GDB_WORDS, "-p", str(pid)], deadline)
    return sections


def _native(pid: int, deadline: float) -> str:
    if spy := _py_spy():
        return _run([spy, "dump", "--native", "--full-filenames", "--pid", str(pid)], deadline)
    if gdb := shutil.which("gdb"):
        return _run([gdb, *GDB_WORDS, "-p", str(pid)], deadline)
    return "(no tool for native stacks; install py-spy with `pip install py-spy`)"


def _with_source(text: str) -> str:
    """Behind every Python frame, the line of code that it is at."""
    linecache.checkcache()
    return "\n".join(line + _source_of(line) for line in text.splitlines())


def _source_of(line: str) -> str:
    frame = FRAME_OF_PY_SPY.match(line) or FRAME_OF_FAULTHANDLER.match(line)
    source = linecache.getline(frame["file"], int(frame["line"])).strip() if frame else ""
    return f"{SOURCE_MARK}{source}" if source else ""


def _py_spy() -> str | None:
    """In the interpreter's own folder, too: a virtual environment need not be active."""
    beside = Path(sys.executable).parent / "py-spy"
    return shutil.which("py-spy") or (str(beside) if os.access(beside, os.X_OK) else None)


def _run(command: list[str], deadline: float) -> str:
    """What a tool prints, or why it did not."""
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=max(0.05, deadline - time.monotonic()), stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({error})"
    text = done.stdout.decode(errors="replace")
    return text if done.returncode == 0 else f"{text}\n({done.stderr.decode(errors='replace').strip()[:500]})"


def _ask_for_dump(pid: int, deadline: float) -> str:
    """Have the process write its stacks into the file that it opened for them, if it has said that it would."""
    path = flight_record.held_file(pid, STACKS_FILE)  # its name is in no environment that /proc shows
    if path is None or not _catches(pid):
        return "(the process takes no request for its stacks)"
    try:
        start = path.stat().st_size
        os.kill(pid, STACKS_SIGNAL)
    except OSError as error:
        return f"({error})"
    try:
        return _written_since(path, start, min(deadline, time.monotonic() + SIGNAL_S)) or "(no answer)"
    except OSError as error:  # the rank has ended well and cleared up
        return f"({error})"


def _written_since(path: Path, start: int, deadline: float) -> str:
    """What a file says from `start` on, once it has grown and grows no more."""
    size, grown = start, time.monotonic()
    while time.monotonic() < deadline and (size == start or time.monotonic() - grown < SETTLED_S):
        time.sleep(POLL_S)
        if path.stat().st_size != size:
            size, grown = path.stat().st_size, time.monotonic()
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _catches(pid: int) -> bool:
    """Whether the process handles the signal: without a handler it would end the process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (STACKS_SIGNAL - 1) & 1)
