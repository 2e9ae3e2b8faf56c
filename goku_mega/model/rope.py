"""3D rotary position embedding from the (t, h, w) position of each token (paper section 2.2).

Each axis turns its own share of a head's interleaved pairs. The angles are computed once a forward
pass, in fp32 or better, and handed to every block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rotary(NamedTuple):
    """cos and sin of every token's angles, both [tokens, 1, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's numbers turn with t, h and w: a third each, the remainder to t.

    64 -> (24, 20, 20), 72 -> (24, 24, 24).
    """
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rotary_from_positions(positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Rotary:
    """Angles position x THETA^(-2i / width), axis after axis.

    Args:
        positions: [tokens, 3] integers (t, h, w).
        head_dim: even width of a head.
        dtype: float32, or float64 under fp64.
    """
    angles = []
    for axis, width in enumerate(axis_widths(head_dim)):
        exponents = torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width
        angles.append(positions[:, axis, None].to(dtype) * THETA**-exponents)  # [tokens, width / 2]
    angle = torch.cat(angles, dim=1)[:, None]  # [tokens, 1, head_dim / 2]
    return Rotary(angle.cos(), angle.sin())
