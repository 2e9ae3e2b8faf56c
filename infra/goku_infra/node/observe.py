"""What an agent sees of its ranks: their heartbeats, and what the kernel knows of their processes."""

import os
import time
from pathlib import Path
from typing import Any

from goku_infra.heartbeat import Beat

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LAST_LINES = 40
LAST_BYTES = 16 * 1024


def observe(rank: int, local_rank: int, pid: int, started_s: float, beat: Beat | None) -> dict[str, Any]:
    """One rank as a `views.RankView` without its node. `started_s`: monotonic time at which it was started."""
    now = time.monotonic()
    seen: dict[str, Any] = {"rank": rank, "local_rank": local_rank, "pid": pid, **_process(pid)}
    if beat is None:  # it has not come so far: its process is all there is to see
        return {**seen, "phase": "start", "phase_age_s": now - started_s, "alive_age_s": now - started_s}
    return {
        **seen,
        "step": beat.step,
        "phase": beat.phase,
        "phase_age_s": now - beat.monotonic_s,
        "alive_age_s": now - beat.alive_monotonic_s,
        "busy_s": beat.busy_s,
        "waiting_s": beat.waiting_s,
        "committed_step": beat.committed_step,
        "loss": beat.loss,
        "gradient_norm": beat.gradient_norm,
    }


def last_lines(path: Path) -> list[str]:
    """The end of a rank's log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        return []


def _process(pid: int) -> dict[str, Any]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return {"process_state": "-"}
    return {
        "process_state": fields[0],
        "cpu_s": (int(fields[11]) + int(fields[12])) / TICKS_PER_S,
        "delayed_s": _delayed_s(pid),
        "rss_bytes": int(fields[21]) * PAGE_BYTES,
    }


def _delayed_s(pid: int) -> float:
    """How long the main thread was ready to run while no core was free; 0 where the kernel does not count it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
