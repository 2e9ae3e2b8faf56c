"""What `goku-mega checkpoint list`, `inspect`, `verify` and `prune` answer: plain dictionaries, ready for JSON.

Only `verify` and `prune` read the tensors' files; `list` and `inspect` read the small ones. No torch here.
"""

import fnmatch
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from goku_mega.checkpoint.commit import delete
from goku_mega.checkpoint.index import BLOCK_BYTES, ITEM_BYTES, Index, StoredTensor, block_digests, digest_file
from goku_mega.checkpoint.manifest import (
    INDEX,
    INFO,
    Found,
    committed,
    is_checkpoint,
    read_checked,
    read_manifest,
    run_checkpoints,
    size_fault,
    total_bytes,
)
from goku_mega.checkpoint.progress import byte_progress
from goku_mega.checkpoint.retention import Kept, Retention, kept_as, retired
from goku_mega.checkpoint.storage import Folder, open_folder
from goku_mega.config.checkpoints import CheckpointFolder, InspectConfig, PruneConfig
from goku_mega.errors import CheckpointError

AT_ONCE = 16
"""Checkpoints that are looked at, or pieces that are read, side by side."""
PIECE_BYTES = 8 * BLOCK_BYTES
"""What one thread reads and checks of a file at a time."""

Row = dict[str, Any]


def list_checkpoints(config: CheckpointFolder) -> dict[str, Any]:
    """The checkpoints in a folder of checkpoints or a run folder, newest first.

    Each row: step, path, bytes, intact (names and sizes are right; contents are not read), fault (one line or
    None), world, layout, age_s, loss (mean since the checkpoint before), kept_as (by which rules of its run's recipe).

    Raises:
        CheckpointError: there is none.
    """
    found = _found(config.path)
    return {"folder": config.path, "checkpoints": _rows(found, [None] * len(found))}


def verify(config: CheckpointFolder) -> dict[str, Any]:
    """Read every file of one checkpoint, or of all in a folder, and compare it with its manifest.

    Returns the rows of `list_checkpoints` with `intact` and `fault` by contents, the numbers `intact` and
    `damaged`, and `latest_intact_step` (None if none is).

    Raises:
        CheckpointError: there is no checkpoint.
    """
    found = _found(config.path)
    rows = _rows(found, content_faults([one.folder for one in found]))
    intact = [row["step"] for row in rows if row["intact"]]
    return {
        "folder": config.path,
        "checkpoints": rows,
        "intact": len(intact),
        "damaged": len(rows) - len(intact),
        "latest_intact_step": max(intact, default=None),
    }


def inspect(config: InspectConfig) -> dict[str, Any]:
    """What a checkpoint holds: its parts, its files, the run it is of, and the tensors that match `config.tensors`.

    Raises:
        CheckpointError: there is none, or its lists are damaged.
    """
    found = _found(config.path)
    chosen = next((one for one in found if size_fault(one.folder) is None), found[0])
    files = read_manifest(chosen.folder)
    if INDEX not in files:
        raise CheckpointError(f"{chosen.folder} has no {INDEX}: another version of goku_mega wrote it")
    index = Index.from_bytes(read_checked(chosen.folder, INDEX, files[INDEX]))
    info = _info(chosen.folder)
    answer = {
        "path": str(chosen.folder),
        "step": chosen.step,
        "fault": size_fault(chosen.folder),
        **{name: info.get(name) for name in ("format", "code", "torch", "world", "layout", "loss")},
        "saved": _date(info.get("saved_at_s")),
        "bytes": total_bytes(chosen.folder),
        "chunks": len(index.chunks),
        "parts": _parts(index.tensors),
        "files": _files(index),
        "model": info.get("model", {}),
        "dataset": info.get("dataset", {}),
        "recipe": flat(info.get("run", {})),
    }
    return answer | ({"tensors": _tensors(index, config.tensors)} if config.tensors else {})


def prune(config: PruneConfig) -> dict[str, Any]:
    """Delete the checkpoints that no rule keeps, or say which would go.

    The newest that stays is read as a whole first: one that turns out to be damaged counts as damaged, so that the
    last intact one never goes.

    Raises:
        CheckpointError: there is no checkpoint, or `config.path` is a single one.
    """
    root = open_folder(config.path)
    if is_checkpoint(root):
        raise CheckpointError(f"{config.path} is one checkpoint; give the folder of a run's checkpoints")
    found = _found(config.path)
    retention = Retention(config.keep, config.keep_every_steps, config.keep_best)
    rows = _rows(found, [None] * len(found), retention)
    gone = _retired(rows, retention)
    while (newest := _newest_kept(rows, gone)) is not None:
        (fault,) = content_faults([open_folder(newest["path"])])
        if fault is None:
            break
        newest |= {"intact": False, "fault": fault}
        gone = _retired(rows, retention)
    if newest is None:
        gone = []  # nothing that would stay is intact
    paths = {one.name for one in gone}
    for row in rows:
        row["verdict"] = "stays" if row["path"] not in paths else "deleted" if config.delete else "would be deleted"
    if config.delete:
        for one in reversed(found):  # the oldest first: whatever stops this, the newer ones are there
            if str(one.folder) in paths:
                delete(run_checkpoints(root), one.folder.name)
    freed = sum(row["bytes"] for row in rows if row["path"] in paths)
    shown = [{name: row[name] for name in ("step", "verdict", "kept_as", "bytes", "loss", "fault")} for row in rows]
    return {"folder": config.path, "checkpoints": shown, "deleted": config.delete, "count": len(gone), "bytes": freed}


def content_faults(folders: Sequence[Folder]) -> list[str | None]:
    """What reading every file of some checkpoints finds wrong: one line each, or None. With a bar on a terminal."""
    faults = [size_fault(folder) for folder in folders]
    pieces = [
        _Piece(number, name, start, min(start + PIECE_BYTES, record.bytes))
        for number, folder in enumerate(folders)
        if faults[number] is None
        for name, record in sorted(read_manifest(folder).items())
        for start in range(0, record.bytes, PIECE_BYTES)
    ]
    digests: dict[tuple[int, str], list[np.ndarray]] = {}
    total = sum(piece.end - piece.start for piece in pieces)
    with ThreadPoolExecutor(AT_ONCE) as pool, byte_progress("verify", total) as advance:
        read = pool.map(lambda piece: _digests(folders[piece.checkpoint], piece, advance), pieces)
        for piece, found in zip(pieces, read, strict=True):
            if isinstance(found, str):
                faults[piece.checkpoint] = faults[piece.checkpoint] or found
            else:
                digests.setdefault((piece.checkpoint, piece.file), []).append(found)
    for number, folder in enumerate(folders):
        if faults[number] is None:
            faults[number] = _first_damage(folder, {name: of for (n, name), of in digests.items() if n == number})
    return faults


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


@dataclass(frozen=True)
class _Piece:
    """Blocks of a file of a checkpoint."""

    checkpoint: int
    file: str
    start: int
    end: int


def _digests(folder: Folder, piece: _Piece, advance: Callable[[int], None]) -> np.ndarray | str:
    """The checksums of its blocks, or why it cannot be read."""
    buffer = memoryview(bytearray(piece.end - piece.start))
    try:
        folder.read_into(piece.file, piece.start, buffer)
    except (OSError, EOFError) as error:
        return f"{folder}/{piece.file} cannot be read ({error})"
    advance(len(buffer))
    return block_digests(buffer)


def _first_damage(folder: Folder, digests: Mapping[str, Sequence[np.ndarray]]) -> str | None:
    for name, record in sorted(read_manifest(folder).items()):
        read = digest_file(np.concatenate([np.zeros(0, dtype=np.uint64), *digests.get(name, [])]))
        if read != record.xxh3:
            return f"{folder}/{name} is damaged: its checksum is {read} instead of {record.xxh3}"
    return None


def _found(place: str) -> list[Found]:
    folder = open_folder(place)
    if is_checkpoint(folder) and folder.names():
        return [Found(_info(folder).get("step", 0), folder)]
    found = committed(run_checkpoints(folder))
    if not found:
        raise CheckpointError(f"no checkpoint in {place}; give the output folder of `goku-mega train`")
    return found


def _rows(found: Sequence[Found], faults: Sequence[str | None], retention: Retention | None = None) -> list[Row]:
    """A row a checkpoint; several are looked at side by side, for a store answers slowly.

    Args:
        faults: what is known to be wrong with them.
        retention: the rules to name in `kept_as`; None: those of the newest one's recipe.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(_row, found, faults))
        infos = list(pool.map(lambda one: _info(one.folder), found[:1]))
    rules = retention or _retention(infos[0])
    if rules is not None:
        reasons = kept_as(_kept(rows), max(row["step"] for row in rows), rules)
        for row in rows:
            row["kept_as"] = ", ".join(reasons.get(row["path"], [])) or None
    return rows


def _row(found: Found, fault: str | None) -> Row:
    info = _info(found.folder)
    fault = fault or size_fault(found.folder)
    saved_at_s = info.get("saved_at_s")
    return {
        "step": found.step,
        "path": str(found.folder),
        "bytes": total_bytes(found.folder),
        "intact": fault is None,
        "fault": fault,
        "world": info.get("world"),
        "layout": info.get("layout"),
        "age_s": None if saved_at_s is None else round(time.time() - saved_at_s, 1),
        "loss": info.get("loss"),
        "kept_as": None,
    }


def _info(folder: Folder) -> dict[str, Any]:
    """The checkpoint's info if it can be read: a damaged checkpoint is listed, too."""
    try:
        content = json.loads(folder.read(INFO))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _retention(info: Mapping[str, Any]) -> Retention | None:
    """The rules of a checkpoint's recipe."""
    rules = info.get("run", {}).get("checkpoint", {})
    if "keep" not in rules:
        return None
    return Retention(rules["keep"], rules.get("keep_every_steps", 0), rules.get("keep_best", 0))


def _kept(rows: Sequence[Row]) -> list[Kept]:
    return [Kept(row["step"], row["path"], row["intact"], row["loss"]) for row in rows]


def _retired(rows: Sequence[Row], retention: Retention) -> list[Kept]:
    newest_step = max(row["step"] for row in rows)
    reasons = kept_as(_kept(rows), newest_step, retention)
    for row in rows:
        row["kept_as"] = ", ".join(reasons.get(row["path"], [])) or None
    return retired(_kept(rows), newest_step, retention)


def _newest_kept(rows: Sequence[Row], gone: Sequence[Kept]) -> Row | None:
    paths = {one.name for one in gone}
    return next((row for row in rows if row["intact"] and row["path"] not in paths), None)


def _parts(tensors: Sequence[StoredTensor]) -> list[Row]:
    """Model, average and optimizer, each with what it is made of."""
    parts: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        depth = 2 if tensor.name.startswith("optimizer/") else 1
        parts.setdefault("/".join(tensor.name.split("/")[:depth]), []).append(tensor)
    return [
        {
            "part": part,
            "tensors": len(inside),
            "numbers": sum(_count(tensor) for tensor in inside),
            "bytes": sum(_count(tensor) * ITEM_BYTES[tensor.dtype] for tensor in inside),
            "dtypes": ", ".join(sorted({tensor.dtype for tensor in inside})),
        }
        for part, inside in parts.items()
    ]


def _files(index: Index) -> list[Row]:
    chunks = Counter(index.chunks.file.tolist())
    sizes = index.file_bytes.tolist()
    return [
        {"file": name, "bytes": size, "chunks": chunks[number]}
        for number, (name, size) in enumerate(zip(index.files, sizes, strict=True))
    ]


def _tensors(index: Index, pattern: str) -> list[Row]:
    chunks = Counter(index.chunks.tensor.tolist())
    return [
        {
            "tensor": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": _count(tensor) * ITEM_BYTES[tensor.dtype],
            "chunks": chunks[number],
        }
        for number, tensor in enumerate(index.tensors)
        if fnmatch.fnmatchcase(tensor.name, pattern)
    ]


def _count(tensor: StoredTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
