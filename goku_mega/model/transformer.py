"""The Goku transformer: packed patches in, velocity out (paper section 2.2).

Pure model code: it receives its process groups and the spec of its blocks, and knows nothing of
FSDP, recomputation or data. Under context parallelism it sees its rank's tokens only.
"""

import math

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

from goku_mega.model.block import NORM_EPS, AdaLNModulation, PackLayout
from goku_mega.model.modulation import modulate
from goku_mega.model.packed import PackedBatch
from goku_mega.model.rope import rotary_from_positions
from goku_mega.model.sizes import ModelShape

TIMESTEP_FREQUENCIES = 256
TIMESTEP_SCALE = 1000.0


def megatron_config(
    shape: ModelShape, *, tp: int = 1, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32
) -> TransformerConfig:
    """megatron-core's view of a shape. Attention has no biases; the block adds the FFN's itself."""
    return TransformerConfig(
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

    def forward(self, hidden_states: Tensor, timestep_embedding: Tensor, sample_index: Tensor) -> Tensor:
        """hidden_states [tokens, hidden] -> [tokens, patch_dim]."""
        shift, scale = self.modulation(timestep_embedding)
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=NORM_EPS)
        return self.linear(modulate(normed, shift, scale, sample_index))


class GokuTransformer(nn.Module):
    """PackedBatch -> velocity [tokens/cp, patch_dim]."""

    def __init__(
        self, shape: ModelShape, *, config: TransformerConfig, block: ModuleSpec, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.shape = shape
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = groups.tp
        dtype = config.params_dtype
        self.patch_embedding = nn.Linear(shape.patch_dim, shape.hidden_size, dtype=dtype)
        self.timestep_embedding = TimestepEmbedding(shape.hidden_size, dtype)
        if shape.text_width is not None:
            self.caption_projection = CaptionProjection(shape.text_width, shape.hidden_size, dtype)
        if shape.classes is not None:
            # One more row than classes: the last is "no class", for classifier-free guidance.
            self.class_embedding = nn.Embedding(shape.classes + 1, shape.hidden_size, dtype=dtype)
        self.blocks = nn.ModuleList(
            build_module(block, config=config, layer_number=number + 1, pg_collection=groups)
            for number in range(shape.layers)
        )
        self.final_layer = FinalLayer(config, block.submodules.modulation_linear, shape.patch_dim, groups)

    def forward(self, batch: PackedBatch) -> Tensor:
        patches, sample_index = batch.patches, batch.sample_index
        if self.sequence_parallel:
            patches = scatter_to_sequence_parallel_region(patches, group=self.tp_group)
            sample_index = sample_index.chunk(self.tp_group.size())[self.tp_group.rank()]
        pack = PackLayout(
            sample_index=sample_index,
            rotary=rotary_from_positions(batch.positions, self.shape.head_dim, batch.timesteps.dtype),
            self_segments=batch.self_segments,
            cross_segments=batch.cross_segments,
        )
        hidden_states = self.patch_embedding(patches)  # [tokens/cp (/tp), hidden]
        timestep_embedding = self.timestep_embedding(batch.timesteps)  # [samples, hidden]
        if self.shape.classes is not None:
            timestep_embedding = timestep_embedding + self.class_embedding(batch.class_labels)
        text = self.caption_projection(batch.text) if self.shape.text_width is not None else None
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep_embedding, text, pack)
        velocity = self.final_layer(hidden_states, timestep_embedding, sample_index)
        if self.sequence_parallel:
            velocity = gather_from_sequence_parallel_region(
                velocity, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return velocity
