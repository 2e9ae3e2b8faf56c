"""What `ps` shows of a process that has become something else than what it was started as."""

import ctypes
import sys
from pathlib import Path


def take_name(module: str, *words: str) -> None:
    """Show this process as `python -m MODULE WORDS`, as far as the command line that it was started with has room.

    A forked process otherwise bears the command line of its parent, and nobody could tell them apart. The kernel reads
    command lines out of the processes' own memory (proc(5): arg_start, arg_end), where C programs, too, replace them.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third field on
    start, end = int(fields[48 - 3]), int(fields[49 - 3])
    room = end - start
    if room <= 0:
        return
    line = b"\0".join(word.encode() for word in (sys.executable, "-m", module, *words))
    ctypes.memmove(start, line[: room - 1].ljust(room, b"\0"), room)
