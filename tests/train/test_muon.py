"""Muon: updates that are nearly orthogonal, and the exchange that makes them of whole matrices."""

import pytest
import torch

from goku_mega.train.muon import BUCKET_NUMBERS, _buckets, orthogonalised


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_an_update_keeps_the_directions_and_levels_their_strengths(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, strengths, right = torch.linalg.svd(matrix, full_matrices=False)
    # In the matrix's own singular directions the update is diagonal, and its numbers are near 1.
    levelled = left.T @ orthogonalised(matrix[None])[0] @ right.T
    torch.testing.assert_close(levelled, torch.diag(levelled.diagonal()), atol=1e-10, rtol=0)
    seen = strengths > 0.01 * strengths.norm()
    assert levelled.diagonal()[seen].min() > 0.65
    assert levelled.diagonal().max() < 1.25


def test_it_agrees_with_torchs_own_to_the_rounding_of_bf16():
    """torch.optim.Muon is for whole matrices on one device, in bf16; the formula is the same."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.zeros(32, 64))
    weight.grad = torch.randn(32, 64, generator=generator)
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    ours = -0.2 * 64**0.5 * orthogonalised(weight.grad[None])[0]
    assert (weight.detach() - ours).norm() < 0.03 * ours.norm()


def test_no_gradient_is_no_update():
    assert not orthogonalised(torch.zeros(2, 4, 8)).any()


def test_buckets_hold_every_matrix_once_and_no_more_than_they_may():
    numbers = {f"m{n}": BUCKET_NUMBERS // 3 + n for n in range(7)} | {"large": 2 * BUCKET_NUMBERS}
    buckets = _buckets(numbers)
    assert sorted(name for bucket in buckets for name in bucket) == sorted(numbers)
    assert all(len(bucket) == 1 or sum(numbers[name] for name in bucket) <= BUCKET_NUMBERS for bucket in buckets)
