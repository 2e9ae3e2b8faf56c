"""`goku-mega WORDS` on ranks of the fork server, which has imported torch: seconds quicker than torchrun."""

import os
import sys
from pathlib import Path

from launch import Running, start_ranks


def start_command(words: list[str], ranks: int, output: Path, *, timeout_s: float = 240) -> Running:
    """Start it and return at once; `results()` are the exit codes, and `output` gets what all ranks print."""
    output.unlink(missing_ok=True)
    return start_ranks(_run, ranks, words, str(output), timeout_s=timeout_s)


def run_command(words: list[str], ranks: int, output: Path, *, timeout_s: float = 240) -> str:
    """Run it to its good end; what all ranks printed."""
    codes = start_command(words, ranks, output, timeout_s=timeout_s).results()
    assert codes == [0] * ranks, output.read_text()
    return output.read_text()


def _run(rank: int, words: list[str], output: str) -> int:
    from goku_mega import cli

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (sys.stdout, sys.stderr):
        os.dup2(descriptor, standard.fileno())
    code = cli.main(words)
    sys.stdout.flush()
    return code
