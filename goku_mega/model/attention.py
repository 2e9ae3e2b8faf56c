"""Self- and cross-attention over packed samples, on megatron-core's projections.

Megatron's own classes build the projections and the core attention from a spec; what happens
between them is Goku's: the query and key are normalised over all heads together before the heads
are split (megatron-core normalises each head), then turned by the 3D RoPE, and the packing reaches
cross-attention too.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from goku_mega.model.packed import Segments
from goku_mega.model.rope import Rotary, rotate

QK_NORM_EPS = 1e-6


class PackedAttention(nn.Module):
    """Full attention inside every segment, none across: the core attention of the spec."""

    def __init__(self, *, config: TransformerConfig, softmax_scale: float | None = None, **_: object) -> None:
        # The other keywords are megatron-core's contract for a core attention; packing needs none of them.
        super().__init__()
        self.softmax_scale = softmax_scale
        self.head_dim = config.kv_channels

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """
        Args:
            query: [queries, heads, head_dim].
            key, value: [keys, heads, head_dim].

        Returns:
            [queries, heads, head_dim].
        """
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return self._flash(query, key, value, segments)
        return self._by_runs(query, key, value, segments)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        cu_q, cu_kv = segments.edges(query.device)
        longest_q, longest_kv = max(segments.q_lengths), max(segments.kv_lengths)
        attended = varlen_attn(query, key, value, cu_q, cu_kv, longest_q, longest_kv, scale=self.softmax_scale)
        assert isinstance(attended, Tensor)  # it is a tuple only when auxiliary outputs are asked for
        return attended

    def _by_runs(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """One batched call for every run of neighbouring segments of equal shape, without a copy."""
        counts, q_lengths, kv_lengths = zip(*segments.runs, strict=True)
        q_sizes = [count * length for count, length in zip(counts, q_lengths, strict=True)]
        kv_sizes = [count * length for count, length in zip(counts, kv_lengths, strict=True)]
        outputs = []
        for count, q, k, v in zip(
            counts, query.split(q_sizes), key.split(kv_sizes), value.split(kv_sizes), strict=True
        ):
            if q.shape[0] == 0:
                continue
            # [count * length, heads, head_dim] -> [count, heads, length, head_dim]
            q, k, v = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)


class InnerRMSNorm(nn.Module):
    """RMSNorm over the whole inner width, all heads of all tensor-parallel ranks together."""

    def __init__(self, width: int, tp_group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.width = width
        self.weight = nn.Parameter(torch.empty(width // tp_group.size(), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, width/tp]."""
        if self.tp_group.size() == 1:
            return F.rms_norm(x, (self.width,), self.weight, QK_NORM_EPS)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square_sum = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), self.tp_group)  # [tokens, 1]
        normed = wide * torch.rsqrt(square_sum / self.width + QK_NORM_EPS)
        return (normed * self.weight).to(x.dtype)


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


class GokuSelfAttention(SelfAttention):
    """Self-attention of a packed batch. One fused projection gives [q, k, v] head by head."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, submodules, layer_number, AttnMaskType.no_mask, pg_collection=pg_collection)
        self.q_norm = InnerRMSNorm(self.query_projection_size, pg_collection.tp, config.params_dtype)
        self.k_norm = InnerRMSNorm(self.query_projection_size, pg_collection.tp, config.params_dtype)

    def forward(self, hidden_states: Tensor, *, segments: Segments, rotary: Rotary) -> Tensor:
        """hidden_states and result: [tokens/cp (/tp under sequence parallelism), hidden]."""
        mixed, _ = self.linear_qkv(hidden_states)  # [tokens/cp, 3 * hidden/tp]
        heads = mixed.unflatten(-1, (-1, 3, self.hidden_size_per_attention_head))
        query, key, value = heads.unbind(2)  # [tokens/cp, heads/tp, head_dim]
        query = rotate(self.q_norm(query.flatten(1)).view_as(query), rotary)
        key = rotate(self.k_norm(key.flatten(1)).view_as(key), rotary)
        attended = self.core_attention(query, key, value, segments)
        return self.linear_proj(attended.flatten(1))[0]


def _with_config(builder: Callable[..., nn.Module], config: TransformerConfig) -> Callable[..., nn.Module]:
    """The same builder under another configuration than its caller's."""

    def build(*sizes: int, **settings: Any) -> nn.Module:
        return builder(*sizes, **{**settings, "config": config})

    return build


class GokuCrossAttention(CrossAttention):
    """Cross-attention of a packed batch to its packed captions. The query is rotated, the key is not.

    The captions are whole on every rank, so context parallelism needs no communication here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        # megatron-core hands cross-attention's projections no group, and would gather the captions under
        # sequence parallelism as if they were split.
        whole_text = copy.copy(config)
        whole_text.sequence_parallel = False
        submodules = replace(
            submodules,
            linear_q=partial(submodules.linear_q, tp_group=pg_collection.tp),
            linear_kv=_with_config(partial(submodules.linear_kv, tp_group=pg_collection.tp), whole_text),
        )
        super().__init__(config, submodules, layer_number, AttnMaskType.no_mask, pg_collection=pg_collection)
        self.q_norm = InnerRMSNorm(self.query_projection_size, pg_collection.tp, config.params_dtype)
        self.k_norm = InnerRMSNorm(self.query_projection_size, pg_collection.tp, config.params_dtype)

    def forward(self, hidden_states: Tensor, text: Tensor, *, segments: Segments, rotary: Rotary) -> Tensor:
        """hidden_states and result as in self-attention; text: [text_tokens, hidden]."""
        query = self.q_norm(self.linear_q(hidden_states)[0])  # [tokens/cp, hidden/tp]
        query = rotate(query.unflatten(-1, (-1, self.hidden_size_per_attention_head)), rotary)
        mixed, _ = self.linear_kv(text)  # [text_tokens, 2 * hidden/tp]
        key, value = mixed.unflatten(-1, (-1, 2, self.hidden_size_per_attention_head)).unbind(2)
        key = self.k_norm(key.flatten(1)).view_as(key)
        attended = self.core_attention(query, key, value, segments)
        return self.linear_proj(attended.flatten(1))[0]
