"""Writes a checkpoint from tensors that come one after the other: an imported one, or an old one in other files.

The same files as a run of as many ranks writes, each tensor spread over all of them, by one process and in the memory
of some tensors.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from goku_mega.checkpoint.commit import (
    OWNER,
    assembled,
    attempt_folder,
    file_name,
    joined,
    publish,
    take_over,
    with_digests,
)
from goku_mega.checkpoint.in_turn import Part, read_in_turn
from goku_mega.checkpoint.index import BLOCK_BYTES, ITEM_BYTES, StoredTensor
from goku_mega.checkpoint.load import Stored, load_named
from goku_mega.checkpoint.progress import byte_progress
from goku_mega.checkpoint.save import written_by
from goku_mega.checkpoint.save_plan import Box, SavePlan, plan_rank
from goku_mega.checkpoint.storage import Folder, open_folder
from goku_mega.checkpoint.torch_file import torch_head
from goku_mega.config.checkpoints import ReshardConfig
from goku_mega.errors import CheckpointError
from goku_mega.parallel.shards import Copies

FLOATING = {"float64", "float32", "float16", "bfloat16"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
"""torch's name of what a configuration calls by a short one."""

Reader = Callable[[Iterator[Part]], Iterator[Tensor]]
"""Gives parts of the tensors in the order they are asked for."""


def reshard(config: ReshardConfig) -> dict[str, Any]:
    """Write a checkpoint again in `config.files` files of equal size, or in another dtype.

    Raises:
        CheckpointError: there is no whole checkpoint, or there are checkpoints in the output.
    """
    output = open_folder(config.output)
    check_no_checkpoints(output)

    def rewrite(stored: Stored) -> Folder:
        tensors = [
            StoredTensor(tensor.name, DTYPES.get(config.dtype, tensor.dtype), tensor.shape)
            if tensor.dtype in FLOATING
            else tensor
            for tensor in stored.index.tensors
        ]
        info = {**stored.info, "rewritten_from": str(stored.folder)}
        return write_checkpoint(output, tensors, lambda parts: read_in_turn(stored, parts), info, files=config.files)

    stored, written = load_named(config.checkpoint, rewrite)
    return {
        "checkpoint": str(written),
        "source": str(stored.folder),
        "step": stored.info["step"],
        "files": config.files,
        "tensors": len(stored.index.tensors),
        "bytes": sum(written.size(file_name(number)) for number in range(config.files)),
    }


def check_no_checkpoints(output: Folder) -> None:
    """Refuse a folder in which something else has saved, or is about to.

    Raises:
        CheckpointError: it has.
    """
    if any(name == OWNER or name.startswith("step_") for name in output.names()):
        raise CheckpointError(f"{output} holds checkpoints already, or a run writes there; choose another output")


def info_of_new(info: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint that no run has written says of itself, besides `info`."""
    return {**info, **written_by(1), "saved_at_s": time.time()}


def write_checkpoint(
    root: Folder, tensors: Sequence[StoredTensor], read: Reader, info: dict[str, Any], *, files: int
) -> Folder:
    """Write and commit the checkpoint of `info["step"]` in `root`; returns its folder. On an error nothing is left.

    Raises:
        CheckpointError: a tensor has a type that cannot be stored, or the storage is full or at fault.
    """
    unknown = next((tensor for tensor in tensors if tensor.dtype not in ITEM_BYTES), None)
    if unknown is not None:
        raise CheckpointError(
            f"{unknown.name} is of the type {unknown.dtype}; one of {', '.join(ITEM_BYTES)} is stored"
        )
    plans = [plan_rank(_boxes(tensors, number, files)) for number in range(files)]
    token = uuid.uuid4().hex[:12]
    attempt = f"{token}-1"
    folder = attempt_folder(root, info["step"], attempt)
    try:
        free, needed = root.free_bytes(), sum(plan.file_bytes for plan in plans)
        if free is not None and free < needed:
            raise OSError(f"{free / 1e9:.3f} GB are free, and {needed / 1e9:.3f} GB are to be written")
        take_over(root, token)
        indexes = []
        with byte_progress("write", needed) as advance:
            for number, plan in enumerate(plans):
                digests: list[int] = []
                folder.write(file_name(number), _digested(_content(plan, read), digests, advance))
                indexes.append(with_digests(plan.index(file_name(number)), [np.array(digests, dtype=np.uint64)]))
        index = joined(indexes)
        index.check_complete()
        return publish(root, attempt, info["step"], assembled(index, info["step"], info), token)
    except BaseException as error:
        folder.remove()
        if root.names() == [OWNER]:
            root.remove()
        if isinstance(error, OSError):
            raise CheckpointError(f"{root} cannot be written to ({error})") from error
        raise


def _boxes(tensors: Sequence[StoredTensor], number: int, files: int) -> list[Box]:
    """All of every tensor, as the holder of one of `files` copies has it: each writes its equal share."""
    copies = Copies(number, files, ("files",))
    return [Box(t.name, t.dtype, t.shape, (0,) * len(t.shape), t.shape, copies) for t in tensors]


def _content(plan: SavePlan, read: Reader) -> Iterator[bytes | memoryview]:
    """A file from its first byte to its last."""
    parts = (Part(p.box.name, getattr(torch, p.box.dtype), p.offsets, p.sizes) for p in plan.pieces)
    end = 0
    for piece, tensor in zip(plan.pieces, read(parts), strict=True):
        yield bytes(piece.head - end)
        yield torch_head(piece.box.dtype, piece.sizes)
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        end = piece.data + piece.bytes
    yield bytes(plan.file_bytes - end)


def _digested(
    pieces: Iterator[bytes | memoryview], digests: list[int], advance: Callable[[int], None]
) -> Iterator[memoryview]:
    """The same bytes; the checksums of the file's blocks are appended to `digests` on the way."""
    hasher, filled = xxhash.xxh3_64(), 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            taken, rest = rest[: BLOCK_BYTES - filled], rest[BLOCK_BYTES - filled :]
            hasher.update(taken)
            filled += len(taken)
            yield taken
            advance(len(taken))
            if filled == BLOCK_BYTES:
                digests.append(hasher.intdigest())
                hasher, filled = xxhash.xxh3_64(), 0
    if filled:
        digests.append(hasher.intdigest())
