"""What a block is assembled from: one ModuleSpec per engine, one model.

`local` is megatron-core's own torch layers; it runs on CPUs and GPUs. TransformerEngine's linear
layers take the same arguments, so the `te` engine is a second `Linears` value here and nothing
anywhere else. This is the only file that may know TransformerEngine.
"""

from collections.abc import Callable
from typing import NamedTuple

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from goku_mega.model.attention import GokuCrossAttention, GokuSelfAttention, PackedAttention
from goku_mega.model.block import GokuBlock, GokuBlockSubmodules


class Linears(NamedTuple):
    """An engine's tensor-parallel linear layers."""

    column: type[nn.Module]
    row: type[nn.Module]


LOCAL = Linears(ColumnParallelLinear, RowParallelLinear)


def block_spec(
    linears: Linears = LOCAL,
    *,
    cross_attention: bool,
    self_core_attention: Callable[..., nn.Module] = PackedAttention,
) -> ModuleSpec:
    """The spec of a Goku block.

    Args:
        linears: the engine.
        cross_attention: False for the class-conditional pilot.
        self_core_attention: builder of self-attention's core; context parallelism wraps it from outside.
    """
    cross = ModuleSpec(
        module=GokuCrossAttention,
        submodules=CrossAttentionSubmodules(
            linear_q=linears.column,
            linear_kv=linears.column,
            core_attention=PackedAttention,
            linear_proj=linears.row,
        ),
    )
    return ModuleSpec(
        module=GokuBlock,
        submodules=GokuBlockSubmodules(
            modulation_linear=linears.column,
            self_attention=ModuleSpec(
                module=GokuSelfAttention,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.column, core_attention=self_core_attention, linear_proj=linears.row
                ),
            ),
            cross_attention=cross if cross_attention else None,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row)),
        ),
    )
