"""What `goku-mega checkpoint list` and `verify` answer: plain dictionaries, ready for JSON. No torch here."""

import json
import time
from pathlib import Path
from typing import Any

from goku_mega.checkpoint.manifest import INFO, Found, committed, content_fault, is_checkpoint, size_fault, total_bytes
from goku_mega.errors import CheckpointError


def list_checkpoints(path: Path) -> dict[str, Any]:
    """The checkpoints in a folder of checkpoints or a run folder, newest first.

    Each row: step, path, bytes, intact (names and sizes are right; contents are not read), fault (one line or
    None), world, layout, age_s.

    Raises:
        CheckpointError: there is none.
    """
    rows = [_row(found, size_fault(found.path)) for found in _found(path)]
    return {"folder": str(path), "checkpoints": rows}


def verify(path: Path) -> dict[str, Any]:
    """Read every file of one checkpoint, or of all in a folder, and compare it with its manifest.

    Returns the rows of `list_checkpoints` with `intact` and `fault` by contents, the numbers `intact` and
    `damaged`, and `latest_intact_step` (None if none is).

    Raises:
        CheckpointError: there is no checkpoint.
    """
    rows = [_row(found, content_fault(found.path)) for found in _found(path)]
    intact = [row["step"] for row in rows if row["intact"]]
    return {
        "folder": str(path),
        "checkpoints": rows,
        "intact": len(intact),
        "damaged": len(rows) - len(intact),
        "latest_intact_step": max(intact, default=None),
    }


def _found(path: Path) -> list[Found]:
    if is_checkpoint(path) and path.is_dir():
        named = [found for found in committed(path.parent) if found.path == path]
        return named or [Found(_info(path).get("step", 0), path)]
    inner = path / "checkpoints"
    found = committed(inner if inner.is_dir() else path)
    if not found:
        raise CheckpointError(f"no checkpoint in {path}; give the output folder of `goku-mega train`")
    return found


def _row(found: Found, fault: str | None) -> dict[str, Any]:
    info = _info(found.path)
    saved_at_s = info.get("saved_at_s")
    return {
        "step": found.step,
        "path": str(found.path),
        "bytes": total_bytes(found.path),
        "intact": fault is None,
        "fault": fault,
        "world": info.get("world"),
        "layout": info.get("layout"),
        "age_s": None if saved_at_s is None else round(time.time() - saved_at_s, 1),
    }


def _info(path: Path) -> dict[str, Any]:
    """The checkpoint's info if it can be read: a damaged checkpoint is listed, too."""
    try:
        content = json.loads((path / INFO).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
