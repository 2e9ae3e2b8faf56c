"""Kills, I/O errors and delays at chosen system calls of a running process, by strace's fault injection.

A test forks a `Victim`, lets it do its work once under `traced` to learn which calls touch a folder (`calls_in`), and
then once more for each of those calls with an injection there. Nothing in the victim knows of it.

strace counts the calls of each thread by itself: `when=3` hits whichever traced thread comes to its third call first.
"""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

WRITING = ("openat", "write", "pwrite64", "writev", "pwritev", "fsync", "fdatasync", "ftruncate", "fallocate", "mkdir",
           "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir",
           "sendfile", "copy_file_range")  # fmt: skip
"""The calls by which a save changes a folder: a kill between two others leaves the same files."""

READING = ("read", "pread64", "readv", "preadv", "preadv2", "mmap", "sendfile", "copy_file_range")

LIMIT_S = 120
"""A busy machine takes its time to let a tracer in, and to end a process."""

_LINE = re.compile(r"^(?:(?P<thread>\d+) +)?(?P<call>\w+)\((?P<arguments>.*)$")
_RESUMED = re.compile(r"^(?P<thread>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)$")
_UNFINISHED = " <unfinished ...>"


@dataclass(frozen=True)
class Call:
    """One system call of a traced process."""

    thread: str
    """Its id; empty if only one thread was traced."""
    name: str
    number: int
    """Which of the thread's calls of this name, counted from 1: strace's `when`."""
    order: int
    """Place among all traced calls of all threads."""
    arguments: str
    """As strace prints them, file descriptors with their paths, and the result if there was one."""

    def __str__(self) -> str:
        return f"{self.name} {self.number}: {self.arguments}"


@cache
def unavailable() -> str:
    """Why calls cannot be traced here, as the reason of a skipped test; empty if they can."""
    if sys.platform != "linux" or shutil.which("strace") is None:
        return "strace is not installed: no system call can be made to fail or to kill"
    with Victim(_write_a_line) as victim:
        log = Path(os.devnull)
        try:
            with traced(victim.pid, log, "write:signal=KILL:when=1"):
                if victim.ask() is None:
                    return ""
        except RuntimeError as error:
            return f"strace cannot trace a process here ({error})"
    return "strace's fault injection has no effect here"


def _write_a_line() -> str:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.write(descriptor, b"a line")
    os.close(descriptor)
    return "written"


@contextlib.contextmanager
def traced(
    pid: int, log: Path, *injections: str, calls: tuple[str, ...] = WRITING, threads: Sequence[int] = ()
) -> Iterator[None]:
    """Trace all threads of a process, and those it starts, to `log`, with injections like `fsync:error=EIO:when=3`.

    `threads` limits it to these.

    Raises:
        RuntimeError: strace did not attach; the message is its own.
    """
    command = ["strace", "-y", "-s", "0", "-o", str(log), *([] if threads else ["-f"])]
    for number in threads or [pid]:
        command += ["-p", str(number)]
    command += ["-e", f"trace={','.join(calls)}", "-e", "signal=none"]
    for injection in injections:
        command += ["-e", f"inject={injection}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        try:
            for _ in threads or [pid]:  # it says so of each
                said = strace.stderr.readline()
                if " attached" not in said:
                    raise RuntimeError(said.strip() or "strace ended without a word")
            yield
        finally:
            strace.send_signal(signal.SIGINT)  # it lets the process go, unharmed
            strace.stderr.read()
            strace.wait(LIMIT_S)


def calls_in(log: Path, folder: Path) -> list[Call]:
    """The traced calls that change `folder` or anything inside, in their order."""
    calls: list[Call] = []
    counts: dict[tuple[str, str], int] = {}
    lines = log.read_text(errors="replace").splitlines()
    for order, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None:  # the end of a call that another thread interrupted, or of a process
            continue
        thread, name, arguments = match["thread"] or "", match["call"], match["arguments"]
        number = counts[thread, name] = counts.get((thread, name), 0) + 1
        changes = name != "openat" or "O_WRONLY" in arguments or "O_RDWR" in arguments
        if changes and str(folder) in arguments:
            if arguments.endswith(_UNFINISHED):
                arguments = arguments.removesuffix(_UNFINISHED) + _rest(lines[order + 1 :], thread)
            calls.append(Call(thread, name, number, order, arguments))
    return calls


def _rest(lines: list[str], thread: str) -> str:
    """The end of a call that another thread interrupted in the log; empty if the call never returned."""
    resumed = (match["rest"] for line in lines if (match := _RESUMED.match(line)) and match["thread"] == thread)
    return next(resumed, "")


def bytes_read(log: Path, folder: Path) -> int:
    """What the kernel gave the traced process from the files in `folder`, of the calls in READING.

    Raises:
        ValueError: it mapped one of the files, and what it read there cannot be counted.
    """
    total = 0
    waiting: dict[str, bool] = {}
    for line in log.read_text(errors="replace").splitlines():
        thread, _, call = line.partition(" ")
        ours = waiting.pop(thread, False) if " resumed>" in call else f"<{folder}/" in call
        if ours and call.lstrip().startswith("mmap"):
            raise ValueError(f"what is read through a mapping is not counted: {call}")
        if call.endswith("<unfinished ...>"):
            waiting[thread] = ours
        elif ours and (result := re.search(r" = (\d+)", call)):
            total += int(result[1])
    return total


class Victim:
    """A process that runs `function` whenever it is asked to, until it is killed. A context manager; one at a time.

    It is forked from a process that has imported torch and the function's module, so it starts in milliseconds.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._pipe = _server()
        self._pipe.send((function, arguments))
        self.pid: int = self._receive()
        self._lives = True

    def start(self, *arguments: Any) -> None:
        """Have the function called with these arguments after its own; `wait` for it later."""
        self._pipe.send(arguments)

    def wait(self) -> Any:
        """What the function returned, or the exception it raised; None if the process was killed."""
        answer = self._receive()
        if not isinstance(answer, _Ended):
            return answer.result
        self._lives = False
        if answer.exit_code != -signal.SIGKILL:
            raise RuntimeError(f"the victim ended with exit code {answer.exit_code}")
        return None

    def ask(self, *arguments: Any) -> Any:
        """`start` and `wait`."""
        self.start(*arguments)
        return self.wait()

    def _receive(self) -> Any:
        if not self._pipe.poll(LIMIT_S):
            raise TimeoutError(f"no answer in {LIMIT_S} s")
        return self._pipe.recv()

    def __enter__(self) -> "Victim":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lives:
            os.kill(self.pid, signal.SIGKILL)
            while not isinstance(self._receive(), _Ended):
                pass


@dataclass(frozen=True)
class _Answer:
    result: Any


@dataclass(frozen=True)
class _Ended:
    exit_code: int


@cache
def _server() -> Any:
    """The pipe to the process that victims are forked from. The victim uses it while it lives, and then its parent."""
    context = multiprocessing.get_context("forkserver")
    pipe, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs,), daemon=True).start()
    theirs.close()
    return pipe


def _serve(pipe: Any) -> None:
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _be_a_victim(pipe, function, arguments)
        _, status = os.waitpid(child, 0)
        pipe.send(_Ended(os.waitstatus_to_exitcode(status)))


def _be_a_victim(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _let_any_process_trace()
    pipe.send(os.getpid())
    while True:
        try:
            more = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = _Answer(function(*arguments, *more))
        except Exception as error:
            answer = _Answer(error)
        pipe.send(answer)


def _let_any_process_trace() -> None:
    """Where the Yama module lets only a parent trace its child, strace is neither; the victim itself may allow it."""
    import ctypes

    pr_set_ptracer, anyone = 0x59616D61, -1
    ctypes.CDLL(None).prctl(pr_set_ptracer, anyone, 0, 0, 0)
