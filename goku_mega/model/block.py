"""One Goku block: self-attention -> cross-attention -> feed-forward, with adaLN-Zero (paper section 2.2).

Order and places of norms, shifts and gates are those of the authors' published block; DESIGN
section 2 lists them.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from goku_mega.kernels.fused import gated_add, modulated_norm
from goku_mega.kernels.pieces import Pieces
from goku_mega.model.packed import RingSegments, Segments
from goku_mega.model.rope import Rotary

NORM_EPS = 1e-6


@dataclass
class GokuBlockSubmodules:
    """The parts a block is assembled from; `model.specs` fills them for an engine."""

    modulation_linear: ModuleSpec | type
    self_attention: ModuleSpec
    cross_attention: ModuleSpec | None
    mlp: ModuleSpec


@dataclass(frozen=True)
class PackLayout:
    """Where the tokens of a pack belong, the same for every block; none of it needs a gradient."""

    sample_index: Tensor  # [tokens/cp (/tp under sequence parallelism)] int64
    rotary: Rotary  # [tokens/cp, 1, head_dim / 2] each
    self_segments: Segments | RingSegments
    cross_segments: Segments | None
    pieces: Pieces | None = None  # of sample_index: the fused kernels do the work between the matrix products


class AdaLNModulation(nn.Module):
    """SiLU -> Linear(hidden, rows * hidden): the shifts, scales and gates of every sample, in fp32 or better."""

    def __init__(
        self,
        rows: int,
        config: TransformerConfig,
        linear: ModuleSpec | type,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel
        self.linear = build_module(
            linear,
            config.hidden_size,
            rows * config.hidden_size,
            config=_without_sequence_parallel(config),
            init_method=config.init_method,
            bias=True,
            gather_output=True,
            tp_group=tp_group,
        )

    def forward(self, timestep_embedding: Tensor) -> tuple[Tensor, ...]:
        """timestep_embedding [samples, hidden] -> `rows` tensors [samples, hidden]."""
        rows, _ = self.linear(F.silu(timestep_embedding))
        if self.sequence_parallel:
            # Each tensor-parallel rank modulates its own tokens, so the gradients have to be summed.
            rows = copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        return rows.to(torch.promote_types(rows.dtype, torch.float32)).chunk(self.rows, dim=-1)


class GokuBlock(nn.Module):
    """Takes and gives hidden states [tokens/cp (/tp under sequence parallelism), hidden]."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GokuBlockSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        place = {"layer_number": layer_number, "pg_collection": pg_collection}
        width, dtype = config.hidden_size, config.params_dtype
        self.modulation = AdaLNModulation(6, config, submodules.modulation_linear, pg_collection.tp)
        self.self_attention = build_module(submodules.self_attention, config=config, **place)
        self.cross_attention: nn.Module | None = None
        if submodules.cross_attention is not None:
            self.cross_norm = nn.RMSNorm(width, eps=NORM_EPS, dtype=dtype)
            self.cross_attention = build_module(submodules.cross_attention, config=config, **place)
        self.mlp_norm = nn.RMSNorm(width, eps=NORM_EPS, dtype=dtype)
        self.mlp = build_module(
            submodules.mlp, config=_with_bias(config), ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp
        )

    def forward(
        self, hidden_states: Tensor, timestep_embedding: Tensor, text: Tensor | None, pack: PackLayout
    ) -> Tensor:
        """
        Args:
            hidden_states: [tokens/cp (/tp), hidden].
            timestep_embedding: [samples, hidden].
            text: [text_tokens, hidden], or None without cross-attention.
            pack: where every token belongs.
        """
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(timestep_embedding)
        fused = pack.pieces is not None

        normed = modulated_norm(
            hidden_states, shift_attn, scale_attn, pack.sample_index, eps=NORM_EPS, pieces=pack.pieces
        )
        attended = self.self_attention(normed, segments=pack.self_segments, rotary=pack.rotary, fused=fused)
        hidden_states = gated_add(hidden_states, attended, gate_attn, pack.sample_index, pieces=pack.pieces)

        if self.cross_attention is not None:
            hidden_states = hidden_states + self.cross_attention(
                self.cross_norm(hidden_states), text, segments=pack.cross_segments, rotary=pack.rotary, fused=fused
            )

        normed = modulated_norm(
            hidden_states, shift_mlp, scale_mlp, pack.sample_index,
            eps=NORM_EPS, weight=self.mlp_norm.weight, pieces=pack.pieces,
        )  # fmt: skip
        update, bias = self.mlp(normed)
        return gated_add(hidden_states, update, gate_mlp, pack.sample_index, bias=bias, pieces=pack.pieces)


def _without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    return _changed(config, sequence_parallel=False)


def _with_bias(config: TransformerConfig) -> TransformerConfig:
    return _changed(config, add_bias_linear=True)


def _changed(config: TransformerConfig, **values: bool) -> TransformerConfig:
    """A copy with other values. `dataclasses.replace` would derive everything anew from the derived values."""
    changed = copy.copy(config)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed
