"""A rank's part of a global tensor: the box it holds, and which of its copies that is.

Checkpoints, initial weights and norms speak in these boxes, so none of them knows a parallel layout.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """Which one it is among the ranks that hold the same box."""

    number: int = 0
    """From 0 to `count` - 1; each of the ranks has another one."""
    count: int = 1
    over: tuple[str, ...] = ()
    """The axes of the layout along which those ranks lie. Ranks that share one box share all with the same axes."""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"copy {self.number} of {self.count} cannot be")


@dataclass(frozen=True)
class Shard:
    """One box of a global tensor, as this rank holds it.

    `tensor` shares memory with the live parameter, so loading into a shard changes the model.
    A rank that uneven sharding leaves without rows holds a tensor without elements.
    """

    tensor: Tensor
    """The local part; its shape is the box's size."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor, the same under every layout."""
    offsets: tuple[int, ...]
    """Where the box begins in the whole tensor, one number a dimension."""
    copies: Copies = Copies()
    """This rank among those that hold the same box."""

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.global_shape):
            raise ValueError(f"offsets {self.offsets} do not match the shape {self.global_shape}")
        if not self.empty and not self._inside():
            raise ValueError(
                f"a box of {tuple(self.tensor.shape)} at {self.offsets} is not inside a tensor of {self.global_shape}"
            )

    def _inside(self) -> bool:
        if self.tensor.dim() != len(self.global_shape):
            return False
        ends = zip(self.offsets, self.tensor.shape, self.global_shape, strict=True)
        return all(offset >= 0 and offset + size <= whole for offset, size, whole in ends)

    @property
    def owner(self) -> bool:
        """True on exactly one of the ranks that hold this box."""
        return self.copies.number == 0

    @property
    def empty(self) -> bool:
        """Whether this rank holds no element of the tensor."""
        return self.tensor.numel() == 0

    @property
    def complete(self) -> bool:
        """Whether this rank holds every element of the tensor."""
        return self.tensor.numel() == math.prod(self.global_shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the box in the whole tensor."""
        sizes = (0,) * len(self.offsets) if self.empty else tuple(self.tensor.shape)
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, sizes, strict=True))

    def take(self, full: Tensor) -> Tensor:
        """The piece of `full` [*global_shape] that this shard holds, in this shard's shape (a view)."""
        if tuple(full.shape) != self.global_shape:
            raise ValueError(f"expected a tensor of {self.global_shape}, got {tuple(full.shape)}")
        return full[self.slices].reshape(self.tensor.shape)
