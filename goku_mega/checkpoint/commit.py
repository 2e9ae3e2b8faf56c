"""How a checkpoint comes into being: every rank's file in an attempt's folder, then one manifest, then its name.

An attempt is never written to twice and never seen by a reader. Nothing here needs torch.
"""

import json
import logging
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from goku_mega.checkpoint.index import BLOCK_BYTES, Chunks, Index, digest_file
from goku_mega.checkpoint.manifest import (
    INDEX,
    INFO,
    MANIFEST,
    TORCH_METADATA,
    FileRecord,
    committed,
    committed_name,
    manifest_bytes,
    parse_manifest,
    record_bytes,
    size_fault,
)
from goku_mega.checkpoint.retention import Kept, Retention, retired
from goku_mega.checkpoint.storage import Folder, LocalFolder
from goku_mega.checkpoint.torch_metadata import torch_metadata

logger = logging.getLogger(__name__)

WRITE_BYTES = 16 * 2**20
"""One call to the storage."""
OWNER = ".owner"
"""Who may commit in a folder: the token of the job that last took it over."""


def file_name(rank: int) -> str:
    """A rank's file, by the name that torch gives it."""
    return f"__{rank}_0.distcp"


def attempt_folder(root: Folder, step: int, attempt: str) -> Folder:
    """Where an attempt is written. An object store cannot rename, so there it keeps the name."""
    mark = ".tmp" if isinstance(root, LocalFolder) else ""
    return root.child(f"{committed_name(step)}{mark}.{attempt}")


def take_over(root: Folder, token: str) -> None:
    """Become the job that writes here: attempts that are left are removed, and a job before this one cannot commit."""
    root.write(OWNER, [token.encode()])
    if isinstance(root, LocalFolder):
        for unfinished in root.path.glob(f".{OWNER}.*.part"):  # of a job that was killed just here
            unfinished.unlink(missing_ok=True)
    remove_leftovers(root)


def check_owner(root: Folder, token: str) -> None:
    """Check that no other job has taken over since. Where somebody has cleared the folder, it is taken anew.

    Raises:
        PermissionError: another job has.
    """
    try:
        owner = root.read(OWNER).decode()
    except FileNotFoundError:
        root.write(OWNER, [token.encode()])
        return
    if owner != token:
        raise PermissionError(f"another job has taken over {root}; this one may not commit there")


def remove_leftovers(root: Folder, besides: str = "") -> None:
    """Remove what dead attempts left in `root`, but not the attempt `besides`. Only the owner may call it."""
    for name in root.names():
        if ".tmp." in name and name.startswith("step_") and name.rsplit(".", 1)[1] != besides:
            root.child(name).remove()
        elif ".replaced." in name and name.split(".")[0] in root.names():
            delete(root, name)
        elif name.startswith("step_") and not isinstance(root, LocalFolder):
            folder = root.child(name)
            if name.rsplit(".", 1)[-1] != besides and MANIFEST not in folder.names():
                folder.remove()


def write_image(folder: Folder, name: str, image: memoryview) -> NDArray[np.uint64]:
    """Write a file and wait until it is stored; the checksums of its blocks, taken on the way."""
    blocks = [image[start : start + BLOCK_BYTES] for start in range(0, len(image), BLOCK_BYTES)]
    with ThreadPoolExecutor(1, thread_name_prefix="checksums") as pool:  # beside the writing
        digests = pool.map(xxhash.xxh3_64_intdigest, blocks)
        folder.write(name, (image[start : start + WRITE_BYTES] for start in range(0, len(image), WRITE_BYTES)))
        return np.array(list(digests), dtype=np.uint64)


def joined(parts: Sequence[Index]) -> Index:
    """One index of the files of all ranks.

    Raises:
        ValueError: ranks disagree about a tensor.
    """
    # Most parts hold the same tensors and share one tuple of them (`Index.from_bytes`): it is looked at once.
    lists = {id(part.tensors): part.tensors for part in parts}
    tensors = sorted(set().union(*lists.values()), key=lambda tensor: tensor.name)
    number = {tensor.name: position for position, tensor in enumerate(tensors)}
    if len(number) < len(tensors):
        name = next(a.name for a, b in pairwise(tensors) if a.name == b.name)
        raise ValueError(f"ranks disagree about the shape or the type of {name}")
    dims = max((part.chunks.sizes.shape[1] for part in parts), default=0)

    def wide(columns: NDArray[np.int64], filler: int) -> NDArray[np.int64]:
        return np.pad(columns, ((0, 0), (0, dims - columns.shape[1])), constant_values=filler)

    numbers = {key: np.array([number[tensor.name] for tensor in own], dtype=np.int32) for key, own in lists.items()}
    chunks = Chunks(
        tensor=np.concatenate([numbers[id(part.tensors)][part.chunks.tensor] for part in parts]),
        file=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.chunks) for part in parts]),
        head=np.concatenate([part.chunks.head for part in parts]),
        data=np.concatenate([part.chunks.data for part in parts]),
        offsets=np.concatenate([wide(part.chunks.offsets, 0) for part in parts]),
        sizes=np.concatenate([wide(part.chunks.sizes, 1) for part in parts]),
    )
    return Index(
        tensors=tuple(tensors),
        files=tuple(name for part in parts for name in part.files),
        chunks=chunks.sorted(),
        file_bytes=np.concatenate([part.file_bytes for part in parts]),
        digests=tuple(digests for part in parts for digests in part.digests),
    )


def with_digests(index: Index, digests: Sequence[NDArray[np.uint64]]) -> Index:
    """The same files, filled anew."""
    return replace(index, digests=tuple(digests))


def assembled(index: Index, step: int, info: dict[str, Any]) -> dict[str, bytes]:
    """The small files of a checkpoint by name, its manifest last."""
    content = {
        INDEX: index.to_bytes(),
        TORCH_METADATA: torch_metadata(index),
        INFO: json.dumps(info, indent=1).encode(),
    }
    files = {name: record_bytes(data) for name, data in content.items()}
    for name, size, digests in zip(index.files, index.file_bytes.tolist(), index.digests, strict=True):
        files[name] = FileRecord(size, digest_file(digests))
    return {**content, MANIFEST: manifest_bytes(step, files)}


def publish(
    root: Folder, attempt: str, step: int, content: dict[str, bytes], token: str, *, whole: bool = True
) -> Folder:
    """Commit: once this returns the checkpoint exists with every file it needs; before, none does.

    An attempt that is published already stays as it is: whoever asks again did not hear the answer.

    Args:
        content: what `assembled` gave; its info names the attempt if this may be asked again.
        whole: False where the folder has only the files of one node's ranks, and of those it keeps copies of.

    Raises:
        OSError: the store is full or at fault, or a file is not there as it was written.
    """
    before = published(root, step, attempt)
    if before is not None:
        return before
    folder = attempt_folder(root, step, attempt)
    files, there = parse_manifest(content[MANIFEST], f"{folder}/{MANIFEST}"), set(folder.names())
    for name, record in files.items():
        if name not in content and (whole or name in there) and folder.size(name) != record.bytes:
            raise OSError(f"{folder}/{name} has {folder.size(name)} bytes instead of {record.bytes}")
    for name, data in content.items():
        if name != MANIFEST:
            folder.write(name, [data])
    check_owner(root, token)
    folder.write(MANIFEST, [content[MANIFEST]])
    return _named(root, folder, step) if isinstance(root, LocalFolder) and isinstance(folder, LocalFolder) else folder


def published(root: Folder, step: int, attempt: str) -> Folder | None:
    """The checkpoint that an attempt has become; None if it has not."""
    if isinstance(root, LocalFolder):
        folder: Folder = root.child(committed_name(step))
        return folder if _info(folder).get("attempt") == attempt else None
    folder = attempt_folder(root, step, attempt)
    return folder if MANIFEST in folder.names() else None


def clear(root: Folder, step: int, attempt: str) -> None:
    """Remove what was written of an attempt after its end, as a writer does that was started again."""
    if isinstance(root, LocalFolder):  # elsewhere the attempt's folder is the checkpoint
        attempt_folder(root, step, attempt).remove()


def _named(root: LocalFolder, folder: LocalFolder, step: int) -> Folder:
    """Give a whole attempt its final name."""
    final = root.child(committed_name(step))
    replaced = f"{final.name}.replaced.{uuid.uuid4().hex[:12]}"
    exists = final.name in root.names()
    if exists:  # saved before, or damaged and passed over; it stays a candidate until the new one is in place
        final.rename_to(root.path / replaced)
    folder.rename_to(root.path / final.name)
    if exists:
        delete(root, replaced)
    return final


def retire(root: Folder, step: int, retention: Retention, *, whole: bool = True) -> list[int]:
    """Delete the checkpoints that `retention` does not keep, after the one of `step` was committed; their steps.

    Args:
        whole: False where the folder has only the files of some ranks.
    """
    try:
        kept = [_kept(found.step, found.folder, whole) for found in committed(root)]
    except OSError as error:  # a store that does not answer now would make the good look damaged
        logger.warning("no old checkpoint in %s is deleted (%s)", root, error)
        return []
    gone = retired(kept, step, retention)
    for checkpoint in gone:
        delete(root, checkpoint.name)
    return [checkpoint.step for checkpoint in gone]


def _kept(step: int, folder: Folder, whole: bool) -> Kept:
    return Kept(step, folder.name, size_fault(folder, whole=whole) is None, _info(folder).get("loss"))


def _info(folder: Folder) -> dict[str, Any]:
    """What is kept beside a checkpoint's tensors; nothing where that is damaged or missing."""
    try:
        info = json.loads(folder.read(INFO))
    except (FileNotFoundError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def delete(root: Folder, name: str) -> None:
    """Take a checkpoint's name away first, so that a kill in between leaves an attempt, not a torn checkpoint."""
    folder = root.child(name)
    try:
        if isinstance(folder, LocalFolder) and isinstance(root, LocalFolder):
            doomed = root.path / f"{name.split('.')[0]}.tmp.{uuid.uuid4().hex[:12]}"
            folder.rename_to(doomed)
            root.child(doomed.name).remove()
        else:
            folder.remove_file(MANIFEST)
            folder.remove()
    except OSError as error:
        logger.warning("cannot delete the old checkpoint %s (%s)", folder, error)
