"""Finds the newest whole checkpoint and fills any rank's boxes from it, whatever layout wrote it.

Every byte is checked as it is read, so what is damaged is passed over and said, and never loaded. Reading never
changes a folder of checkpoints, so it is safe beside a run that writes there.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from goku_mega.checkpoint.agree import Ranks
from goku_mega.checkpoint.index import Index
from goku_mega.checkpoint.manifest import (
    INDEX,
    INFO,
    FileRecord,
    committed,
    is_checkpoint,
    read_checked,
    read_manifest,
    run_checkpoints,
    size_fault,
)
from goku_mega.checkpoint.reading import read_boxes
from goku_mega.checkpoint.save import FORMAT
from goku_mega.checkpoint.state import State, belongs_to, stored_shards
from goku_mega.checkpoint.storage import Folder, LocalFolder, open_folder
from goku_mega.errors import CheckpointError, DamagedCheckpoint, OtherHistory
from goku_mega.parallel.shards import Shard

logger = logging.getLogger(__name__)

Place = Path | str
"""A path, or an fsspec URL."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stored:
    """A checkpoint that has been opened: what is in it, but none of its tensors yet."""

    folder: Folder
    """Where this rank reads it."""
    index: Index
    info: dict[str, Any]
    group: dist.ProcessGroup | None
    node: str = ""
    """The folder on this rank's own node that it is in; empty: all ranks read the same folder."""
    files: frozenset[str] | None = None
    """Those in the node's folder."""

    @classmethod
    def open(cls, place: Place, *, group: dist.ProcessGroup | None = None) -> "Stored":
        """Open one checkpoint folder; rank 0 reads for all.

        Raises:
            DamagedCheckpoint: its manifest, its index or its info is missing or damaged, or a file has another size.
            CheckpointError: a newer goku_mega wrote it.
        """
        ranks = Ranks.of(group)
        folder = open_folder(place)
        content = ranks.first(f"opening {place}", lambda: _read_small(folder))
        if isinstance(content, str):
            raise DamagedCheckpoint(content)
        return cls(folder, Index.from_bytes(content[0]), _parsed(content[1], folder), group)

    @classmethod
    def open_on_nodes(
        cls, node_folder: str, name: str, rank: int, *, group: dist.ProcessGroup | None = None
    ) -> "Stored":
        """Open a checkpoint of which each node has some files; `rank` reads the small ones for all.

        Raises:
            DamagedCheckpoint: they are damaged.
        """
        ranks, folder = Ranks.of(group), open_folder(node_folder).child(name)
        content = ranks.first(f"opening {folder}", lambda: _read_small(folder, whole=False), rank=rank)
        if isinstance(content, str):
            raise DamagedCheckpoint(content)
        index = Index.from_bytes(content[0])
        sizes = dict(zip(index.files, index.file_bytes.tolist(), strict=True))
        files = frozenset(file for file in folder.names() if file in sizes and folder.size(file) == sizes[file])
        return cls(folder, index, _parsed(content[1], folder), group, node_folder, files)

    def fill(self, shards: Mapping[str, Shard]) -> None:
        """Fill boxes, by stored name, in place; another dtype is converted. Every rank calls it with its own boxes.

        Raises:
            DamagedCheckpoint: on every rank, if a file is not what was written.
            CheckpointError: on every rank, if it cannot be read.
        """
        try:
            read_boxes(self.folder, self.index, shards, Ranks.of(self.group), node=self.node, files=self.files)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}") from error


def load_newest(
    place: Place, load: Callable[[Stored], Result], *, node_folder: str = "", group: dist.ProcessGroup | None = None
) -> tuple[Stored, Result] | None:
    """Load the newest checkpoint of a folder of them that `load` reads without finding it damaged or of another
    history; None if none is there. What is passed over is said, and why.

    Args:
        load: fills what it fills from an opened checkpoint; it may have to begin again with an older one.
        node_folder: the folder on this rank's own node; what the nodes have together is preferred to `place`.

    Raises:
        OtherHistory: there are checkpoints, and every one is of another history.
        CheckpointError: there are checkpoints, and every one is damaged or of another history.
    """
    ranks = Ranks.of(group)
    candidates = _on_nodes(node_folder, ranks) if node_folder else []
    doing = f"looking for checkpoints in {place}"
    in_store = ranks.first(doing, lambda: _in_store(place, needed=not candidates))
    candidates = sorted([*candidates, *in_store], key=lambda one: (one[0], one[2] >= 0), reverse=True)
    passed_over: list[tuple[int, CheckpointError]] = []
    for step, candidate, rank in candidates:
        try:
            if rank < 0:
                stored = Stored.open(candidate, group=group)
            else:
                stored = Stored.open_on_nodes(node_folder, str(candidate), rank, group=group)
            result = load(stored)
        except (DamagedCheckpoint, OtherHistory) as error:
            passed_over.append((step, error))
            continue
        if ranks.rank == 0:
            _warn_passed_over(passed_over, step)
        return stored, result
    damaged = [error for _, error in passed_over if isinstance(error, DamagedCheckpoint)]
    if damaged:
        raise CheckpointError(_none_is_whole(place, damaged))
    if passed_over:
        raise OtherHistory(f"{passed_over[0][1]}; no older checkpoint in {place} is from before that")
    return None


def load_named(
    place: Place, load: Callable[[Stored], Result], *, group: dist.ProcessGroup | None = None
) -> tuple[Stored, Result]:
    """Load the checkpoint that `place` means: itself, or the newest whole one in a run folder or a folder of them.

    Raises:
        CheckpointError: it is damaged, or no checkpoint is there.
    """
    folder = open_folder(place)
    if is_checkpoint(folder):
        if not folder.names():
            raise CheckpointError(f"there is no checkpoint {place}; `goku-mega checkpoint list` shows those there are")
        try:
            stored = Stored.open(place, group=group)
            return stored, load(stored)
        except DamagedCheckpoint as error:
            parent = Path(place).parent if isinstance(folder, LocalFolder) else place
            message = f"{error}; choose another checkpoint (`goku-mega checkpoint list {parent}`)"
            raise CheckpointError(message) from error
    loaded = load_newest(location(run_checkpoints(folder)), load, group=group)
    if loaded is None:
        raise CheckpointError(
            f"no checkpoint in {place}; give the output folder of `goku-mega train`, or one of its step_* folders"
        )
    return loaded


def location(folder: Folder) -> Place:
    """A folder as those outside of this package write it."""
    return folder.path if isinstance(folder, LocalFolder) else str(folder)


def load_info(place: Place) -> dict[str, Any]:
    """The JSON kept beside the tensors of one checkpoint.

    Raises:
        CheckpointError: it cannot be read, or a newer goku_mega wrote it.
    """
    folder = open_folder(place)
    try:
        return _parsed(folder.read(INFO), folder)
    except OSError as error:
        raise DamagedCheckpoint(f"{folder}/{INFO} cannot be read ({error.strerror or error})") from None


def load_into(
    place: Place,
    state: State,
    *,
    parts: Sequence[str] | None = None,
    model: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill the boxes of `state` in place from one checkpoint. Every rank calls it with its own boxes.

    A tensor of another dtype is converted. `parts` limits it to some parts of `state`. `model` describes this run's
    model for the error message, in the same form as `info["model"]` of the checkpoint.

    Raises:
        CheckpointError: on every rank, if the checkpoint holds another model or cannot be read on one of them.
    """
    fill(Stored.open(place, group=group), state, parts=parts, model=model)


def fill(
    stored: Stored, state: State, *, parts: Sequence[str] | None = None, model: Mapping[str, Any] | None = None
) -> None:
    """As `load_into`, from a checkpoint that is open."""
    ranks = Ranks.of(stored.group)
    chosen = tuple(state) if parts is None else tuple(parts)
    shards = stored_shards(state, chosen)

    names = [tensor.name for tensor in stored.index.tensors if belongs_to(tensor.name, chosen)]

    def claimed() -> bytes:
        """One bit a name, since there are many names and many ranks."""
        _check_shapes(stored, shards, model)
        return np.packbits([name in shards for name in names]).tobytes()

    claims = [np.frombuffer(bits, dtype=np.uint8) for bits in ranks.together(f"reading {stored.folder}", claimed)]
    nobodys = ~np.unpackbits(np.bitwise_or.reduce(claims), count=len(names)).astype(bool)
    unclaimed = [name for name, is_nobodys in zip(names, nobodys, strict=True) if is_nobodys]
    if unclaimed:
        raise CheckpointError(
            f"{stored.folder} holds another model: it has {min(unclaimed)} and {len(unclaimed) - 1} more tensors that "
            f"this model has not{_sizes(stored, model)}"
        )
    stored.fill(shards)


def _in_store(place: Place, *, needed: bool) -> list[tuple[int, Place, int]]:
    """The checkpoints in the folder that all ranks see: step, place, and -1 for no rank in particular."""
    try:
        return [(found.step, location(found.folder), -1) for found in committed(open_folder(place))]
    except OSError as error:
        if needed:  # else a store that does not answer would look like a run that has not begun
            raise
        logger.warning("%s cannot be looked at (%s): only the nodes' own checkpoints are", place, error)
        return []


def _on_nodes(node_folder: str, ranks: Ranks) -> list[tuple[int, Place, int]]:
    """The checkpoints whose files the nodes have together: step, name of the folder, and a rank that sees it."""
    root = open_folder(node_folder)

    def look() -> list[tuple[int, str, dict[str, FileRecord], set[str]]]:
        seen = []
        for found in committed(root):
            with contextlib.suppress(CheckpointError, OSError):
                files = read_manifest(found.folder)
                there = {name for name in found.folder.names() if name in files}
                whole = {name for name in there if found.folder.size(name) == files[name].bytes}
                seen.append((found.step, found.folder.name, files, whole))
        return seen

    by_rank = ranks.together(f"looking for checkpoints in {node_folder}", look)
    complete: list[tuple[int, Place, int]] = []
    for rank, seen in enumerate(by_rank):
        for step, name, files, _ in seen:
            alike = [whole for of_rank in by_rank for other in of_rank if other[:3] == (step, name, files)
                     for whole in other[3:]]  # fmt: skip
            if set().union(*alike) == set(files) and (step, name) not in [one[:2] for one in complete]:
                complete.append((step, name, rank))
    return complete


def _read_small(folder: Folder, *, whole: bool = True) -> tuple[bytes, bytes] | str:
    """Index and info, or what is wrong with the checkpoint."""
    fault = size_fault(folder) if whole else None
    if fault is not None:
        return fault
    files: dict[str, FileRecord] = read_manifest(folder)
    missing = {INDEX, INFO} - set(files)
    if missing:
        if INFO in files:
            _parsed(folder.read(INFO), folder)  # an older format says so
        return f"{folder} has no {min(missing)}"
    try:
        return read_checked(folder, INDEX, files[INDEX]), read_checked(folder, INFO, files[INFO])
    except CheckpointError as error:
        return str(error)


def _parsed(content: bytes, folder: Folder) -> dict[str, Any]:
    try:
        info = json.loads(content)
        version = int(info["format"])
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"{folder}/{INFO} is damaged: it is not the JSON that was written") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, this goku_mega reads format {FORMAT}: "
            "use the version of goku_mega that wrote it"
        )
    return info


def _check_shapes(stored: Stored, shards: Mapping[str, Shard], model: Mapping[str, Any] | None) -> None:
    numbers = stored.index.by_name
    for name, shard in shards.items():
        if name not in numbers:
            raise CheckpointError(f"{stored.folder} holds another model: it has no {name}{_sizes(stored, model)}")
        shape = stored.index.tensors[numbers[name]].shape
        if shape != tuple(shard.global_shape):
            raise CheckpointError(
                f"{stored.folder} holds another model: {name} is {_shape(shape)} in the checkpoint "
                f"and {_shape(shard.global_shape)} here{_sizes(stored, model)}"
            )


def _sizes(stored: Stored, model: Mapping[str, Any] | None) -> str:
    """The two models, and what to do."""
    there = _describe_model(stored.info.get("model"))
    return f" (checkpoint: {there}; here: {_describe_model(model)}); use the size of the checkpoint or another folder"


def _describe_model(model: Any) -> str:
    if not isinstance(model, Mapping):
        return "a model that is not described"
    return ", ".join(f"{key} {value}" for key, value in model.items() if not isinstance(value, Mapping | list))


def _shape(size: Sequence[int]) -> str:
    return "x".join(str(length) for length in size) or "a scalar"


def _warn_passed_over(passed_over: Sequence[tuple[int, CheckpointError]], chosen: int) -> None:
    for step, fault in passed_over:
        logger.warning(
            "passed over the checkpoint of step %d: %s; going back to step %d loses %d steps",
            step, fault, chosen, step - chosen,
        )  # fmt: skip


def _none_is_whole(place: Place, damaged: Sequence[CheckpointError]) -> str:
    others = f", and {len(damaged) - 1} more are damaged" if len(damaged) > 1 else ""
    return (
        f"{damaged[0]}{others}; no older checkpoint in {place} is whole: "
        "restore the files from a copy, or train into another folder"
    )
