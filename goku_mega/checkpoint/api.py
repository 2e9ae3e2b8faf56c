"""Checkpoints of any torch module and optimizer, in the shape of ByteCheckpoint's `save` and `load`.

    save("checkpoints", {"model": model, "optimizer": optimizer, "extra_state": {"epoch": 3}}, global_steps=100)
    load("checkpoints", {"model": model, "optimizer": optimizer, "extra_state": extra})

Modules and optimizers are plain or of DTensors, as `fully_shard` leaves them; any number of ranks loads what any other
has saved. A plain tensor is taken to be the same on every rank.
"""

import json
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from goku_mega.checkpoint.agree import Ranks
from goku_mega.checkpoint.load import Place, Stored, fill, load_named
from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.errors import CheckpointError
from goku_mega.parallel.shards import Copies, Shard

OPTIMIZER = "optimizer/"


def save(
    ckpt_path: Place,
    checkpoint_state: Mapping[str, Any],
    *,
    global_steps: int = 0,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `ckpt_path`/step_... and wait for it; returns that folder. Every rank calls it.

    Args:
        checkpoint_state: "model" (a module) and, if wanted, "optimizer" and "extra_state" (JSON, the same on every
            rank).
        keep: newest checkpoints to keep in `ckpt_path`; None: all.
        group: a gloo group over all ranks; None takes the default group.

    Raises:
        CheckpointError: on every rank: something in the state cannot be saved, or a disk failed.
    """
    ranks = Ranks.of(group)
    model, optimizer = checkpoint_state["model"], checkpoint_state.get("optimizer")
    extra = _json(checkpoint_state.get("extra_state", {}))
    if len(set(ranks.gather(extra))) > 1:
        raise CheckpointError("extra_state is not the same on every rank; gather what belongs to a rank first")
    state = {"model": _boxes(model.state_dict(), ranks)}
    info: dict[str, Any] = {"extra_state": json.loads(extra)}
    if optimizer is not None:
        names = _names(model, optimizer)
        info["param_groups"] = [_plain(group, names) for group in optimizer.param_groups]
        state |= _optimizer_boxes(optimizer, names, ranks)
    return save_checkpoint(ckpt_path, global_steps, state, info, keep=keep or sys.maxsize, group=group)


def load(
    ckpt_path: Place, checkpoint_state: MutableMapping[str, Any], *, group: dist.ProcessGroup | None = None
) -> int:
    """Fill what `checkpoint_state` holds, in place, from one checkpoint folder or the newest whole one in a folder of
    them; returns its step. Every rank calls it. "extra_state" becomes what it was; a new optimizer gets its state.

    Raises:
        CheckpointError: on every rank: there is no whole checkpoint, or it is of another model.
    """
    stored, _ = load_named(ckpt_path, lambda stored: _fill(stored, checkpoint_state), group=group)
    return int(stored.info["step"])


def _fill(stored: Stored, checkpoint_state: MutableMapping[str, Any]) -> None:
    ranks = Ranks.of(stored.group)
    model, optimizer = checkpoint_state["model"], checkpoint_state.get("optimizer")
    state = {"model": _boxes(model.state_dict(), ranks)}
    if optimizer is not None:
        if "param_groups" not in stored.info:
            raise CheckpointError(f"{stored.folder} holds no optimizer")
        names = _names(model, optimizer)
        _make_state(stored, optimizer, names)
        state |= _optimizer_boxes(optimizer, names, ranks)
    fill(stored, state)
    if optimizer is not None:
        for settings, saved in zip(optimizer.param_groups, stored.info["param_groups"], strict=True):
            _restore(settings, saved)
    if "extra_state" in checkpoint_state:
        checkpoint_state["extra_state"] = stored.info["extra_state"]


def _make_state(stored: Stored, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
    """Give an optimizer that has taken no step yet the tensors that the checkpoint has for its parameters."""
    kinds = {tensor.name: tensor for tensor in stored.index.tensors if tensor.name.startswith(OPTIMIZER)}
    keys = sorted({name.split("/")[1] for name in kinds})
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            for key in keys:
                kind = kinds.get(f"{OPTIMIZER}{key}/{names[parameter]}")
                if kind is None or key in optimizer.state[parameter]:
                    continue
                dtype = getattr(torch, kind.dtype)
                if kind.shape == tuple(parameter.shape) and kind.shape:
                    optimizer.state[parameter][key] = torch.zeros_like(parameter.detach(), dtype=dtype)
                else:
                    device = parameter.device if on_device else torch.device("cpu")
                    optimizer.state[parameter][key] = torch.zeros(kind.shape, dtype=dtype, device=device)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    if not all(parameter in names for group in optimizer.param_groups for parameter in group["params"]):
        raise CheckpointError("the optimizer has parameters that are not the model's; save both with one model")
    return names


def _optimizer_boxes(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], ranks: Ranks
) -> dict[str, dict[str, Shard]]:
    """The optimizer's tensors: the name of each kind -> parameter -> box."""
    by_kind: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            by_kind.setdefault(key, {})[names[parameter]] = value
    return {key: _boxes(by_kind[key], ranks) for key in sorted(by_kind)}


def _boxes(tensors: Mapping[str, Any], ranks: Ranks) -> dict[str, Shard]:
    # In one order on every rank, since ranks with copies of the same tensors divide them by it.
    return {name: _box(name, tensors[name], ranks) for name in sorted(tensors)}


def _box(name: str, tensor: Any, ranks: Ranks) -> Shard:
    """This rank's part of a tensor, and which of its copies that is."""
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{name} is a {type(tensor).__name__} and no tensor; put it in extra_state")
    if not isinstance(tensor, DTensor):
        everywhere = Copies(ranks.rank, ranks.world, ("ranks",)) if ranks.world > 1 else Copies()
        return Shard(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim(), everywhere)
    mesh, placements = tensor.device_mesh, tensor.placements
    place = mesh.get_coordinate()
    known = all(type(kind) in (Sharded, Replicate) for kind in placements)
    if place is None or mesh.size() != ranks.world or not known:
        raise CheckpointError(
            f"{name} is {placements} on {mesh}; only shards or copies on a mesh of all ranks are saved"
        )
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    number, count, over = 0, 1, []
    for dim, kind in enumerate(placements):
        if isinstance(kind, Replicate) and mesh.size(dim) > 1:
            number, count = number * mesh.size(dim) + place[dim], count * mesh.size(dim)
            over.append(f"mesh {dim}")
    return Shard(tensor.to_local().detach(), tuple(tensor.shape), tuple(offsets), Copies(number, count, tuple(over)))


def _plain(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> dict[str, Any]:
    """A parameter group as JSON: its settings, and its parameters by name."""
    settings = {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
    settings["params"] = [names[parameter] for parameter in group["params"]]
    return json.loads(_json(settings))


def _restore(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Give a parameter group its settings back, each in the type it has here."""
    for name, value in saved.items():
        if isinstance(group.get(name), Tensor):
            group[name].fill_(value)
        elif name != "params":
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra_state and the optimizer's settings must be JSON: {error}") from None
