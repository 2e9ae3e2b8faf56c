"""Writes a checkpoint and commits it by a rename: a folder with its final name is whole, or it does not exist.

Synchronous. Every rank calls `save_checkpoint`; if one fails, all raise and nothing is published.
The files are those of torch.distributed.checkpoint, plus `info.json` and `manifest.json`.
"""

import logging
import shutil
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from goku_mega.checkpoint.agree import Ranks
from goku_mega.checkpoint.manifest import (
    INFO,
    FileRecord,
    committed,
    committed_path,
    record_file,
    size_fault,
    sync_folder,
    write_json,
    write_manifest,
)
from goku_mega.checkpoint.state import ShardSavePlanner, State, stored_shards
from goku_mega.parallel.shards import Shard

FORMAT = 1
"""Version of this layout of files and names; raised when an older reader could not read a newer folder."""

logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path,
    step: int,
    state: State,
    info: dict[str, Any],
    *,
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `state` as the checkpoint of `step`; returns its folder. Every rank calls it with its own boxes.

    Args:
        folder: holds the checkpoints of one run, on a file system that all ranks see.
        info: plain JSON to keep beside the tensors; `step`, `format`, `torch`, `world` and `saved_at_s` are added.
        keep: newest whole checkpoints kept, this one included; older ones are deleted.
        group: a gloo group over all ranks; None takes the default group. Needed where that is NCCL (see `agree`).

    Raises:
        CheckpointError: on every rank, if the disk of one failed. No checkpoint was published or lost.
    """
    ranks = Ranks.of(group)
    doing = f"saving the checkpoint of step {step} in {folder}"
    attempt = ranks.first(doing, lambda: _begin(folder, step))
    try:
        shards = stored_shards(state, state)
        written = ranks.together(doing, lambda: _write(attempt, shards, {**info, "step": step}, ranks))
        files = {name: record for of_rank in written for name, record in of_rank.items()}
        path = ranks.first(doing, lambda: _publish(attempt, step, files))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(attempt, ignore_errors=True)
        raise
    if ranks.rank == 0:
        _retire(folder, step, keep)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what dead attempts left in `folder`. Only a process that owns the run may call it."""
    for path in folder.glob("step_*.tmp.*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step_*.replaced.*"):
        if (folder / path.name.split(".")[0]).is_dir():
            _delete(path)


def _begin(folder: Path, step: int) -> Path:
    """A new folder for this attempt; none is ever written to twice."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    attempt = folder / f"step_{step:08d}.tmp.{uuid.uuid4().hex[:12]}"
    attempt.mkdir()
    return attempt


def _write(attempt: Path, shards: dict[str, Shard], info: dict[str, Any], ranks: Ranks) -> dict[str, FileRecord]:
    """Write this rank's boxes; returns the records of the files that this rank wrote."""
    _check_written_once(shards, ranks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        metadata = dcp.save(
            dict(shards),
            # one thread: an error in a second one would be lost and a part of the tensors with it
            storage_writer=dcp.FileSystemWriter(attempt, thread_count=1, overwrite=False, sync_files=True),
            planner=ShardSavePlanner(),
            process_group=ranks.group,
        )
    lost = sorted(set(shards) - set(metadata.state_dict_metadata))
    if lost:
        raise ValueError(f"no rank owns {lost[0]} (and {len(lost) - 1} more); it was not written")
    own = list(attempt.glob(f"__{ranks.rank}_*"))
    if ranks.rank == 0:
        about = {"format": FORMAT, "torch": torch.__version__, "world": ranks.world, "saved_at_s": time.time()}
        write_json(attempt / INFO, {**info, **about})
        own += [attempt / INFO, attempt / ".metadata"]
    return {path.name: record_file(path) for path in own}


def _check_written_once(shards: dict[str, Shard], ranks: Ranks) -> None:
    """torch checks that the boxes of several ranks fill each tensor, but not those of a single one."""
    if ranks.world == 1:
        partial = [name for name, shard in shards.items() if not (shard.complete and shard.owner)]
        if partial:
            raise ValueError(f"this process alone must own all of {partial[0]}, but it holds or owns only a part")


def _publish(attempt: Path, step: int, files: dict[str, FileRecord]) -> Path:
    """Commit: once the rename is done, the checkpoint exists with every file it needs."""
    write_manifest(attempt, step, files)
    sync_folder(attempt)
    final = committed_path(attempt.parent, step)
    replaced = final.with_name(f"{final.name}.replaced.{uuid.uuid4().hex[:12]}")
    if final.exists():  # saved before, or damaged and passed over; it stays a candidate until the new one is in place
        final.rename(replaced)
    attempt.rename(final)
    sync_folder(attempt.parent)
    if replaced.exists():
        _delete(replaced)
    return final


def _retire(folder: Path, step: int, keep: int) -> None:
    """Delete what is older than the `keep` newest whole checkpoints up to `step`; the damaged do not count."""
    whole = 0
    for found in committed(folder):
        if found.step > step:  # left by a future that this run was set back from; not ours to judge
            continue
        if whole >= keep:
            _delete(found.path)
        elif size_fault(found.path) is None:
            whole += 1


def _delete(path: Path) -> None:
    """Take the checkpoint's name away first, so that a kill in between leaves an attempt, not a torn checkpoint."""
    doomed = path.with_name(f"{path.name.split('.')[0]}.tmp.{uuid.uuid4().hex[:12]}")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("cannot delete the old checkpoint %s (%s)", path, error)
