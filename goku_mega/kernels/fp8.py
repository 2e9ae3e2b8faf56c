"""Linear layers in FP8 with torch alone: each tensor is scaled by its own largest number, then multiplied in 8 bits.

Activations and weights are e4m3, gradients e5m2 (arXiv 2209.05433); all three products of a layer, forward, to the
input and to the weight, run on the tensor cores' FP8 path through torch's scaled product, and add up in fp32. The
layers are megatron-core's, with the product exchanged, so that communication stays where it was.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

ALIGNMENT = 16
"""cuBLAS multiplies FP8 matrices whose sides are multiples of this."""
FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in FP8, forward and backward.

    Args:
        x: [tokens, in], bf16 or fp32; any number of tokens.
        weight: [out, in]; both multiples of 16.

    Returns:
        [tokens, out] in x's type. Between calls only the FP8 copy of x is kept, one byte a number.
    """
    return _Fp8Linear.apply(x, weight)


def quantise(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 under one scale: its largest number becomes the largest that `kind` can hold.

    Returns:
        The matrix in `kind`, and the fp32 scalar that its numbers are to be multiplied with.
    """
    x = x.contiguous()
    return _quantise_in_one_kernel()(x, kind) if x.is_cuda else _quantise(x, kind)


def _quantise(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(kind).max
    # A matrix of zeros gets a scale that keeps them zeros; NaN and infinity go through to the result.
    amax = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).clamp(min=1e-30)
    scale = amax / largest
    # Rounding may leave the largest number a little above what `kind` holds, and e4m3 has no infinity.
    return (x.float() / scale).clamp(-largest, largest).to(kind), scale


@functools.cache
def _quantise_in_one_kernel() -> Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]:
    # Sizes stay symbols, so that packs of other lengths do not compile again.
    return torch.compile(_quantise, dynamic=True)


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b.T of FP8 matrices a [m, k] and b [n, k], times their scales; [m, n] in `dtype`.

    Both lie with the contracted axis innermost: the one arrangement that Hopper multiplies in FP8.
    """
    # Gradients add up in full fp32; forward products take Hopper's faster sum, which keeps fewer bits.
    fast = GRADIENT not in (a.dtype, b.dtype)
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


def _turned(matrix: Tensor) -> Tensor:
    """FP8 [rows, columns] -> [columns, rows up to a multiple of 16]: zeros fill up, and add nothing to a product."""
    fill = -matrix.shape[0] % ALIGNMENT
    return F.pad(matrix.view(torch.uint8), (0, 0, 0, fill)).t().contiguous().view(matrix.dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        x_fp8, x_scale = quantise(x, FORWARD)
        weight_fp8, weight_scale = quantise(weight, FORWARD)
        # Not the FP8 weight: under FSDP it would outlive the gathered weight it was made of.
        ctx.save_for_backward(x_fp8, x_scale, weight)
        ctx.dtype = x.dtype
        return scaled_product(x_fp8, x_scale, weight_fp8, weight_scale, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
        x_fp8, x_scale, weight = ctx.saved_tensors
        grad_fp8, grad_scale = quantise(grad, GRADIENT)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight_fp8, weight_scale = quantise(weight, FORWARD)
            grad_x = scaled_product(grad_fp8, grad_scale, _turned(weight_fp8), weight_scale, ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = scaled_product(_turned(grad_fp8), grad_scale, _turned(x_fp8), x_scale, weight.dtype)
        return grad_x, grad_weight


def _parallel_product(
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    **_: object,
) -> Tensor:
    """megatron-core's product of a parallel layer, by its keywords; the others steer fusions that FSDP leaves no use.

    A rank scales what it holds: a whole input, its own part of a weight, its own columns of a split input. Other
    layouts therefore round to other FP8 numbers, and agree to the rounding of FP8 instead of that of the sums.
    """
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = fp8_linear(input, weight)
    return output if bias is None else output + bias


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel layer with FP8 products."""

    _forward_impl = staticmethod(_parallel_product)


class Fp8RowParallelLinear(RowParallelLinear):
    """Row-parallel layer with FP8 products; its results are summed over the ranks in the type of the activations."""

    _forward_impl = staticmethod(_parallel_product)
