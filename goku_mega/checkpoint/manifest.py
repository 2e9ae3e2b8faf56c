"""Which checkpoints a folder holds, and whether each is whole: the list of its files with sizes and checksums.

A folder `step_00001234` is a checkpoint only with a `manifest.json` inside; anything with `.tmp.` in its name is an
attempt that was never committed. Nothing here needs torch.
"""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from goku_mega.checkpoint.index import block_digests, digest_file
from goku_mega.checkpoint.storage import Folder
from goku_mega.errors import CheckpointError

MANIFEST = "manifest.json"
INFO = "info.json"
INDEX = "index.safetensors"
TORCH_METADATA = ".metadata"
_COMMITTED = re.compile(r"step_(\d{8,})(\.replaced\.\w+|\.[0-9a-f]{12}-\d+)?")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    xxh3: str
    """`digest_file` of its blocks."""


@dataclass(frozen=True)
class Found:
    """A committed checkpoint in a folder, whole or not."""

    step: int
    folder: Folder


def committed_name(step: int) -> str:
    """The folder of a step's checkpoint once it is committed; in an object store the attempt's name follows."""
    return f"step_{step:08d}"


def committed(root: Folder) -> list[Found]:
    """The committed checkpoints of `root`, newest first.

    `step_N.replaced.*` is the older of two checkpoints of step N; it counts, after the newer one, because a process
    killed while it exchanges the two leaves only that. In an object store every checkpoint carries the name of its
    attempt, and is one only with a manifest.
    """
    matches = [(_COMMITTED.fullmatch(name), name) for name in root.names()]
    found = [(int(match[1]), match[2] is None, name) for match, name in matches if match]
    folders = [(step, root.child(name), suffix) for step, suffix, name in sorted(found, reverse=True)]
    return [
        Found(step, folder) for step, folder, plain in folders
        if (plain or ".replaced." in folder.name or MANIFEST in folder.names())
    ]  # fmt: skip


def run_checkpoints(folder: Folder) -> Folder:
    """The folder of checkpoints that a run folder, or itself, is."""
    return folder.child("checkpoints") if "checkpoints" in folder.names() else folder


def is_checkpoint(folder: Folder) -> bool:
    """Whether `folder` means one checkpoint, whole or not, and not a folder of them."""
    return MANIFEST in folder.names() or _COMMITTED.fullmatch(folder.name) is not None


def manifest_bytes(step: int, files: dict[str, FileRecord]) -> bytes:
    """The manifest of a checkpoint; it carries a checksum of itself."""
    body = {"step": step, "files": {name: asdict(files[name]) for name in sorted(files)}}
    return json.dumps({**body, "xxh3": _checksum(body)}, indent=1).encode()


def read_manifest(folder: Folder) -> dict[str, FileRecord]:
    """The files that a checkpoint must hold.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of another step than the folder's name.
    """
    named = f"{folder}/{MANIFEST}"
    try:
        content = folder.read(MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"{named} is missing") from None
    match = _COMMITTED.fullmatch(folder.name)
    return parse_manifest(content, named, int(match[1]) if match else None)


def parse_manifest(content: bytes, named: str, step: int | None = None) -> dict[str, FileRecord]:
    """The files that a manifest lists; it must be that of `step`, if one is given.

    Raises:
        CheckpointError: it is damaged, or of another step.
    """
    try:
        parsed = json.loads(content)
        body = {"step": parsed["step"], "files": parsed["files"]}
        if parsed["xxh3"] != _checksum(body):
            raise CheckpointError(f"{named} does not match its own checksum")
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{named} is damaged: it is not the JSON that was written") from None
    if step is not None and step != body["step"]:
        raise CheckpointError(f"{named} is of step {body['step']}, not of the step in the folder's name")
    return files


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())


def size_fault(folder: Folder, *, whole: bool = True) -> str | None:
    """What a look at names and sizes finds wrong with a checkpoint: one line, or None.

    Args:
        whole: False looks at the manifest only.

    Raises:
        OSError: the storage does not answer, which says nothing about the checkpoint.
    """
    try:
        files = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name, record in files.items() if whole else ():
        try:
            size = folder.size(name)
        except FileNotFoundError:
            return f"{folder}/{name} is missing"
        if size != record.bytes:
            return f"{folder}/{name} has {size} bytes instead of {record.bytes}"
    return None


def read_checked(folder: Folder, name: str, record: FileRecord) -> bytes:
    """A small file's content, as it was written.

    Raises:
        CheckpointError: it is missing, cannot be read, or is not what the manifest lists.
    """
    try:
        content = folder.read(name)
    except OSError as error:
        raise CheckpointError(f"{folder}/{name} cannot be read ({error.strerror or error})") from None
    read = record_bytes(content)
    if read != record:
        raise CheckpointError(f"{folder}/{name} is damaged: its checksum is {read.xxh3} instead of {record.xxh3}")
    return content


def record_bytes(content: bytes) -> FileRecord:
    """What a file with this content must be."""
    return FileRecord(len(content), digest_file(block_digests(content)))


def total_bytes(folder: Folder) -> int:
    """Bytes of the files that a checkpoint's manifest lists; of those there are, if it has none."""
    try:
        return sum(record.bytes for record in read_manifest(folder).values())
    except CheckpointError:
        return sum(folder.size(name) for name in folder.names())
