"""Samples to one packed batch: patches end to end, with noise and times that belong to the samples.

Noise, time and caption dropout depend on (seed, data step, sample key) only, so the same sample trains
on the same numbers in every layout and after every restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from goku_mega.config.training import FlowConfig
from goku_mega.data.shards import Sample
from goku_mega.flow.path import interpolate, velocity
from goku_mega.flow.timesteps import draw_time
from goku_mega.model.packed import PackedBatch, Segments
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.context import context_tokens, deal
from goku_mega.parallel.layout import Layout
from goku_mega.seeding import derive_seed

ITEMS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Types by their sizes in bytes, for copies to which it does not matter what the bytes mean."""


@dataclass(frozen=True)
class TrainingBatch:
    """A packed batch of noisy samples and what the model should answer."""

    packed: PackedBatch
    velocity: Tensor  # [tokens/cp, patch_dim]
    loss_weight: Tensor  # [tokens/cp]; 1, or 0 on padding
    real_tokens: int
    """Tokens of real samples in the whole pack, over all context-parallel ranks."""
    padded_tokens: int
    """All tokens of the whole pack."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "TrainingBatch":
        """Moved to a device, the model's inputs in `dtype`."""
        return replace(
            self,
            packed=self.packed.to(device, dtype),
            velocity=self.velocity.to(device, non_blocking=True),
            loss_weight=self.loss_weight.to(device, non_blocking=True),
        )


def patchify(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Latent [channels, t, h, w] to tokens [tokens, patch_dim]: row-major over (t, h, w), channels first inside.

    No gradient passes through it.
    """
    channels = latent.shape[0]
    t, h, w = (size // p for size, p in zip(latent.shape[1:], patch, strict=True))
    cells = _joined(latent, patch[2]).reshape(channels, t, patch[0], h, patch[1], w, -1)
    ordered = cells.permute(1, 3, 5, 0, 2, 4, 6).clone(memory_format=torch.contiguous_format)
    return ordered.view(t * h * w, -1).view(latent.dtype)


def _joined(latent: Tensor, count: int) -> Tensor:
    """The same bytes with `count` neighbouring numbers as one item, where a type is as large; else the latent."""
    # A copy into another order goes item by item, and is the faster the fewer there are: three to eight times for
    # pairs of fp32.
    kind = ITEMS.get(count * latent.element_size())
    if kind is None:
        return latent
    if latent.stride(-1) != 1 or any(step % count for step in (*latent.stride()[:-1], latent.storage_offset())):
        latent = latent.clone(memory_format=torch.contiguous_format)
    return latent.view(kind)


def unpatchify(tokens: Tensor, latent_shape: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Tokens [tokens, patch_dim] back to the latent [channels, t, h, w]; `latent_shape` is (t, h, w)."""
    t, h, w = (size // p for size, p in zip(latent_shape, patch, strict=True))
    cells = tokens.reshape(t, h, w, -1, *patch)
    return cells.permute(3, 0, 4, 1, 5, 2, 6).reshape(-1, *latent_shape)


def token_positions(latent_shape: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """(t, h, w) of every token of a sample, [tokens, 3] int64."""
    axes = (torch.arange(size // p) for size, p in zip(latent_shape, patch, strict=True))
    return torch.cartesian_prod(*axes).reshape(-1, 3)


def token_count(latent_shape: tuple[int, int, int], patch: tuple[int, int, int]) -> int:
    return int(np.prod([size // p for size, p in zip(latent_shape, patch, strict=True)]))


def pack_training(
    samples: Sequence[Sample],
    *,
    seed: int,
    step: int,
    flow: FlowConfig,
    caption_dropout: float,
    null_text: Tensor,
    shape: ModelShape,
    layout: Layout = Layout(),
    cp_rank: int = 0,
    token_multiple: int = 1,
    dtype: torch.dtype = torch.float32,
) -> TrainingBatch:
    """Noise the samples and pack them; the context-parallel rank's tokens are kept.

    Neighbours of equal shape attend in one call, so the samples are packed in the order of their
    shapes. The pack is filled with one sample of weight 0, so that the layout splits it into equal slices of a
    multiple of `token_multiple` tokens.
    """
    ordered = sorted(samples, key=lambda sample: (*sample.latent.shape, len(sample.text), sample.key))
    x_t, targets, times, texts, positions = [], [], [], [], []
    places = {grid: token_positions(grid, shape.patch) for grid in {_latent_shape(sample.latent) for sample in ordered}}
    for sample in ordered:
        x_1 = sample.latent.to(dtype)
        generator = torch.Generator().manual_seed(derive_seed(seed, "noise", step, sample.key))
        # Drawn in fp32 whatever the dtype, so that fp64 runs see the same noise.
        x_0 = torch.randn(x_1.shape, generator=generator).to(dtype)
        grid = _latent_shape(x_1)
        t = draw_time(flow, seed=derive_seed(seed, "time", step, sample.key), tokens=len(places[grid]))
        x_t.append(patchify(interpolate(x_1, x_0, torch.tensor(t, dtype=dtype)), shape.patch))
        targets.append(patchify(velocity(x_1, x_0), shape.patch))
        positions.append(places[grid])
        times.append(t)
        dropped = derive_seed(seed, "caption", step, sample.key) / 2**63 < caption_dropout
        texts.append(null_text if dropped else sample.text)
    real = sum(len(patches) for patches in x_t)
    multiple = layout.token_multiple * token_multiple
    padding = -real % multiple or (multiple if real == 0 else 0)
    if padding:
        x_t.append(torch.zeros(padding, shape.patch_dim, dtype=dtype))
        targets.append(torch.zeros(padding, shape.patch_dim, dtype=dtype))
        positions.append(torch.zeros(padding, 3, dtype=torch.int64))
        times.append(0.0)
        texts.append(null_text)
    packed = _pack(x_t, positions, times, texts, shape, dtype)
    weight = torch.ones(real + padding, dtype=dtype)
    weight[real:] = 0
    velocities = torch.cat(targets)
    if layout.cp > 1:
        lengths = [len(tokens) for tokens in x_t]
        mine = context_tokens(lengths, cp_rank, ulysses=layout.ulysses, ring=layout.ring)
        packed, velocities, weight = context_part(packed, mine, layout.ring), velocities[mine], weight[mine]
    return TrainingBatch(
        packed=packed,
        velocity=velocities,
        loss_weight=weight,
        real_tokens=real,
        padded_tokens=real + padding,
    )


def pack_prompts(
    latents: Sequence[Tensor], texts: Sequence[Tensor], timesteps: Sequence[float], shape: ModelShape
) -> PackedBatch:
    """Latents [channels, t, h, w] at their times with their texts [tokens, width], in the order given."""
    patches = [patchify(latent, shape.patch) for latent in latents]
    positions = [token_positions(_latent_shape(latent), shape.patch) for latent in latents]
    return _pack(patches, positions, timesteps, texts, shape, latents[0].dtype)


def context_part(batch: PackedBatch, tokens: Tensor, ring: int) -> PackedBatch:
    """The given tokens of a whole pack, with what attention has to know of the others; every sample keeps its place.

    Args:
        tokens: numbers of the tokens, ascending; `parallel.context.context_tokens` deals them.
    """
    assert isinstance(batch.self_segments, Segments)
    segments, cross = batch.self_segments, batch.cross_segments
    if cross is not None:
        local = torch.bincount(batch.sample_index[tokens], minlength=len(batch.timesteps))
        cross = Segments(tuple(local.tolist()), cross.kv_lengths)
    return replace(
        batch,
        patches=batch.patches[tokens],
        positions=batch.positions[tokens],
        sample_index=batch.sample_index[tokens],
        self_segments=deal(segments.q_lengths, ring) if ring > 1 else segments,
        cross_segments=cross,
    )


def _pack(
    patches: Sequence[Tensor], positions: Sequence[Tensor], times: Sequence[float], texts: Sequence[Tensor],
    shape: ModelShape, dtype: torch.dtype,
) -> PackedBatch:  # fmt: skip
    lengths = tuple(len(tokens) for tokens in patches)
    text_lengths = tuple(len(text) for text in texts)
    has_text = shape.text_width is not None
    time_dtype = torch.promote_types(dtype, torch.float32)
    return PackedBatch(
        patches=torch.cat(list(patches)),
        positions=torch.cat(list(positions)),
        sample_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        timesteps=torch.tensor(times, dtype=time_dtype),
        self_segments=Segments(lengths, lengths),
        text=torch.cat(list(texts)).to(dtype) if has_text else None,
        cross_segments=Segments(lengths, text_lengths) if has_text else None,
    )


def _latent_shape(latent: Tensor) -> tuple[int, int, int]:
    _, t, h, w = latent.shape
    return t, h, w
