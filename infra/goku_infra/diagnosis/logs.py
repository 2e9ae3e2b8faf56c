"""Why a rank ended, from its exit code and the end of its log: pure text in, a cause of `causes.CAUSES` out.

The text decides where it can, for one exit code has many reasons. A rank that fails because another one has gone away
says so in known words; that is a symptom, and never the cause while a better one is to be had.
"""

import json
import re
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

DETAIL_CHARS = 300
USER_ERROR_CODE = 2
SHELL_SIGNAL_BASE = 128
"""A shell or SLURM reports a signal as this plus its number."""


class Pattern(NamedTuple):
    """Words of a log and what they mean."""

    cause: str
    words: re.Pattern[str]


def _pattern(cause: str, *words: str) -> Pattern:
    return Pattern(cause, re.compile("|".join(words), re.IGNORECASE))


PATTERNS = (
    _pattern(
        "exception",  # an index out of range in a kernel: the code or its data, on any GPU
        "device-side assert",
    ),
    _pattern(
        "device_out_of_memory",
        r"CUDA out of memory\.",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ),
    _pattern(
        "device_error",
        "CUDA error:",
        "uncorrectable (ECC|NVLink) error",
        "ncclUnhandledCudaError",
        r"CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)",
        r"CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED|MAPPING_ERROR)",
        "GPU has fallen off the bus",
        "No CUDA GPUs are available",
        "Unable to determine the device handle for GPU",
    ),
    _pattern("disk_full", "No space left on device", "Disk quota exceeded", r"GB free, and \S+ GB are to be written"),
    _pattern(
        "out_of_memory",
        r"\bMemoryError\b",
        "Cannot allocate memory",
        r"std::bad_alloc",
        r"oom[-_]kill",
        r"Out of memory: Killed process",
        r"Memory cgroup out of memory",
    ),
    _pattern(
        "data_error",
        r"\bDataError\b",
        r"cannot be read at byte \d+",  # goku_mega.data.shards
        r"has a damaged index\.parquet",
        r"(index\.parquet|dataset\.json|null_text\.npy) is missing",
    ),
)
"""What a failed rank says of itself, the surest first."""

LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|ncclRemoteError|ncclSystemError"
    r"|Socket closed|recvValue failed|failed to recv, got 0 bytes|remote process exit|NCCL communicator was aborted"
    r"|Application timeout caused pair closure",
    re.IGNORECASE,
)
"""What a rank says when another has gone away."""

LOST_RANK = "lost another rank"

TIMED_OUT = re.compile(
    r"Timed out waiting \d+ ?ms for|Watchdog caught collective operation timeout"
    r"|\bwatchdog\b.*(timed out|timeout)|timed out after \d+ (milli)?seconds waiting for clients"
    r"|wait timeout after \d+ ?ms",
    re.IGNORECASE,
)
"""What a rank says when another did not come to a collective."""

RANK_PREFIX = re.compile(r"^\s*\[(?:default|rank)?\d+\]:\s?")
"""What torch and its launcher put before each line."""
EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?::\s|$)")
"""How the last lines of a Python traceback begin: the class, then what it says."""
TRACEBACK = "Traceback (most recent call last)"
SAID_AT_THE_END = 40
"""Lines that are searched when a log ends without an exception."""
USER_ERROR = re.compile(r"^goku-mega: (?:rank \d+: )?error: ")
NATIVE_DEATHS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS)


def classify(exit_code: int, last_lines: Sequence[str]) -> tuple[str, str]:
    """The cause of a rank's end and one line about it.

    Args:
        exit_code: as Python has it: negative for a signal; 128 + signal, as a shell has it, is read as the signal.
        last_lines: the end of the rank's log; words of the kernel or of SLURM about its death may be among them.
    """
    lines = _lines(last_lines)
    fault = _fault(fault_record(last_lines))
    if fault:
        return fault
    number = _signal(exit_code)
    if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return _ended_from_outside(number, lines)
    told = _message(lines)
    for cause, words in PATTERNS:
        if words.search(told):
            return cause, _shorten(_line_with(words, told))
    if TIMED_OUT.search(told):
        return "collective_timeout", _shorten(_line_with(TIMED_OUT, told))
    if LOST_PEER.search(told) and number in (None, signal.SIGABRT):
        return "exception", _shorten(f"{LOST_RANK}: {_line_with(LOST_PEER, told)}")
    if number is not None:
        return _died_in_native_code(number, lines)
    if exit_code == 0:
        return "early_exit", "left with exit code 0 before the run was done"
    if exit_code == USER_ERROR_CODE and not _traceback(lines):
        return "bad_input", _shorten(USER_ERROR.sub("", told) or "left with exit code 2")
    if _traceback(lines) or EXCEPTION.match(told):
        return "exception", _shorten(told.splitlines()[0])
    last_words = f"last words: {lines[-1]}" if lines else "no last words"
    return "unknown", _shorten(f"exit code {exit_code}; {last_words}")


def is_symptom(exit_code: int, last_lines: Sequence[str]) -> bool:
    """Whether a rank ended because of another: it lost a connection or waited in vain, or was told to end."""
    cause, detail = classify(exit_code, last_lines)
    if cause == "killed":
        return _signal(exit_code) != signal.SIGKILL
    return cause == "collective_timeout" or detail.startswith(LOST_RANK)


def fault_record(last_lines: Sequence[str]) -> dict[str, Any]:
    """The JSON object with a "fault" that training leaves as its last line (see goku_mega.errors); {} if none."""
    last = _lines(last_lines)[-1:]
    try:
        said = json.loads(last[0]) if last and last[0].startswith("{") else {}
    except ValueError:
        return {}
    return said if "fault" in said else {}


def _lines(last_lines: Sequence[str]) -> list[str]:
    return [RANK_PREFIX.sub("", line).rstrip() for line in last_lines if line.strip()]


def _fault(said: dict[str, Any]) -> tuple[str, str] | None:
    if said.get("fault") == "nan_loss":
        where = "in the loss of some ranks" if said.get("ranks") else "in the loss of all ranks, or in gradients only"
        return "nan_loss", f"not finite at step {said.get('step')}, data step {said.get('data_step')}, {where}"
    if said.get("fault") == "corruption":
        ranks = ", ".join(map(str, said.get("ranks", []))) or "unknown"
        return "corruption", f"state or arithmetic differs from the replicas at step {said.get('step')}; rank: {ranks}"
    return None


def _signal(exit_code: int) -> signal.Signals | None:
    number = -exit_code if exit_code < 0 else exit_code - SHELL_SIGNAL_BASE
    try:
        return signal.Signals(number) if number > 0 else None
    except ValueError:
        return None


def _ended_from_outside(number: signal.Signals, lines: list[str]) -> tuple[str, str]:
    out_of_memory = next(pattern.words for pattern in PATTERNS if pattern.cause == "out_of_memory")
    evidence = [line for line in lines if out_of_memory.search(line)]
    if number == signal.SIGKILL and evidence:
        return "out_of_memory", _shorten(evidence[-1])
    return "killed", f"{number.name} from outside"


def _died_in_native_code(number: signal.Signals, lines: list[str]) -> tuple[str, str]:
    cause = "crashed" if number in NATIVE_DEATHS else "killed"
    words = [line for line in lines if line.startswith(("Fatal Python error", "terminate called", "  what():"))]
    return cause, _shorten(number.name + (f": {words[-1].strip()}" if words else ""))


def _message(lines: list[str]) -> str:
    """The last error that a log tells, with the lines that belong to it; else its last lines.

    What was said before the last error does not count: a save that failed on a full disk did not end the rank that
    went on for an hour.
    """
    lines = [line for line in lines if not line.startswith("frame #")]  # of C++: long, and says nothing for us
    starts = [number for number, line in enumerate(lines) if line.startswith(TRACEBACK)]
    for position in range(starts[-1] + 1 if starts else len(lines), len(lines)):
        if EXCEPTION.match(lines[position]):
            return "\n".join(lines[position:])
    for position in range(len(lines) - 1, -1, -1):
        if USER_ERROR.match(lines[position]):
            return "\n".join(lines[position:])
    return "\n".join(lines[-SAID_AT_THE_END:])


def _traceback(lines: list[str]) -> bool:
    return any(line.startswith(TRACEBACK) for line in lines)


def _line_with(words: re.Pattern[str], text: str) -> str:
    return next((line for line in text.splitlines() if words.search(line)), text)


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= DETAIL_CHARS else line[: DETAIL_CHARS - 3] + "..."
