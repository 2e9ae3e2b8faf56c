"""Which checkpoints a folder holds, and whether each is whole: the list of its files with sizes and checksums.

A folder `step_00001234` is a checkpoint only with a `manifest.json` inside; anything with `.tmp.` in its name is an
attempt that was never committed. Nothing here needs torch.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from goku_mega.errors import CheckpointError

MANIFEST = "manifest.json"
INFO = "info.json"
BLOCK_BYTES = 16 * 2**20
_COMMITTED = re.compile(r"step_(\d{8,})(\.replaced\.\w+)?")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    crc32: str
    """Eight hexadecimal digits."""


@dataclass(frozen=True)
class Found:
    """A committed checkpoint in a folder, whole or not."""

    step: int
    path: Path


def committed_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is once it is committed."""
    return folder / f"step_{step:08d}"


def committed(folder: Path) -> list[Found]:
    """The committed checkpoints of `folder`, newest first.

    `step_N.replaced.*` is the older of two checkpoints of step N; it counts, after the newer one, because a process
    killed while it exchanges the two leaves only that.
    """
    if not folder.is_dir():
        return []
    matches = [(_COMMITTED.fullmatch(path.name), path) for path in folder.iterdir()]
    found = [(int(match[1]), match[2] is None, path) for match, path in matches if match and path.is_dir()]
    return [Found(step, path) for step, _, path in sorted(found, reverse=True)]


def is_checkpoint(path: Path) -> bool:
    """Whether `path` means one checkpoint, whole or not, and not a folder of them."""
    return (path / MANIFEST).exists() or _COMMITTED.fullmatch(path.name) is not None


def record_file(path: Path) -> FileRecord:
    """Size and checksum of a file, read in blocks."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return FileRecord(size, f"{checksum:08x}")


def write_json(path: Path, content: Any) -> None:
    """Write JSON and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries (new names, renames) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(path: Path, step: int, files: dict[str, FileRecord]) -> None:
    """Write the manifest of the checkpoint folder `path`; it carries a checksum of itself."""
    body = {"step": step, "files": {name: asdict(files[name]) for name in sorted(files)}}
    write_json(path / MANIFEST, {**body, "crc32": _checksum(body)})


def read_manifest(path: Path) -> dict[str, FileRecord]:
    """The files that the checkpoint folder `path` must hold.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of another step than the folder's name.
    """
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_bytes())
        body = {"step": content["step"], "files": content["files"]}
        if content["crc32"] != _checksum(body):
            raise CheckpointError(f"{manifest} does not match its own checksum")
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{manifest} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{manifest} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{manifest} is damaged: it is not the JSON that was written") from None
    match = _COMMITTED.fullmatch(path.name)
    if match and int(match[1]) != body["step"]:
        raise CheckpointError(f"{manifest} is of step {body['step']}, not of the step in the folder's name")
    return files


def _checksum(body: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"


def size_fault(path: Path) -> str | None:
    """What a look at names and sizes finds wrong with the checkpoint folder `path`: one line, or None."""
    try:
        files = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    for name, record in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{path / name} is missing"
        if size != record.bytes:
            return f"{path / name} has {size} bytes instead of {record.bytes}"
    return None


def content_fault(path: Path, names: Iterable[str] | None = None) -> str | None:
    """What reading the files finds wrong: one line, or None. `names` limits it to some files (a rank's share)."""
    fault = size_fault(path)
    if fault:
        return fault
    files = read_manifest(path)
    for name in sorted(files) if names is None else names:
        try:
            read = record_file(path / name)
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror})"
        if read != files[name]:
            return f"{path / name} is damaged: its checksum is {read.crc32} instead of {files[name].crc32}"
    return None


def total_bytes(path: Path) -> int:
    """Bytes of all files in a checkpoint folder."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
