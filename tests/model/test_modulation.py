"""Modulation of packed tokens: right values and gradients, and no per-token rows kept."""

import torch

from goku_mega.model.modulation import gated_add, modulate

INDEX = torch.tensor([0, 0, 2, 2, 2, 1])


def draw(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)


def test_gradients_are_those_of_the_written_out_formula():
    x, y, rows = draw(6, 4), draw(6, 4).detach().mul(2).requires_grad_(), draw(3, 4)
    assert torch.autograd.gradcheck(lambda x, r: modulate(x, r, 2 * r, INDEX), (x, rows))
    assert torch.autograd.gradcheck(lambda x, y, r: gated_add(x, y, r, INDEX), (x, y, rows))
    torch.testing.assert_close(modulate(x, rows, 2 * rows, INDEX), x * (1 + 2 * rows[INDEX]) + rows[INDEX])
    torch.testing.assert_close(gated_add(x, y, rows, INDEX), x + y * rows[INDEX])


def test_nothing_of_the_size_of_the_rows_times_tokens_is_kept_for_the_backward_pass():
    x, rows = draw(6, 4), draw(3, 4)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        modulate(x, rows, rows, INDEX)
        gated_add(x, x, rows, INDEX)
    assert kept.count((6, 4)) == 2  # the activations themselves, once each
    assert all(shape in {(6, 4), (3, 4), (6,)} for shape in kept)


def test_bf16_tokens_are_modulated_in_fp32():
    x = torch.full((6, 4), 1.0078125, dtype=torch.bfloat16)
    scale = torch.full((3, 4), 1e-3)
    exact = (x.float() * (1 + scale[INDEX])).to(torch.bfloat16)
    assert torch.equal(modulate(x, torch.zeros(3, 4), scale, INDEX), exact)
