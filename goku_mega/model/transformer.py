"""The Goku transformer: packed patches in, velocity out (paper section 2.2).

Pure model code: it receives its process groups and the spec of its blocks, and knows nothing of
FSDP, recomputation or data. Under context parallelism it sees its rank's tokens only.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from goku_mega.kernels.fused import modulated_norm
from goku_mega.kernels.pieces import sample_pieces
from goku_mega.model.block import NORM_EPS, AdaLNModulation, PackLayout
from goku_mega.model.packed import PackedBatch
from goku_mega.model.rope import rotary_from_positions
from goku_mega.model.sizes import ModelShape

TIMESTEP_FREQUENCIES = 256
TIMESTEP_SCALE = 1000.0


def megatron_config(
    shape: ModelShape,
    *,
    tp: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    **engine: Any,
) -> TransformerConfig:
    """megatron-core's view of a shape. Attention has no biases; the block adds the FFN's itself.

    Args:
        engine: fields that an engine sets, over those given here.
    """
    fields = dict(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.heads,
        kv_channels=shape.head_dim,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        add_bias_linear=False,
        activation_func=gelu_tanh,
        normalization="RMSNorm",
        layernorm_epsilon=NORM_EPS,
        params_dtype=dtype,
        # Values come from `model.weights`, by name; allocation follows torch's default device.
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    return TransformerConfig(**(fields | engine))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep through a two-layer MLP: one vector a sample."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIMESTEP_FREQUENCIES, hidden_size, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps [samples] in [0, 1], fp32 or better -> [samples, hidden]."""
        half = TIMESTEP_FREQUENCIES // 2
        steps = torch.arange(half, device=timesteps.device, dtype=timesteps.dtype)
        frequencies = torch.exp(-math.log(10000.0) / half * steps)
        angles = TIMESTEP_SCALE * timesteps[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))


class CaptionProjection(nn.Module):
    """Text embeddings to the model's width, once for all blocks."""

    def __init__(self, text_width: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_width, hidden_size, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, text: Tensor) -> Tensor:
        """text: [text_tokens, text_width] -> [text_tokens, hidden]."""
        return self.linear_2(gelu_tanh(self.linear_1(text)))


class FinalLayer(nn.Module):
    """LayerNorm without affine, modulated by the timestep, then a projection to patches."""

    def __init__(self, config: TransformerConfig, linear: type, patch_dim: int, tp: ProcessGroupCollection) -> None:
        super().__init__()
        self.modulation = AdaLNModulation(2, config, linear, tp.tp)
        self.linear = nn.Linear(config.hidden_size, patch_dim, dtype=config.params_dtype)

    def forward(self, hidden_states: Tensor, timestep_embedding: Tensor, pack: PackLayout) -> Tensor:
        """hidden_states [tokens, hidden] -> [tokens, patch_dim]."""
        shift, scale = self.modulation(timestep_embedding)
        return self.linear(
            modulated_norm(hidden_states, shift, scale, pack.sample_index, eps=NORM_EPS, pieces=pack.pieces)
        )


class GokuTransformer(nn.Module):
    """PackedBatch -> velocity [tokens/cp, patch_dim].

    Or a part of it, some consecutive blocks: the patch embedding goes with the first block and the
    final layer with the last, the other embeddings with every part. Parts have the names of the whole.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        config: TransformerConfig,
        block: Callable[[int], ModuleSpec],
        groups: ProcessGroupCollection,
        layers: range | None = None,
        fused: bool = False,
        around_blocks: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            block: the spec of the block of a number.
            layers: numbers of the blocks of this part; None: all.
            fused: do the work between the matrix products in Triton kernels.
            around_blocks: what the blocks' forward runs in.
        """
        super().__init__()
        self.around_blocks = around_blocks
        self.fused = fused
        layers = range(shape.layers) if layers is None else layers
        self.shape = shape
        self.config = config
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = groups.tp
        self.is_last = layers.stop == shape.layers
        self.hidden_states_before: Tensor | None = None
        """What the part before gave, [tokens/cp (/tp under sequence parallelism), hidden]; put here before a forward.

        Not an argument: FSDP takes the gradient of an argument as the sign that all gradients of the
        module are there, and those of the embeddings may come later."""
        dtype = config.params_dtype
        if layers.start == 0:
            self.patch_embedding = nn.Linear(shape.patch_dim, shape.hidden_size, dtype=dtype)
        self.timestep_embedding = TimestepEmbedding(shape.hidden_size, dtype)
        if shape.text_width is not None:
            self.caption_projection = CaptionProjection(shape.text_width, shape.hidden_size, dtype)
        if shape.classes is not None:
            # One more row than classes: the last is "no class", for classifier-free guidance.
            self.class_embedding = nn.Embedding(shape.classes + 1, shape.hidden_size, dtype=dtype)
        self.blocks = nn.ModuleList()
        for number in layers:  # by name, which is the number in the whole model
            built = build_module(block(number), config=config, layer_number=number + 1, pg_collection=groups)
            self.blocks.add_module(str(number), built)
        if self.is_last:
            linear = block(layers[-1]).submodules.modulation_linear
            self.final_layer = FinalLayer(config, linear, shape.patch_dim, groups)

    def forward(self, batch: PackedBatch) -> Tensor:
        """The velocity, or before the last part hidden states [tokens/cp (/tp), hidden]."""
        sample_index = batch.sample_index
        if self.sequence_parallel:
            sample_index = sample_index.chunk(self.tp_group.size())[self.tp_group.rank()]
        pack = PackLayout(
            sample_index=sample_index,
            rotary=rotary_from_positions(batch.positions, self.shape.head_dim, batch.timesteps.dtype),
            self_segments=batch.self_segments,
            cross_segments=batch.cross_segments,
            pieces=sample_pieces(sample_index, len(batch.timesteps)) if self.fused else None,
        )
        hidden_states = self._first_hidden_states(batch.patches)  # [tokens/cp (/tp), hidden]
        timestep_embedding = self.timestep_embedding(batch.timesteps)  # [samples, hidden]
        if self.shape.classes is not None:
            timestep_embedding = timestep_embedding + self.class_embedding(batch.class_labels)
        text = self.caption_projection(batch.text) if self.shape.text_width is not None else None
        with self.around_blocks():
            for block in self.blocks:
                hidden_states = block(hidden_states, timestep_embedding, text, pack)
        if not self.is_last:
            return hidden_states
        velocity = self.final_layer(hidden_states, timestep_embedding, pack)
        if self.sequence_parallel:
            velocity = gather_from_sequence_parallel_region(
                velocity, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return velocity

    def _first_hidden_states(self, patches: Tensor) -> Tensor:
        """What the first block takes: of the part before, or of the patches [tokens/cp, patch_dim]."""
        if self.hidden_states_before is not None:
            return self.hidden_states_before
        if self.sequence_parallel:
            patches = scatter_to_sequence_parallel_region(patches, group=self.tp_group)
        return self.patch_embedding(patches)
