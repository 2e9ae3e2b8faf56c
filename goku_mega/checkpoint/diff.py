"""Where two checkpoints differ: in their tensors, number by number, and in the runs that made them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from goku_mega.checkpoint.in_turn import Part, read_in_turn
from goku_mega.checkpoint.load import Stored, load_named
from goku_mega.checkpoint.progress import byte_progress
from goku_mega.checkpoint.tools import flat
from goku_mega.config.checkpoints import DiffConfig

PIECE = 2**22
"""Numbers that are compared at a time, in double precision."""
COMPARED = ("step", "code", "torch", "world", "layout", "loss", "model", "dataset", "run")
"""What is compared of the checkpoints' info."""


def diff(config: DiffConfig) -> dict[str, Any]:
    """Compare two checkpoints.

    Returns `same` (no tensor differs in any bit), the numbers of `equal` and `different` tensors, the names of those
    `only_in_first` and `only_in_second`, those with other `shapes` or `dtypes`, a row a different tensor in `tensors`
    (how many of its numbers differ, the largest absolute difference, and that over the tensor's largest number), and
    the differences of the runs in `info`.

    Raises:
        CheckpointError: one of them is missing or damaged.
    """
    (first, _), (second, _) = (load_named(place, lambda stored: None) for place in (config.first, config.second))
    kinds = [{tensor.name: tensor for tensor in stored.index.tensors} for stored in (first, second)]
    both = [name for name in kinds[0] if name in kinds[1]]
    alike = [name for name in both if kinds[0][name].shape == kinds[1][name].shape]
    rows = _compare(first, second, alike)
    only = [sorted(kinds[a].keys() - kinds[1 - a].keys()) for a in (0, 1)]
    reshaped = [name for name in both if name not in alike]
    return {
        "first": str(first.folder),
        "second": str(second.folder),
        "same": not rows and not only[0] and not only[1] and not reshaped,
        "equal": len(alike) - len(rows),
        "different": len(rows),
        "only_in_first": only[0],
        "only_in_second": only[1],
        "shapes": [
            {"tensor": name, "first": list(kinds[0][name].shape), "second": list(kinds[1][name].shape)}
            for name in reshaped
        ],
        "dtypes": [
            {"tensor": name, "first": kinds[0][name].dtype, "second": kinds[1][name].dtype}
            for name in both
            if kinds[0][name].dtype != kinds[1][name].dtype
        ],
        "tensors": rows,
        "info": _info_differences(first.info, second.info),
    }


def _compare(first: Stored, second: Stored, names: list[str]) -> list[dict[str, Any]]:
    """A row for each tensor that is not the same, bit for bit."""
    parts = [[_whole(stored, name) for name in names] for stored in (first, second)]  # each in the dtype it has
    rows = []
    with byte_progress("diff", sum(part.bytes for part in parts[0])) as advance:
        pairs = zip(names, read_in_turn(first, parts[0]), read_in_turn(second, parts[1]), strict=True)
        for name, a, b in pairs:
            if not _same_bits(a, b):
                rows.append({"tensor": name, **_difference(a.flatten(), b.flatten())})
            advance(a.nbytes)
    return rows


def _whole(stored: Stored, name: str) -> Part:
    tensor = stored.index.tensors[stored.index.by_name[name]]
    return Part(name, getattr(torch, tensor.dtype), (0,) * len(tensor.shape), tensor.shape)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where there are nans, which equal nothing."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _difference(a: Tensor, b: Tensor) -> dict[str, Any]:
    """Of two tensors [numbers]; what is not finite in one of them counts as different, but has no distance."""
    differing, largest, scale = 0, 0.0, 0.0
    for start in range(0, a.numel(), PIECE):
        x, y = (tensor[start : start + PIECE].to(torch.float64) for tensor in (a, b))
        differing += int((x != y).sum())
        finite = x.isfinite() & y.isfinite()
        if finite.any():
            largest = max(largest, (x - y)[finite].abs().max().item())
            scale = max(scale, x[finite].abs().max().item(), y[finite].abs().max().item())
    return {
        "differing": differing,
        "of": a.numel(),
        "max_abs": largest,
        "max_rel": largest / scale if scale else 0.0,
    }


def _info_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    a, b = (flat({name: info[name] for name in COMPARED if name in info}) for info in (first, second))
    return [
        {"setting": name, "first": a.get(name), "second": b.get(name)}
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    ]
