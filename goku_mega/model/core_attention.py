"""Core attention over packed samples: full inside every segment, none across.

`PackedAttention` is the module a block is built with. `attend` and `attend_backward` are the same product as
plain functions, with the logsumexp of every query's scores, so that context parallelism can join blocks of keys.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from goku_mega.config.training import AttentionBackend
from goku_mega.model.packed import RingSegments, Segments


class PackedAttention(nn.Module):
    """Core attention of a spec on one rank's tokens."""

    def __init__(
        self,
        *,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        backend: AttentionBackend = "auto",
        **_: object,
    ) -> None:
        """
        Args:
            backend: the kernel, as in `config.ComputeConfig.attention`.
        """
        # The other keywords are megatron-core's contract for a core attention; packing needs none of them.
        super().__init__()
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.backend = backend

    def takes(self, segments: Segments | RingSegments) -> bool:
        """Whether it can attend over these samples: whole ones, not those split over a ring."""
        return isinstance(segments, Segments)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """
        Args:
            query: [queries, heads, head_dim].
            key, value: [keys, heads, head_dim].

        Returns:
            [queries, heads, head_dim].
        """
        backend = ("varlen" if _has_varlen_kernel(query) else "sdpa") if self.backend == "auto" else self.backend
        if backend == "varlen":
            return self._varlen(query, key, value, segments)
        if backend == "flash3":
            return self._flash3(query, key, value, segments)
        if backend == "cudnn":
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return self._sdpa(query, key, value, segments)
        return self._sdpa(query, key, value, segments)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """One batched call for every run of neighbouring segments of equal shape."""
        outputs = [
            _tokens(F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale))
            for q, k, v in _runs(segments, query, key, value)
            if q.numel()
        ]
        return torch.cat(outputs)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(query, key, value, *_edges(segments, query.device), scale=self.softmax_scale)
        assert isinstance(attended, Tensor)  # it is a tuple only when auxiliary outputs are asked for
        return attended

    def _flash3(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]

        attended = flash_attn_varlen_func(
            query, key, value, *_edges(segments, query.device), softmax_scale=self.softmax_scale
        )
        return attended[0] if isinstance(attended, tuple) else attended  # older builds give the logsumexp too


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the keys at hand, and how much weight they carry.

    Args:
        query: [queries, heads, head_dim].
        key, value: [keys, heads, head_dim].

    Returns:
        The result [queries, heads, head_dim] and the logsumexp of the scaled scores [queries, heads], fp32 or
        better. A query whose segment has no keys here gets 0 and -inf.
    """
    if _has_varlen_kernel(query):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *_edges(segments, query.device), 0.0, False, False, scale=scale
        )  # lse: [heads, queries] fp32; the kernel gives +inf where there are no keys
        return out, lse.t().masked_fill(lse.t() == torch.inf, -torch.inf)
    outs, lses = [], []
    for q, k, v in _runs(segments, query, key, value):
        if not q.numel():
            continue
        if k.numel():
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        else:
            lse_dtype = torch.promote_types(q.dtype, torch.float32)
            out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=lse_dtype)
        outs.append(_tokens(out))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs), torch.cat(lses)


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through the keys at hand.

    Args:
        grad, out: gradient and result [queries, heads, head_dim] of the whole attention, over every block of keys.
        lse: logsumexp [queries, heads] over every block of keys.
    """
    if _has_varlen_kernel(query):
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that is off
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse.t().contiguous(), *_edges(segments, query.device), 0.0, False,
            unused, unused, scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    found: list[tuple[Tensor, ...]] = []
    for g, o, weight, q, k, v in _runs(segments, query, key, value, grad, out, lse[..., None]):
        if q.numel() and k.numel():
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, weight.squeeze(-1).contiguous(), 0.0, False, scale=scale
            )
        else:
            gradients = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        found.append(tuple(map(_tokens, gradients)))
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


def _has_varlen_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _edges(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """The arguments of a varlen kernel: cumulative lengths and the longest ones."""
    return *segments.edges(device), max(segments.q_lengths), max(segments.kv_lengths)


def _runs(
    segments: Segments, query: Tensor, key: Tensor, value: Tensor, *per_query: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Neighbouring segments of equal shape as one batch, [count, heads, length, head_dim] each, without a copy.

    `per_query` tensors [queries, heads, ...] are cut as the query is, and come first.
    """
    q_sizes = [count * q for count, q, _ in segments.runs]
    kv_sizes = [count * kv for count, _, kv in segments.runs]
    by_query = zip(*(tensor.split(q_sizes) for tensor in (*per_query, query)), strict=True)
    for (count, *_), of_query, k, v in zip(
        segments.runs, by_query, key.split(kv_sizes), value.split(kv_sizes), strict=True
    ):
        yield tuple(_batched(part, count) for part in (*of_query, k, v))


def _batched(part: Tensor, count: int) -> Tensor:
    """[count * length, heads, width] -> [count, heads, length, width]."""
    return part.unflatten(0, (count, part.shape[0] // count)).transpose(1, 2)


def _tokens(batched: Tensor) -> Tensor:
    """[count, heads, length, width] -> [count * length, heads, width]."""
    return batched.transpose(1, 2).flatten(0, 1)
