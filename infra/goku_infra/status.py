"""What the ranks of a run are doing, as a table for people and as JSON for tools."""

from pathlib import Path
from typing import Any

from goku_infra.heartbeat import Beat, read_beats, to_json

COLUMNS = ("rank", "host", "pid", "alive", "step", "phase", "age_s")


class StatusError(Exception):
    """The run folder cannot be read; one line says why."""


def status(run_dir: Path) -> dict[str, Any]:
    """Every rank's last beat, how many are alive, and which ranks of the newest start have not spoken yet.

    A run that has ended well has no ranks.

    Raises:
        StatusError: no rank has ever written there.
    """
    folder = run_dir / "heartbeats"
    if not run_dir.is_dir():
        raise StatusError(f"{run_dir} is not a folder; give the run_dir of a `goku-mega train`")
    if not folder.is_dir():
        raise StatusError(f"{run_dir} has no heartbeats; give the run_dir of a `goku-mega train` that has started")
    beats = read_beats(folder)
    ranks = [to_json(beat) for beat in beats]
    world_size = max(beats, key=lambda beat: beat.beat_s).world_size if beats else 0
    return {
        "run_dir": str(run_dir),
        "world_size": world_size,
        "alive": sum(rank["alive"] is True for rank in ranks),
        "step": _newest_step(beats),
        "silent_ranks": sorted(set(range(world_size)) - {beat.rank for beat in beats}),
        "ranks": ranks,
    }


def format_table(report: dict[str, Any]) -> str:
    """One line a rank."""
    if not report["ranks"]:
        return f"{report['run_dir']}: no rank is running; the run has ended, or has not taken a step yet"
    rows = [COLUMNS, *(tuple(_cell(rank[name]) for name in COLUMNS) for rank in report["ranks"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if report["silent_ranks"]:
        lines.append(f"no beat yet from rank {', '.join(map(str, report['silent_ranks']))}")
    return "\n".join(lines)


def _newest_step(beats: list[Beat]) -> int | None:
    return max((beat.step for beat in beats), default=None)


def _cell(value: Any) -> str:
    return {True: "yes", False: "no", None: "?"}[value] if value is None or isinstance(value, bool) else str(value)
