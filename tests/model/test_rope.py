"""3D RoPE: lengths kept, only differences of positions count, each axis has its own share."""

import pytest
import torch

from goku_mega.kernels.fused import rotate
from goku_mega.model.rope import axis_widths, rotary_from_positions


@pytest.mark.parametrize(("head_dim", "widths"), [(64, (24, 20, 20)), (72, (24, 24, 24)), (32, (12, 10, 10))])
def test_every_axis_has_an_even_share(head_dim, widths):
    assert axis_widths(head_dim) == widths
    assert sum(widths) == head_dim


def dot(query, key, query_at, key_at):
    positions = torch.tensor([query_at, key_at])
    rotary = rotary_from_positions(positions, query.shape[-1], torch.float64)
    turned = rotate(torch.stack((query, key))[:, None], *rotary)
    return (turned[0] * turned[1]).sum()


def test_a_score_depends_on_the_offset_of_the_positions_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    here = dot(query, key, (3, 5, 7), (1, 2, 9))
    there = dot(query, key, (13, 6, 27), (11, 3, 29))
    elsewhere = dot(query, key, (3, 5, 7), (1, 3, 9))
    torch.testing.assert_close(here, there, atol=1e-12, rtol=1e-12)
    assert abs(here - elsewhere) > 1e-3


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    heads = torch.randn(4, 2, 72, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions = torch.tensor([[0, 0, 0], [60, 44, 79], [1, 0, 0], [0, 0, 3]])
    turned = rotate(heads, *rotary_from_positions(positions, 72, torch.float64))
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    assert torch.equal(turned[0], heads[0])


def test_an_axis_turns_only_its_own_share_of_a_head():
    heads = torch.ones(3, 1, 64, dtype=torch.float64)
    rotary = rotary_from_positions(torch.eye(3, dtype=torch.int64), 64, torch.float64)
    moved = (rotate(heads, *rotary) != heads)[:, 0]
    shares = [(0, 24), (24, 44), (44, 64)]
    for axis, (start, stop) in enumerate(shares):
        assert moved[axis, start:stop].any()
        assert not moved[axis, :start].any() and not moved[axis, stop:].any()
