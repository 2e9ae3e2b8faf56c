"""A pack's tokens cut into pieces of one sample each: what each program of a fused kernel works on."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_ROWS = 32
"""Most tokens of a piece: enough to read a sample's shift and scale seldom, few enough that 8K tokens keep every
multiprocessor of a large GPU busy."""


class Pieces(NamedTuple):
    """Made of whole-tensor operations, so that no launch waits for the device."""

    order: Tensor  # [tokens] int32: the tokens, sample after sample
    begin: Tensor  # [pieces] int32: where each piece begins in `order`
    end: Tensor  # [pieces] int32: and where it ends; some pieces at the end are empty
    sample: Tensor  # [pieces] int32
    edges: Tensor  # [samples + 1] int32: the first piece of each sample


def sample_pieces(sample_index: Tensor, samples: int) -> Pieces:
    """Cut tokens into pieces of at most PIECE_ROWS tokens of one sample.

    Args:
        sample_index: [tokens] int64, in any order.
        samples: samples of the pack, those without a token here included.
    """
    device = sample_index.device
    in_order, order = torch.sort(sample_index, stable=True)
    rows = torch.searchsorted(in_order, torch.arange(samples + 1, device=device))  # each sample's first place
    edges = F.pad(((rows.diff() + PIECE_ROWS - 1) // PIECE_ROWS).cumsum(0), (1, 0))
    # The most pieces there can be, known without asking the device; those that are too many come out empty.
    number = torch.arange(sample_index.numel() // PIECE_ROWS + samples, device=device)
    sample = torch.searchsorted(edges[1:], number, right=True).clamp(max=samples - 1)
    begin = rows[sample] + (number - edges[sample]) * PIECE_ROWS
    end = torch.minimum(begin + PIECE_ROWS, rows[sample + 1])
    return Pieces(*(part.int() for part in (order, begin, end, sample, edges)))
