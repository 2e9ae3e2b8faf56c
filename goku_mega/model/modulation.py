"""Per-sample shift, scale and gate applied to packed tokens (adaLN-Zero, paper section 2.2).

Each sample of a pack has its own timestep, so each token takes its own sample's row. The rows are
gathered again in the backward pass instead of being kept: a stored [tokens, 6 x hidden] tensor
would be 8 GB a layer for the 8B model at 220K tokens.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, shift: Tensor, scale: Tensor, sample_index: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, sample_index)
        wide = _wide(x)
        return torch.addcmul(wide + shift[sample_index], wide, scale[sample_index]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, scale, sample_index = ctx.saved_tensors
        wide_grad = _wide(grad)
        grad_x = torch.addcmul(wide_grad, wide_grad, scale[sample_index]).to(x.dtype)
        grad_shift = _sum_by_sample(wide_grad, sample_index, scale)
        grad_scale = _sum_by_sample(wide_grad * x, sample_index, scale)
        return grad_x, grad_shift, grad_scale, None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, update: Tensor, gate: Tensor, sample_index: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate, sample_index)
        return torch.addcmul(_wide(residual), gate[sample_index], _wide(update)).to(residual.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        update, gate, sample_index = ctx.saved_tensors
        wide_grad = _wide(grad)
        grad_update = (wide_grad * gate[sample_index]).to(update.dtype)
        return grad, grad_update, _sum_by_sample(wide_grad * update, sample_index, gate), None


def modulate(x: Tensor, shift: Tensor, scale: Tensor, sample_index: Tensor) -> Tensor:
    """x * (1 + scale) + shift with each token's own sample's shift and scale, in fp32 or better.

    Args:
        x: [tokens, hidden].
        shift, scale: [samples, hidden], fp32 or better.
        sample_index: [tokens] int64.
    """
    return _Modulate.apply(x, shift, scale, sample_index)


def gated_add(residual: Tensor, update: Tensor, gate: Tensor, sample_index: Tensor) -> Tensor:
    """residual + gate * update with each token's own sample's gate, in fp32 or better.

    Args:
        residual, update: [tokens, hidden].
        gate: [samples, hidden], fp32 or better.
        sample_index: [tokens] int64.
    """
    return _GatedAdd.apply(residual, update, gate, sample_index)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum_by_sample(per_token: Tensor, sample_index: Tensor, like: Tensor) -> Tensor:
    """Sum of the tokens of every sample, [samples, hidden]."""
    return torch.zeros_like(like).index_add_(0, sample_index, per_token.to(like.dtype))
