"""The work between the matrix products: as plain operations, which are the reference, and as Triton kernels.

Modulated norm, gate-and-add (adaLN-Zero, paper section 2.2), and query-key norm with rotation. Each sample of a pack
has its own timestep, so each token takes its own sample's shift, scale and gate. Those rows are gathered again in the
backward pass instead of being kept: a stored [tokens, 6 x hidden] tensor would be 8 GB a layer for the 8B model at
220K tokens.
"""

import importlib.util

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from goku_mega.kernels.pieces import Pieces


def fused_available(device: torch.device) -> bool:
    """Whether the Triton kernels can run there."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    sample_index: Tensor,
    *,
    eps: float,
    weight: Tensor | None = None,
    pieces: Pieces | None = None,
) -> Tensor:
    """norm(x) * (1 + scale) + shift with each token's own sample's shift and scale, in fp32 or better.

    Args:
        x: [tokens, hidden].
        shift, scale: [samples, hidden], fp32 or better.
        sample_index: [tokens] int64.
        eps: added to the mean square.
        weight: [hidden], and the norm is RMSNorm; without it, LayerNorm without affine.
        pieces: of the same tokens, and one Triton kernel does it; without them, plain operations.
    """
    if pieces is not None:
        from goku_mega.kernels.triton_fused import FusedModulatedNorm

        return FusedModulatedNorm.apply(x, shift, scale, weight, pieces, eps)
    width = x.shape[-1:]
    normed = F.layer_norm(x, width, eps=eps) if weight is None else F.rms_norm(x, width, weight, eps)
    return _Modulate.apply(normed, shift, scale, sample_index)


def gated_add(
    residual: Tensor,
    update: Tensor,
    gate: Tensor,
    sample_index: Tensor,
    *,
    bias: Tensor | None = None,
    pieces: Pieces | None = None,
) -> Tensor:
    """residual + gate * (update + bias) with each token's own sample's gate, in fp32 or better.

    Args:
        residual, update: [tokens, hidden].
        gate: [samples, hidden], fp32 or better.
        sample_index: [tokens] int64.
        bias: [hidden].
        pieces: as in `modulated_norm`.
    """
    if pieces is not None:
        from goku_mega.kernels.triton_fused import FusedGatedAdd

        return FusedGatedAdd.apply(residual, update, gate, bias, pieces)
    return _GatedAdd.apply(residual, update if bias is None else update + bias, gate, sample_index)


def norm_and_rotate(
    heads: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor] | None,
    *,
    group: dist.ProcessGroup,
    eps: float,
    fused: bool,
) -> tuple[Tensor, ...]:
    """RMSNorm of the first parts over all heads of all tensor-parallel ranks together, then 3D RoPE.

    Args:
        heads: [tokens, heads/tp, parts, head_dim], as a projection gives them; the strides are free.
        weights: [inner width/tp] each: of the first part, or of the first two; the others pass as they are.
        rotary: cos and sin of every token's angles, [tokens, 1, head_dim / 2] each; None does not rotate.
        group: the tensor-parallel ranks.
        eps: added to the mean square.
        fused: do it in Triton kernels; else in plain operations.

    Returns:
        Every part, [tokens, heads/tp, head_dim].
    """
    if fused:
        from goku_mega.kernels.triton_fused import FusedNormAndRotate

        return FusedNormAndRotate.apply(heads, rotary, group, eps, *weights)
    parts = list(heads.unbind(2))
    for number, weight in enumerate(weights):
        normed = _inner_rms_norm(parts[number].flatten(1), weight, group, eps).view_as(parts[number])
        parts[number] = normed if rotary is None else rotate(normed, *rotary)
    return tuple(parts)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved pairs (0, 1), (2, 3), ... of every head by its token's angles.

    Args:
        heads: [tokens, heads, head_dim].
        cos, sin: [tokens, 1, head_dim / 2].
    """
    even, odd = heads.unflatten(-1, (-1, 2)).to(cos.dtype).unbind(-1)  # [tokens, heads, head_dim / 2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(heads.dtype)


def _inner_rms_norm(x: Tensor, weight: Tensor, group: dist.ProcessGroup, eps: float) -> Tensor:
    """x: [tokens, width/tp]; the mean square is over the width of all ranks."""
    width = x.shape[-1] * group.size()
    if group.size() == 1:
        return F.rms_norm(x, (width,), weight, eps)
    wide = _wide(x)
    square_sum = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), group)  # [tokens, 1]
    return (wide * torch.rsqrt(square_sum / width + eps) * weight).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Sum over a group, forward and backward: every rank's output depends on every rank's input."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


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


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum_by_sample(per_token: Tensor, sample_index: Tensor, like: Tensor) -> Tensor:
    """Sum of the tokens of every sample, [samples, hidden]."""
    return torch.zeros_like(like).index_add_(0, sample_index, per_token.to(like.dtype))
