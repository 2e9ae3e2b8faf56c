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

from goku_mega.kernels.fused import norm_and_rotate
from goku_mega.model.packed import RingSegments, Segments
from goku_mega.model.rope import Rotary

QK_NORM_EPS = 1e-6


class InnerRMSNorm(nn.Module):
    """The weight of an RMSNorm over the whole inner width, all heads of all tensor-parallel ranks together.

    `kernels.fused.norm_and_rotate` applies it: norm and rotation are one pass over the heads.
    """

    def __init__(self, width: int, tp_group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width // tp_group.size(), dtype=dtype))


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
        self.normed = partial(norm_and_rotate, group=pg_collection.tp, eps=QK_NORM_EPS)

    def forward(
        self, hidden_states: Tensor, *, segments: Segments | RingSegments, rotary: Rotary, fused: bool
    ) -> Tensor:
        """hidden_states and result: [tokens/cp (/tp under sequence parallelism), hidden].

        `fused` chooses the kernels of norm and rotation.
        """
        mixed, _ = self.linear_qkv(hidden_states)  # [tokens/cp, 3 * hidden/tp]
        heads = mixed.unflatten(-1, (-1, 3, self.hidden_size_per_attention_head))
        weights = (self.q_norm.weight, self.k_norm.weight)
        query, key, value = self.normed(heads, weights, rotary, fused=fused)  # [tokens/cp, heads/tp, head_dim]
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
        self.normed = partial(norm_and_rotate, group=pg_collection.tp, eps=QK_NORM_EPS)

    def forward(
        self, hidden_states: Tensor, text: Tensor, *, segments: Segments, rotary: Rotary, fused: bool
    ) -> Tensor:
        """hidden_states, fused and result as in self-attention; text: [text_tokens, hidden]."""
        query, _ = self.linear_q(hidden_states)  # [tokens/cp, hidden/tp]
        heads = query.unflatten(-1, (-1, 1, self.hidden_size_per_attention_head))
        (query,) = self.normed(heads, (self.q_norm.weight,), rotary, fused=fused)  # [tokens/cp, heads/tp, head_dim]
        mixed, _ = self.linear_kv(text)  # [text_tokens, 2 * hidden/tp]
        heads = mixed.unflatten(-1, (-1, 2, self.hidden_size_per_attention_head))
        key, value = self.normed(heads, (self.k_norm.weight,), None, fused=fused)
        attended = self.core_attention(query, key, value, segments)
        return self.linear_proj(attended.flatten(1))[0]
