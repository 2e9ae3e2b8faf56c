"""PackedBatch: the one input type of the model, with its shapes written down.

Images and videos of any size lie one after the other along one token axis (NaViT packing, paper
section 2.2); attention never crosses from one sample to the next. `data.packing` fills it.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which run of queries sees which run of keys: segment i's queries see segment i's keys only.

    The lengths live on the host, so that no kernel launch waits for the device.
    """

    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    _edges: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.q_lengths) != len(self.kv_lengths):
            raise ValueError(f"{len(self.q_lengths)} query segments but {len(self.kv_lengths)} key segments")

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring segments of equal shape, as (count, q_length, kv_length), in order.

        A run is one batched attention call without a copy.
        """
        found: list[list[int]] = []
        for q, kv in zip(self.q_lengths, self.kv_lengths, strict=True):
            if found and found[-1][1:] == [q, kv]:
                found[-1][0] += 1
            else:
                found.append([1, q, kv])
        return tuple((count, q, kv) for count, q, kv in found)

    def edges(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cumulative query and key lengths, both [segments + 1] int32, copied to a device once."""
        if device not in self._edges:
            self._edges[device] = (_cumulative(self.q_lengths, device), _cumulative(self.kv_lengths, device))
        return self._edges[device]


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    edges = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    edges[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return edges.to(device)


@dataclass(frozen=True)
class RingSegments:
    """How the samples of a pack lie in the chunks of a ring; attention joins the chunks' parts of a sample."""

    lengths: tuple[tuple[int, ...], ...]
    """[chunk][sample]: tokens."""


@dataclass(frozen=True)
class PackedBatch:
    """One packed batch, or the part of its tokens that one context-parallel rank holds, in the pack's order.

    `samples` counts every sample of the pack, on every rank. The last one may be padding that fills
    the pack to a multiple the layout needs; its tokens weigh nothing in the loss.
    """

    patches: Tensor  # [tokens/cp, patch_dim] float: noisy latents x_t, patchified
    positions: Tensor  # [tokens/cp, 3] int64: (t, h, w) of each token inside its own sample
    sample_index: Tensor  # [tokens/cp] int64: which sample each token belongs to
    timesteps: Tensor  # [samples] float32 in [0, 1]; 0 is noise, 1 is data
    # Lengths of the whole pack's samples, the same on every cp rank; by chunks where they are split over a ring.
    self_segments: Segments | RingSegments
    text: Tensor | None = None  # [text_tokens, text_width] float: the captions, packed likewise
    cross_segments: Segments | None = None  # this rank's tokens of each sample -> that sample's text
    class_labels: Tensor | None = None  # [samples] int64, for the class-conditional pilot

    def to(self, device: torch.device, dtype: torch.dtype) -> "PackedBatch":
        """Moved to a device; patches and text cast to `dtype`, timesteps kept in fp32 (fp64 under fp64)."""
        time_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def put(tensor: Tensor | None, kind: torch.dtype | None = None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=kind, non_blocking=True)

        return PackedBatch(
            patches=self.patches.to(device=device, dtype=dtype, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            sample_index=self.sample_index.to(device, non_blocking=True),
            timesteps=self.timesteps.to(device=device, dtype=time_dtype, non_blocking=True),
            self_segments=self.self_segments,
            text=put(self.text, dtype),
            cross_segments=self.cross_segments,
            class_labels=put(self.class_labels),
        )
