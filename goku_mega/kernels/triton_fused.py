"""Triton kernels of `kernels.fused`, forward and backward, one launch for each pass over the tokens.

A program works through the rows of one piece, with that sample's shift, scale or gate in registers. Sums over tokens
are first taken in each piece and then over the pieces in a fixed order, without atomics, so that runs repeat bitwise.
Token and sample counts are run-time values: only the width, the head width and the types make another compilation.
"""
# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that Triton types itself.

import math

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from goku_mega.kernels.pieces import PIECE_ROWS, Pieces

SUM_ROWS, SUM_COLUMNS = 32, 64  # one step of adding up the pieces of a sample


@triton.jit
def modulated_norm_forward(
    x, weight, shift, scale, out, mean, rstd, order, begin, end, piece_sample,
    EPS: tl.constexpr, LAYER_NORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One piece: out = norm(x) * (1 + scale) + shift, and each row's mean (of LayerNorm) and inverse deviation."""
    piece = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    sample = tl.load(piece_sample + piece).to(tl.int64)
    offset = tl.load(shift + sample * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE)
    factor = tl.load(scale + sample * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE) + 1.0
    if not LAYER_NORM:
        factor *= tl.load(weight + columns, mask=inside, other=0.0).to(COMPUTE)
    for place in range(tl.load(begin + piece), tl.load(end + piece)):
        row = tl.load(order + place).to(tl.int64)
        values = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE)
        if LAYER_NORM:
            centre = tl.sum(values) / WIDTH
            values = tl.where(inside, values - centre, 0.0)
            tl.store(mean + row, centre)
        inverse = tl.rsqrt(tl.sum(values * values) / WIDTH + EPS)
        tl.store(rstd + row, inverse)
        tl.store(out + row * WIDTH + columns, values * inverse * factor + offset, mask=inside)


@triton.jit
def modulated_norm_backward(
    grad, x, weight, scale, mean, rstd, grad_x, partial, order, begin, end, piece_sample,
    LAYER_NORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One piece: the gradient of x, and over the rows the sums of grad and of grad * normed, partial[piece, 2]."""
    piece = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    sample = tl.load(piece_sample + piece).to(tl.int64)
    factor = tl.load(scale + sample * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE) + 1.0
    if not LAYER_NORM:
        factor *= tl.load(weight + columns, mask=inside, other=0.0).to(COMPUTE)
    grad_sum = tl.zeros([BLOCK], dtype=COMPUTE)
    product_sum = tl.zeros([BLOCK], dtype=COMPUTE)
    for place in range(tl.load(begin + piece), tl.load(end + piece)):
        row = tl.load(order + place).to(tl.int64)
        inverse = tl.load(rstd + row)
        normed = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE)
        if LAYER_NORM:
            normed = tl.where(inside, normed - tl.load(mean + row), 0.0)
        normed *= inverse
        outer = tl.load(grad + row * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE)
        grad_sum += outer
        product_sum += outer * normed
        inner = outer * factor
        rest = inner - normed * (tl.sum(inner * normed) / WIDTH)
        if LAYER_NORM:
            rest -= tl.sum(inner) / WIDTH
        tl.store(grad_x + row * WIDTH + columns, rest * inverse, mask=inside)
    sums = partial + piece.to(tl.int64) * 2 * WIDTH + columns
    tl.store(sums, grad_sum, mask=inside)
    tl.store(sums + WIDTH, product_sum, mask=inside)


@triton.jit
def gated_add_forward(
    residual, update, bias, gate, out, order, begin, end, piece_sample,
    BIASED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One piece: out = residual + gate * (update + bias)."""
    piece = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    sample = tl.load(piece_sample + piece).to(tl.int64)
    opening = tl.load(gate + sample * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE)
    if BIASED:
        constant = tl.load(bias + columns, mask=inside, other=0.0).to(COMPUTE)
    for place in range(tl.load(begin + piece), tl.load(end + piece)):
        at = tl.load(order + place).to(tl.int64) * WIDTH + columns
        added = tl.load(update + at, mask=inside, other=0.0).to(COMPUTE)
        if BIASED:
            added += constant
        kept = tl.load(residual + at, mask=inside, other=0.0).to(COMPUTE)
        tl.store(out + at, kept + opening * added, mask=inside)


@triton.jit
def gated_add_backward(
    grad, update, gate, grad_update, partial, order, begin, end, piece_sample,
    BIASED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One piece: the gradient of the update, and over the rows the sum of grad * update and, with a bias, of grad."""
    piece = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    sample = tl.load(piece_sample + piece).to(tl.int64)
    opening = tl.load(gate + sample * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE)
    product_sum = tl.zeros([BLOCK], dtype=COMPUTE)
    grad_sum = tl.zeros([BLOCK], dtype=COMPUTE)
    for place in range(tl.load(begin + piece), tl.load(end + piece)):
        at = tl.load(order + place).to(tl.int64) * WIDTH + columns
        outer = tl.load(grad + at, mask=inside, other=0.0).to(COMPUTE)
        product_sum += outer * tl.load(update + at, mask=inside, other=0.0).to(COMPUTE)
        if BIASED:
            grad_sum += outer
        tl.store(grad_update + at, outer * opening, mask=inside)
    if BIASED:
        sums = partial + piece.to(tl.int64) * 2 * WIDTH + columns
        tl.store(sums + WIDTH, grad_sum, mask=inside)
    else:
        sums = partial + piece.to(tl.int64) * WIDTH + columns
    tl.store(sums, product_sum, mask=inside)


@triton.jit
def sum_pieces(
    partial, sums, edges, COLUMNS: tl.constexpr, STEP_ROWS: tl.constexpr, STEP_COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One sample and some columns: partial[pieces, COLUMNS] added up over the sample's pieces, always in one order."""
    sample = tl.program_id(0)
    columns = tl.program_id(1) * STEP_COLUMNS + tl.arange(0, STEP_COLUMNS)
    inside = columns < COLUMNS
    last = tl.load(edges + sample + 1)
    total = tl.zeros([STEP_ROWS, STEP_COLUMNS], dtype=COMPUTE)
    for start in range(tl.load(edges + sample), last, STEP_ROWS):
        pieces = start + tl.arange(0, STEP_ROWS)
        at = pieces.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        total += tl.load(partial + at, mask=(pieces < last)[:, None] & inside[None, :], other=0.0)
    tl.store(sums + sample.to(tl.int64) * COLUMNS + columns, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _head_places(columns, part, part_stride, head_stride, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr):
    """Where a row's columns lie. VECTOR of them lie side by side and aligned, so that they are one 128-bit load."""
    group = columns // VECTOR
    place = (group // (HEAD_DIM // VECTOR)) * head_stride + (group % (HEAD_DIM // VECTOR)) * VECTOR + columns % VECTOR
    return tl.max_contiguous(tl.multiple_of(part * part_stride + place, VECTOR), VECTOR)


@triton.jit
def _turned(values, cos, sin, BLOCK: tl.constexpr):
    """The interleaved pairs of values [BLOCK], each turned by its angle; cos and sin [BLOCK / 2]."""
    even, odd = tl.split(tl.reshape(values, [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK])


@triton.jit(do_not_specialize=["tokens"])
def square_sums(
    heads, sums, tokens, token_stride, head_stride, part_stride,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Some rows of one part: sums[part, token] of the squares over this rank's width."""
    first, part = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    places = _head_places(columns, part, part_stride, head_stride, HEAD_DIM, VECTOR)
    for row in range(first, tl.minimum(first + ROWS, tokens)):
        values = tl.load(heads + row * token_stride + places, mask=columns < WIDTH, other=0.0).to(COMPUTE)
        tl.store(sums + part * tokens + row, tl.sum(values * values))


@triton.jit(do_not_specialize=["tokens"])
def norm_and_rotate_forward(
    heads, weight_0, weight_1, cos, sin, out, rstd, tokens, token_stride, head_stride, part_stride,
    EPS: tl.constexpr, GIVEN_RSTD: tl.constexpr, ROTATE: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Some rows of one part: normalised, weighted and turned, into out[part, token]."""
    first, part = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    places = _head_places(columns, part, part_stride, head_stride, HEAD_DIM, VECTOR)
    angles = tl.arange(0, BLOCK // 2) % (HEAD_DIM // 2)
    if part == 0:
        weight = tl.load(weight_0 + columns, mask=inside, other=0.0).to(COMPUTE)
    else:
        weight = tl.load(weight_1 + columns, mask=inside, other=0.0).to(COMPUTE)
    for row in range(first, tl.minimum(first + ROWS, tokens)):
        values = tl.load(heads + row * token_stride + places, mask=inside, other=0.0).to(COMPUTE)
        if GIVEN_RSTD:
            inverse = tl.load(rstd + part * tokens + row)
        else:
            inverse = tl.rsqrt(tl.sum(values * values) / WIDTH + EPS)
            tl.store(rstd + part * tokens + row, inverse)
        values *= inverse * weight
        if ROTATE:
            at = row * (HEAD_DIM // 2) + angles
            values = _turned(values, tl.load(cos + at).to(COMPUTE), tl.load(sin + at).to(COMPUTE), BLOCK)
        tl.store(out + (part * tokens + row) * WIDTH + columns, values, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def norm_and_rotate_backward(
    grad_0, grad_1, heads, weight_0, weight_1, cos, sin, rstd, dots, grad_heads, partial,
    tokens, token_stride, head_stride, part_stride, grad_token_stride, grad_head_stride, grad_part_stride,
    STEP: tl.constexpr, ROTATE: tl.constexpr, NORM_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Some rows of one part: the gradient of the raw heads, and that of the weight, partial[piece, part].

    Under tensor parallelism a row's gradient needs a dot product over all ranks' heads: STEP "dots" writes this rank's
    share and the weight's gradient, STEP "apply" takes the sum of the shares. STEP "whole" is one rank's.
    """
    piece, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = piece * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    places = _head_places(columns, part, part_stride, head_stride, HEAD_DIM, VECTOR)
    grad_places = _head_places(columns, part, grad_part_stride, grad_head_stride, HEAD_DIM, VECTOR)
    angles = tl.arange(0, BLOCK // 2) % (HEAD_DIM // 2)
    if part == 0:
        weight = tl.load(weight_0 + columns, mask=inside, other=0.0).to(COMPUTE)
    else:
        weight = tl.load(weight_1 + columns, mask=inside, other=0.0).to(COMPUTE)
    product_sum = tl.zeros([BLOCK], dtype=COMPUTE)
    for row in range(first, tl.minimum(first + ROWS, tokens)):
        if part == 0:
            outer = tl.load(grad_0 + row * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE)
        else:
            outer = tl.load(grad_1 + row * WIDTH + columns, mask=inside, other=0.0).to(COMPUTE)
        if ROTATE:
            at = row * (HEAD_DIM // 2) + angles
            outer = _turned(outer, tl.load(cos + at).to(COMPUTE), -tl.load(sin + at).to(COMPUTE), BLOCK)
        inverse = tl.load(rstd + part * tokens + row)
        normed = tl.load(heads + row * token_stride + places, mask=inside, other=0.0).to(COMPUTE) * inverse
        inner = outer * weight
        if STEP != "apply":
            product_sum += outer * normed
            dot = tl.sum(inner * normed)
        else:
            dot = tl.load(dots + part * tokens + row)
        if STEP == "dots":
            tl.store(dots + part * tokens + row, dot)
        else:
            rest = (inner - normed * (dot / NORM_WIDTH)) * inverse
            tl.store(grad_heads + row * grad_token_stride + grad_places, rest, mask=inside)
    if STEP != "apply":
        at = (piece * tl.num_programs(1) + part) * WIDTH + columns
        tl.store(partial + at, product_sum, mask=inside)


class FusedModulatedNorm(torch.autograd.Function):
    """`fused.modulated_norm`. Kept for the backward pass: x, and two numbers a row."""

    @staticmethod
    def forward(
        ctx, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, pieces: Pieces, eps: float
    ) -> Tensor:
        _check_samples(pieces, shift)
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        tokens, width = x.shape
        out, compute = torch.empty_like(x), _compute(x.dtype)
        rstd = x.new_empty(tokens, dtype=compute)
        mean = torch.empty_like(rstd) if weight is None else None
        modulated_norm_forward[len(pieces.begin),](
            x, weight, shift, scale, out, mean, rstd, *pieces[:4],
            EPS=eps, LAYER_NORM=weight is None, **_row(width, compute),
        )  # fmt: skip
        ctx.save_for_backward(x, scale, weight, mean, rstd)
        ctx.pieces = pieces
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight, mean, rstd = ctx.saved_tensors
        width, pieces = x.shape[-1], ctx.pieces
        grad_x, partial = torch.empty_like(x), rstd.new_empty(len(pieces.begin), 2, width)
        modulated_norm_backward[len(pieces.begin),](
            grad.contiguous(), x, weight, scale, mean, rstd, grad_x, partial, *pieces[:4],
            LAYER_NORM=weight is None, **_row(width, rstd.dtype),
        )  # fmt: skip
        grad_shift, product = _sum_by_sample(partial, pieces, scale.dtype).unbind(1)  # [samples, width] each
        if weight is None:
            return grad_x, grad_shift, product, None, None, None
        grad_weight = (product * (scale + 1)).sum(0).to(weight.dtype)
        return grad_x, grad_shift, product * weight, grad_weight, None, None


class FusedGatedAdd(torch.autograd.Function):
    """`fused.gated_add`. Kept for the backward pass: the update."""

    @staticmethod
    def forward(
        ctx, residual: Tensor, update: Tensor, gate: Tensor, bias: Tensor | None, pieces: Pieces
    ) -> Tensor:  # fmt: skip
        _check_samples(pieces, gate)
        residual, update, gate = residual.contiguous(), update.contiguous(), gate.contiguous()
        out, width = torch.empty_like(residual), residual.shape[-1]
        gated_add_forward[len(pieces.begin),](
            residual, update, bias, gate, out, *pieces[:4], BIASED=bias is not None, **_row(width, _compute(out.dtype))
        )
        ctx.save_for_backward(update, gate, bias)
        ctx.pieces = pieces
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        update, gate, bias = ctx.saved_tensors
        width, pieces, compute = update.shape[-1], ctx.pieces, _compute(update.dtype)
        sums = 1 if bias is None else 2
        grad_update = torch.empty_like(update)
        partial = update.new_empty(len(pieces.begin), sums, width, dtype=compute)
        gated_add_backward[len(pieces.begin),](
            grad.contiguous(), update, gate, grad_update, partial, *pieces[:4],
            BIASED=bias is not None, **_row(width, compute),
        )  # fmt: skip
        by_sample = _sum_by_sample(partial, pieces, gate.dtype)  # [samples, sums, width]
        if bias is None:
            return grad, grad_update, by_sample[:, 0], None, None
        product, grad_sum = by_sample.unbind(1)
        return grad, grad_update, product + bias * grad_sum, (gate * grad_sum).sum(0).to(bias.dtype), None


class FusedNormAndRotate(torch.autograd.Function):
    """`fused.norm_and_rotate`. Kept for the backward pass: the raw heads, and one number a row and part."""

    @staticmethod
    def forward(
        ctx,
        heads: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        group: dist.ProcessGroup,
        eps: float,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        tokens, local_heads, _, head_dim = heads.shape
        if heads.stride(-1) != 1:
            heads = heads.contiguous()
        cos, sin = (None, None) if rotary is None else (part.contiguous() for part in rotary)
        ctx.group, ctx.norm_width, compute = group, local_heads * head_dim * group.size(), _compute(heads.dtype)
        out = heads.new_empty(len(weights), tokens, local_heads, head_dim)
        rstd = heads.new_empty(len(weights), tokens, dtype=compute)
        grid = (triton.cdiv(tokens, PIECE_ROWS), len(weights))
        shape = _heads_shape(heads, compute)
        if group.size() > 1:
            square_sums[grid](heads, rstd, tokens, *heads.stride()[:3], **shape)
            dist.all_reduce(rstd, group=group)
            rstd = torch.rsqrt(rstd / ctx.norm_width + eps)
        norm_and_rotate_forward[grid](
            heads, weights[0], weights[-1], cos, sin, out, rstd, tokens, *heads.stride()[:3],
            EPS=eps, GIVEN_RSTD=group.size() > 1, ROTATE=cos is not None, **shape,
        )  # fmt: skip
        ctx.save_for_backward(heads, cos, sin, rstd, *weights)
        return *out.unbind(), *heads.unbind(2)[len(weights) :]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, cos, sin, rstd, *weights = ctx.saved_tensors
        tokens, number, width = len(heads), len(weights), heads.shape[1] * heads.shape[3]
        grad_heads = torch.empty_like(heads, memory_format=torch.contiguous_format)
        normed = [grad.contiguous() for grad in grads[:number]]
        grid = (triton.cdiv(tokens, PIECE_ROWS), number)
        partial, dots = rstd.new_empty(grid[0], number, width), torch.empty_like(rstd)

        def launch(step: str) -> None:
            norm_and_rotate_backward[grid](
                normed[0], normed[-1], heads, weights[0], weights[-1], cos, sin, rstd, dots, grad_heads, partial,
                tokens, *heads.stride()[:3], *grad_heads.stride()[:3],
                STEP=step, ROTATE=cos is not None, NORM_WIDTH=ctx.norm_width, **_heads_shape(heads, rstd.dtype),
            )  # fmt: skip

        if ctx.group.size() == 1:
            launch("whole")
        else:
            launch("dots")
            dist.all_reduce(dots, group=ctx.group)
            launch("apply")
        for part in range(number, len(grads)):
            grad_heads[:, :, part] = grads[part]
        grad_weights = partial.sum(0).unbind()
        return grad_heads, None, None, None, *(g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True))


def _sum_by_sample(partial: Tensor, pieces: Pieces, dtype: torch.dtype) -> Tensor:
    """[pieces, sums, width] -> [samples, sums, width]."""
    samples, columns = len(pieces.edges) - 1, partial[0].numel()
    sums = partial.new_empty(samples, *partial.shape[1:])
    sum_pieces[samples, triton.cdiv(columns, SUM_COLUMNS)](
        partial, sums, pieces.edges, COLUMNS=columns, STEP_ROWS=SUM_ROWS, STEP_COLUMNS=SUM_COLUMNS,
        COMPUTE=_triton_type(partial.dtype),
    )  # fmt: skip
    return sums.to(dtype)


def _check_samples(pieces: Pieces, rows: Tensor) -> None:
    if len(pieces.edges) != len(rows) + 1:
        raise ValueError(f"pieces of {len(pieces.edges) - 1} samples, but shifts, scales or gates of {len(rows)}")


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _triton_type(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


def _row(width: int, compute: torch.dtype) -> dict[str, object]:
    """What a kernel must know of a row when it is compiled."""
    block = triton.next_power_of_2(width)
    warps = min(max(block // 512, 1), 8)
    return {"WIDTH": width, "BLOCK": block, "COMPUTE": _triton_type(compute), "num_warps": warps}


def _heads_shape(heads: Tensor, compute: torch.dtype) -> dict[str, object]:
    _, local_heads, _, head_dim = heads.shape
    vector = math.gcd(head_dim, *heads.stride()[:3], 8)
    return {"ROWS": PIECE_ROWS, "HEAD_DIM": head_dim, "VECTOR": vector, **_row(local_heads * head_dim, compute)}
