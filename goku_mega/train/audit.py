"""Silent data corruption: numbers that hardware has changed or computed wrongly, and on which rank.

Three checks, none of which changes a number of the run:

* A seal on memory: after each update every rank sums the bits of each of its tensors, and before the next update it
  sums them again. Nothing may write them in between, so a rank whose seal is broken is at fault without doubt.
* Copies: ranks that hold the same box of a tensor must hold the same bits. With three or more copies the odd one is
  at fault; of two, it is one of them.
* Arithmetic: each data-parallel rank runs the forward pass of its neighbour's first micro-batch, and both must get the
  same loss, bit by bit. A rank that computes wrongly differs from both of its neighbours.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from goku_mega.checkpoint.state import State
from goku_mega.errors import CorruptState
from goku_mega.parallel.groups import Groups

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number of a tensor."""

Box = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name, offsets and size of a part of a tensor."""


class Evidence(NamedTuple):
    """What one rank has found."""

    dp_rank: int
    broken: list[str]
    """Tensors that changed between two updates."""
    copies: dict[Box, int]
    """Seals of those boxes that other ranks hold with other bits."""
    disagreeing: list[int]
    """Data-parallel ranks whose forward pass gave their next rank's loss otherwise than that rank did."""


class Audit:
    """The seals of one rank's tensors, and what it knows of the others'."""

    def __init__(self, state: State, groups: Groups) -> None:
        """Seals the state as it is now."""
        self.groups = groups
        self.shards = {f"{part}/{name}": shard for part, shards in state.items() for name, shard in shards.items()}
        copied = {axis: self._copied_over(axis) for axis in self._compared_axes()}
        self.copied = {axis: numbers for axis, numbers in copied.items() if len(numbers)}
        self.own_loss: Tensor | None = None
        self.neighbours_loss: Tensor | None = None
        self.seal()

    def seal(self) -> None:
        """Take the state as it is now for right; to be called after each update."""
        self.seals = self._sums()
        self.broken = self.differing = torch.zeros_like(self.seals, dtype=torch.bool)
        self.disagreeing = torch.zeros(self.groups.layout.dp, dtype=torch.bool, device=self.groups.device)

    def verify(self) -> Tensor:
        """Compare the state with the seals; how many tensors differ, scalar."""
        self.broken = self._sums() != self.seals
        return self.broken.sum()

    def compare_copies(self) -> Tensor:
        """Compare the seals with those of the ranks that hold the same boxes; how many differ, scalar."""
        self.differing = torch.zeros_like(self.broken)
        for axis, numbers in self.copied.items():
            seals = self.seals[numbers]
            bounds = torch.stack((seals, ~seals))  # ~ turns the order around, so that its largest is of the least
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group(axis))
            self.differing[numbers] |= bounds[0] != ~bounds[1]
        return self.differing.sum()

    def compare_losses(self, own: Tensor, neighbours: Tensor) -> Tensor:
        """Compare a loss with what the data-parallel rank before this one has made of it; how many differ, scalar.

        Args:
            own: of this rank's first micro-batches, scalar.
            neighbours: of the next rank's, as computed here.
        """
        layout = self.groups.layout
        mine = torch.stack((own, neighbours)).double()
        losses = [torch.empty_like(mine) for _ in range(layout.dp * layout.cp)]
        dist.all_gather(losses, mine, group=self.groups.data)
        by_owner, computed = torch.stack(losses).view(layout.dp, layout.cp, 2).unbind(-1)  # [dp, cp]
        by_owner = by_owner.roll(-1, dims=0)
        same = (by_owner == computed) | (by_owner.isnan() & computed.isnan())
        self.disagreeing = ~same.all(dim=1)
        return self.disagreeing.sum()

    def check(self, steps_done: int) -> None:
        """Seals and copies, before a checkpoint is made of them. Every rank calls it.

        Raises:
            CorruptState: on every rank, if one has found something.
        """
        found = self.verify() + self.compare_copies()
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if found.item():
            raise self.verdict(steps_done - 1)

    def verdict(self, step: int) -> CorruptState:
        """Who is at fault, from the evidence of all ranks; every rank calls it."""
        names, shards = list(self.shards), list(self.shards.values())
        copies = {
            (names[number], shards[number].offsets, tuple(shards[number].tensor.shape)): int(self.seals[number])
            for number in self.differing.nonzero().flatten().tolist()
        }
        broken = [names[number] for number in self.broken.nonzero().flatten().tolist()]
        mine = Evidence(self._dp_rank, broken, copies, self.disagreeing.nonzero().flatten().tolist())
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return CorruptState(step, *blame(found, self.groups.layout.dp))

    @property
    def _dp_rank(self) -> int:
        return self.groups.dp_rank

    def _sums(self) -> Tensor:
        """The sum of the bits of every tensor, int64 [tensors]: whole numbers, so the order does not matter."""
        tensors = (shard.tensor for shard in self.shards.values())
        return torch.stack([tensor.view(BITS[tensor.itemsize]).sum(dtype=torch.int64) for tensor in tensors])

    def _compared_axes(self) -> list[str]:
        # On a GPU, tensor-parallel ranks compute the gradients of what they hold in common each for itself, with sums
        # whose order is not fixed.
        exact = self.groups.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        return ["replicate", "pp", "tp"] if exact else ["replicate", "pp"]

    def _copied_over(self, axis: str) -> Tensor:
        numbers = [number for number, shard in enumerate(self.shards.values()) if axis in shard.copies.over]
        return torch.tensor(numbers, dtype=torch.int64, device=self.groups.device)

    def _group(self, axis: str) -> dist.ProcessGroup:
        groups = self.groups
        return groups.fsdp_mesh.get_group("replicate") if axis == "replicate" else getattr(groups, axis)


def blame(found: list[Evidence], dp_ranks: int) -> tuple[list[int], str]:
    """The ranks at fault by the evidence of all ranks, and why they are: the surest evidence counts."""
    broken = {rank: evidence.broken for rank, evidence in enumerate(found) if evidence.broken}
    if broken:
        return sorted(broken), f"{_some(names for names in broken.values())} changed between two updates"
    holders: dict[Box, dict[int, int]] = defaultdict(dict)
    for rank, evidence in enumerate(found):
        for box, seal in evidence.copies.items():
            holders[box][rank] = seal
    if holders:
        odd = sorted({rank for seals in holders.values() for rank in _odd(seals)})
        return odd, f"{_some([box[0] for box in holders] for _ in (0,))} differs from its copies on other ranks"
    pairs = {computer for evidence in found for computer in evidence.disagreeing}
    owners = {(computer + 1) % dp_ranks for computer in pairs}
    suspects = (pairs & owners) if len(pairs) < dp_ranks else pairs
    suspects = suspects or pairs | owners
    at_fault = [rank for rank, evidence in enumerate(found) if evidence.dp_rank in suspects]
    return at_fault, "a forward pass gave another loss than on the rank before"


def _odd(seals: dict[int, int]) -> list[int]:
    """The ranks whose seal is not that of the majority; all of them if there is none."""
    (most, count), *_ = Counter(seals.values()).most_common(1)
    return [rank for rank, seal in seals.items() if seal != most or 2 * count <= len(seals)]


def _some(lists: Iterable[list[str]]) -> str:
    names = sorted({name for names in lists for name in names})
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
