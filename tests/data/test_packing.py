"""Packing: patches come back, noise belongs to samples, and a rank's part is a part of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.config.training import FlowConfig
from goku_mega.data.packing import pack_prompts, pack_training, patchify, token_positions, unpatchify
from goku_mega.data.shards import Sample
from goku_mega.model.packed import Segments
from goku_mega.model.sizes import model_shape
from goku_mega.parallel.context import context_tokens, deal
from goku_mega.parallel.layout import Layout

SHAPE = model_shape("tiny")
NULL = torch.zeros(1, 64)


def make_samples(*shapes: tuple[int, int, int]) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(f"s{number}", torch.randn(16, *shape, generator=generator), torch.randn(2 + number, 64))
        for number, shape in enumerate(shapes)
    ]


def pack(samples, **changes):
    settings = {
        "seed": 1, "step": 3, "flow": FlowConfig(), "caption_dropout": 0.0, "null_text": NULL, "shape": SHAPE,
    }  # fmt: skip
    return pack_training(samples, **{**settings, **changes})


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 4), (1, 1, 1)])
def test_patches_give_the_latent_back_and_stand_in_row_major_order(patch):
    latent = torch.arange(3 * 4 * 6 * 8, dtype=torch.float32).reshape(3, 4, 6, 8)
    tokens = patchify(latent, patch)
    assert torch.equal(unpatchify(tokens, (4, 6, 8), patch), latent)
    for token, (t, h, w) in zip(tokens, token_positions((4, 6, 8), patch), strict=True):
        pt, ph, pw = patch
        corner = latent[:, t * pt : (t + 1) * pt, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw]
        assert torch.equal(token, corner.flatten())


def stored(latent: torch.Tensor, order: tuple[int, ...], offset: int, step: int) -> torch.Tensor:
    """An equal tensor with its axes in another order in memory, after `offset` numbers, `step` numbers apart."""
    inner = latent.permute(order)
    memory = torch.zeros(offset + step * inner.numel(), dtype=latent.dtype)
    memory[offset::step] = inner.flatten()
    back = sorted(range(4), key=lambda axis: order[axis])
    return memory[offset::step].view(inner.shape).permute(back)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8]),
    patch=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 3),
    order=st.permutations(range(4)),
    offset=st.integers(0, 3),
    step=st.integers(1, 2),
)
def test_patches_have_the_latents_bits_however_it_lies_in_memory(dtype, patch, grid, channels, order, offset, step):
    sizes = [cells * size for cells, size in zip(grid, patch, strict=True)]
    width_bytes = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(256, (channels, *sizes, width_bytes), dtype=torch.uint8)  # not numbers among them
    plain = bits.view(dtype).reshape(channels, *sizes)
    latent = stored(plain, tuple(order), offset, step)
    assert torch.equal(bits_of(latent), bits_of(plain))
    (t, h, w), (pt, ph, pw) = grid, patch
    cells = plain.reshape(channels, t, pt, h, ph, w, pw).permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, -1)
    tokens = patchify(latent, patch)
    assert tokens.shape == cells.shape and tokens.dtype == dtype
    assert torch.equal(bits_of(tokens), bits_of(cells))


def test_a_samples_noise_time_and_text_are_its_own_whatever_it_is_packed_with():
    samples = make_samples((3, 8, 8), (1, 8, 8), (2, 4, 6))
    together = pack(samples)
    lengths = together.packed.self_segments.q_lengths
    found = {length: number for number, length in enumerate(lengths)}
    for sample in samples:
        alone = pack([sample])
        number = found[len(alone.packed.patches)]
        start = sum(lengths[:number])
        tokens = slice(start, start + lengths[number])
        assert torch.equal(together.packed.patches[tokens], alone.packed.patches)
        assert torch.equal(together.velocity[tokens], alone.velocity)
        assert together.packed.timesteps[number] == alone.packed.timesteps[0]


def test_the_noisy_patches_lie_on_the_straight_path():
    samples = make_samples((3, 8, 8))
    batch = pack(samples, dtype=torch.float64)
    t = batch.packed.timesteps
    x_1 = patchify(samples[0].latent.double(), SHAPE.patch)
    torch.testing.assert_close(batch.packed.patches + (1 - t) * batch.velocity, x_1, atol=1e-6, rtol=0)


def test_a_step_a_seed_or_a_key_changes_the_noise_and_nothing_else_does():
    samples = make_samples((1, 8, 8))
    batch = pack(samples)
    assert torch.equal(pack(samples).packed.patches, batch.packed.patches)
    assert not torch.equal(pack(samples, step=4).velocity, batch.velocity)
    assert not torch.equal(pack(samples, seed=2).velocity, batch.velocity)
    assert not torch.equal(pack([samples[0]._replace(key="other")]).velocity, batch.velocity)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_the_parts_of_context_parallel_ranks_put_together_are_the_whole(ulysses, ring):
    samples = make_samples((3, 8, 8), (1, 2, 6), (1, 8, 8), (1, 2, 2))
    cp = ulysses * ring
    whole = pack(samples, token_multiple=cp)
    parts = [pack(samples, layout=Layout(ulysses=ulysses, ring=ring), cp_rank=rank) for rank in range(cp)]
    lengths = whole.packed.self_segments.q_lengths
    tokens = [context_tokens(lengths, rank, ulysses=ulysses, ring=ring) for rank in range(cp)]
    back = torch.cat(tokens).argsort()
    for name in ("patches", "positions", "sample_index"):
        joined = torch.cat([getattr(part.packed, name) for part in parts])[back]
        assert torch.equal(joined, getattr(whole.packed, name))
    for name in ("loss_weight", "velocity"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts])[back], getattr(whole, name))
    local = torch.tensor([part.packed.cross_segments.q_lengths for part in parts])
    assert tuple(local.sum(0).tolist()) == lengths
    assert {part.packed.self_segments for part in parts} == {
        deal(lengths, ring) if ring > 1 else Segments(lengths, lengths)
    }


def test_padding_weighs_nothing_and_real_tokens_weigh_one():
    batch = pack(make_samples((1, 2, 6), (1, 2, 2)), token_multiple=8)
    assert batch.real_tokens == 4 and batch.padded_tokens == 8
    assert batch.loss_weight.sum() == 4
    assert batch.loss_weight[4:].abs().max() == 0


def test_an_empty_pack_is_padding_only():
    batch = pack([], token_multiple=4)
    assert batch.real_tokens == 0 and len(batch.packed.patches) == 4 and batch.loss_weight.sum() == 0


def test_captions_are_dropped_at_the_rate_asked_for():
    sample = make_samples((1, 2, 2))[0]
    dropped = [pack([sample], step=step, caption_dropout=0.25).packed.text.shape[0] == 1 for step in range(400)]
    assert 0.18 < sum(dropped) / 400 < 0.32


def test_prompts_keep_their_order():
    latents = [torch.randn(16, 3, 4, 4), torch.randn(16, 1, 2, 2)]
    batch = pack_prompts(latents, [torch.ones(3, 64), torch.ones(5, 64)], [0.25, 0.5], SHAPE)
    assert batch.self_segments.q_lengths == (12, 1)
    assert batch.cross_segments.kv_lengths == (3, 5)
    assert batch.timesteps.tolist() == [0.25, 0.5]
