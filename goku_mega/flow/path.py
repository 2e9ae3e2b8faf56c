"""The straight path from noise to data and the loss on its velocity (arXiv 2502.04896 section 2.3).

Symbols are the paper's: x_1 is data, x_0 is noise, x_t lies between them, t = 1 is data.
"""

import torch
from torch import Tensor


def interpolate(x_1: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """x_t = t x_1 + (1 - t) x_0 (paper section 2.3).

    Args:
        x_1, x_0: [n, ...] of equal shape.
        t: [n] in [0, 1], or a scalar; fp32 or better.
    """
    t = t.reshape(t.shape + (1,) * (x_1.dim() - t.dim()))
    return t * x_1 + (1 - t) * x_0


def velocity(x_1: Tensor, x_0: Tensor) -> Tensor:
    """dx_t / dt = x_1 - x_0, what the model learns to predict at x_t (paper section 2.3)."""
    return x_1 - x_0


def velocity_loss(predicted: Tensor, target: Tensor, weight: Tensor, total_weight: float) -> Tensor:
    """Weighted mean over tokens of the mean squared error of a token's velocity, fp32 or better.

    Args:
        predicted, target: [tokens, patch_dim].
        weight: [tokens]; 0 for padding.
        total_weight: sum of the weights over the whole global batch, so that the losses (and the
            gradients) of all ranks and micro-batches simply add up.
    """
    wide = torch.promote_types(predicted.dtype, torch.float32)
    squared = (predicted.to(wide) - target.to(wide)).square().mean(dim=-1)  # [tokens]
    return (weight.to(wide) * squared).sum() / total_weight
