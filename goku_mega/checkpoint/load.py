"""Finds the newest whole checkpoint and fills any rank's boxes from it, whatever layout wrote it.

Reading never changes a folder of checkpoints, so it is safe beside a run that writes there.
"""

import json
import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from goku_mega.checkpoint.agree import Ranks
from goku_mega.checkpoint.manifest import (
    INFO,
    Found,
    committed,
    content_fault,
    is_checkpoint,
    read_manifest,
    size_fault,
)
from goku_mega.checkpoint.save import FORMAT
from goku_mega.checkpoint.state import ShardLoadPlanner, State, belongs_to, stored_shards
from goku_mega.errors import CheckpointError
from goku_mega.parallel.shards import Shard

logger = logging.getLogger(__name__)


def find_latest(folder: Path, *, verify: bool = True, group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest whole checkpoint in `folder`, the same one on every rank; None if there is none at all.

    A damaged one is passed over with a warning. `verify` reads every file and compares checksums, the files
    divided over the ranks; without it only names and sizes are looked at.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    ranks = Ranks.of(group)
    found = ranks.first(f"looking for checkpoints in {folder}", lambda: committed(folder))
    damaged: list[tuple[Found, str]] = []
    for candidate in found:
        fault = _shared_fault(candidate.path, verify, ranks)
        if fault is None:
            _warn_passed_over(damaged, candidate, ranks)
            return candidate.path
        damaged.append((candidate, fault))
    if damaged:
        others = f", and {len(damaged) - 1} more are damaged" if len(damaged) > 1 else ""
        raise CheckpointError(
            f"{damaged[0][1]}{others}; no older checkpoint in {folder} is whole: "
            "restore the files from a copy, or train into another folder"
        )
    return None


def open_checkpoint(path: Path, *, group: dist.ProcessGroup | None = None) -> Path:
    """The whole checkpoint that `path` means: itself, or the newest in a run folder or a folder of checkpoints.

    Raises:
        CheckpointError: `path` is damaged, or no whole checkpoint is there.
    """
    ranks = Ranks.of(group)
    if ranks.first(f"opening {path}", lambda: is_checkpoint(path)):
        if not ranks.first(f"opening {path}", path.is_dir):
            raise CheckpointError(f"there is no checkpoint {path}; `goku-mega checkpoint list` shows those there are")
        fault = _shared_fault(path, True, ranks)
        if fault is not None:
            raise CheckpointError(f"{fault}; choose another checkpoint (`goku-mega checkpoint list {path.parent}`)")
        return path
    inner = path / "checkpoints"
    latest = find_latest(inner if ranks.first(f"opening {path}", inner.is_dir) else path, group=group)
    if latest is None:
        raise CheckpointError(
            f"no checkpoint in {path}; give the output folder of `goku-mega train`, or one of its step_* folders"
        )
    return latest


def load_info(path: Path) -> dict[str, Any]:
    """The JSON kept beside the tensors of the checkpoint folder `path`.

    Raises:
        CheckpointError: it cannot be read, or a newer goku_mega wrote it.
    """
    file = path / INFO
    try:
        info = json.loads(file.read_bytes())
        version = int(info["format"])
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file} is damaged: it is not the JSON that was written") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this goku_mega reads format {FORMAT}: "
            "use the version of goku_mega that wrote it"
        )
    return info


def load_into(
    path: Path,
    state: State,
    *,
    parts: Sequence[str] | None = None,
    model: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill the boxes of `state` in place from the checkpoint folder `path`. Every rank calls it with its own boxes.

    A tensor of another dtype is converted. `parts` limits it to some parts of `state`. `model` describes this run's
    model for the error message, in the same form as `info["model"]` of the checkpoint.

    Raises:
        CheckpointError: on every rank, if the checkpoint holds another model or cannot be read on one of them.
    """
    ranks = Ranks.of(group)
    chosen = tuple(state) if parts is None else tuple(parts)
    shards = stored_shards(state, chosen)

    def check() -> set[str]:
        metadata = _Reader(path).read_metadata()
        _check_shapes(path, shards, metadata, model)
        return {name for name in metadata.state_dict_metadata if belongs_to(name, chosen)} - set(shards)

    unclaimed = set.intersection(*ranks.together(f"reading {path}", check))
    if unclaimed:
        name = min(unclaimed)
        raise CheckpointError(
            f"{path} holds another model: it has {name} and {len(unclaimed) - 1} more tensors that this model has not"
            f"{_sizes(path, model)}"
        )
    ranks.together(f"reading {path}", lambda: _read(path, shards))


def _read(path: Path, shards: dict[str, Shard]) -> None:
    reader = _Reader(path)
    metadata = reader.read_metadata()
    planner = ShardLoadPlanner(shards)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    try:
        reader.read_data(planner.plan(metadata), planner).wait()
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fault = content_fault(path)
        if fault is None:
            raise
        raise CheckpointError(fault) from error


def _check_shapes(path: Path, shards: dict[str, Shard], metadata: Metadata, model: Mapping[str, Any] | None) -> None:
    for name, shard in shards.items():
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{path} holds another model: it has no {name}{_sizes(path, model)}")
        if tuple(stored.size) != tuple(shard.global_shape):
            raise CheckpointError(
                f"{path} holds another model: {name} is {_shape(stored.size)} in the checkpoint "
                f"and {_shape(shard.global_shape)} here{_sizes(path, model)}"
            )
        if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(stored.size):
            raise CheckpointError(f"{path} is incomplete: parts of {name} were never written")


def _sizes(path: Path, model: Mapping[str, Any] | None) -> str:
    """The two models, and what to do."""
    stored = _describe_model(load_info(path).get("model"))
    return f" (checkpoint: {stored}; here: {_describe_model(model)}); use the size of the checkpoint or another folder"


def _describe_model(model: Any) -> str:
    if not isinstance(model, Mapping):
        return "a model that is not described"
    return ", ".join(f"{key} {value}" for key, value in model.items() if not isinstance(value, Mapping | list))


def _shape(size: Sequence[int]) -> str:
    return "x".join(str(length) for length in size) or "a scalar"


def _shared_fault(path: Path, verify: bool, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, as all ranks together see it, each reading a share of the files."""

    def look() -> str | None:
        fault = size_fault(path)
        if fault is not None or not verify:
            return fault
        return content_fault(path, sorted(read_manifest(path))[ranks.rank :: ranks.world])

    return next((fault for fault in ranks.together(f"verifying {path}", look) if fault is not None), None)


def _warn_passed_over(damaged: list[tuple[Found, str]], chosen: Found, ranks: Ranks) -> None:
    if ranks.rank > 0:
        return
    for passed, fault in damaged:
        logger.warning(
            "passed over the checkpoint of step %d: %s; going back to step %d loses %d steps",
            passed.step, fault, chosen.step, passed.step - chosen.step,
        )  # fmt: skip


def _enum_member(kind: Any, name: str) -> Enum:
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"an attribute {name!r} of {kind!r} does not belong in a checkpoint")


class _MetadataUnpickler(pickle.Unpickler):
    """torch keeps the list of tensors as a pickle; this one builds nothing else, so it runs no foreign code."""

    ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )
    METADATA = "torch.distributed.checkpoint.metadata"

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == self.METADATA or (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2 pickles members of enums
            return _enum_member
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged or not trustworthy: {error}") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata
