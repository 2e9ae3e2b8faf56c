"""What the ranks of a run are doing, as a table for people and as JSON for tools."""

from pathlib import Path
from typing import Any

from goku_infra.heartbeat import read_beats, to_json


class StatusError(Exception):
    """The run folder cannot be read; one line says why."""


def status(run_dir: Path) -> dict[str, Any]:
    """Every rank's last beat, and how many are alive.

    Raises:
        StatusError: no such folder, or no rank has written there.
    """
    folder = run_dir / "heartbeats"
    if not folder.is_dir():
        raise StatusError(f"{folder} does not exist; give the run_dir of a `goku-mega train` that has started")
    ranks = [to_json(beat) for beat in read_beats(folder)]
    alive = sum(rank["alive"] is True for rank in ranks)
    return {"run_dir": str(run_dir), "ranks": ranks, "alive": alive}


def format_table(report: dict[str, Any]) -> str:
    """One line a rank."""
    columns = ("rank", "host", "pid", "alive", "step", "phase", "age_s")
    rows = [columns, *(tuple(str(rank[name]) for name in columns) for rank in report["ranks"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
