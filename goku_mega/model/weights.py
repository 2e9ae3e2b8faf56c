"""Initial values from (seed, name), and weights under the authors' published names.

A parameter's initial value is a function of the seed, its name and its global shape, so every
layout starts from the same model.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from goku_mega.errors import CheckpointError
from goku_mega.model.block import GokuBlock
from goku_mega.seeding import derive_seed

TIMESTEP_INIT_STD = 0.02


def initial_value(name: str, global_shape: tuple[int, ...], seed: int) -> Tensor:
    """The starting value of one parameter, fp32 on the host.

    adaLN-Zero (DiT, arXiv 2212.09748): modulations, the final projection and cross-attention's
    output start at zero, so every block starts as the identity; norms at one; biases at zero;
    other matrices Xavier-uniform, each of the fused q, k, v for itself.
    """
    part = name.rsplit(".", 1)[-1]
    if "norm" in name:
        return torch.ones(global_shape)
    starts_at_zero = ("modulation.", "final_layer.linear.", "cross_attention.linear_proj.")
    if part == "bias" or any(mark in name for mark in starts_at_zero):
        return torch.zeros(global_shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, "weight", name))
    if name.startswith(("timestep_embedding.", "class_embedding.")):
        return torch.randn(global_shape, generator=generator) * TIMESTEP_INIT_STD
    fan_out, fan_in = global_shape[0] // _fused_projections(name), global_shape[1]
    bound = math.sqrt(6 / (fan_in + fan_out))
    return (torch.rand(global_shape, generator=generator) * 2 - 1) * bound


def _fused_projections(name: str) -> int:
    """How many matrices a fused projection stacks."""
    return {"linear_qkv": 3, "linear_kv": 2}.get(name.split(".")[-2], 1)


@torch.no_grad()
def load_published_block(block: GokuBlock, published: Mapping[str, Tensor]) -> None:
    """Fill a block from weights named as in the authors' published block.

    Names: `norm1.linear`, `attn1.{q,k,v,o}_proj`, `attn1.{q,k}_norm`, `norm2`, `attn2.*` alike,
    `norm3`, `mlp.fc1`, `mlp.fc2`, each with `.weight` (and `.bias` where the block has one).
    The block is whole: not split by tensor parallelism.

    Raises:
        CheckpointError: a name is missing, unknown, or has another shape.
    """
    heads = block.self_attention.num_attention_heads_per_partition
    ours = dict(block.named_parameters())
    taken: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in published:
            raise CheckpointError(f"the published block has no weight {name!r}; it has {', '.join(sorted(published))}")
        taken.add(name)
        return published[name]

    def per_head(*names: str) -> Tensor:
        """Whole projections to megatron-core's fused order: head by head, [q, k, v] inside a head."""
        split = [take(name).unflatten(0, (heads, -1)) for name in names]  # [heads, head_dim, hidden]
        return torch.stack(split, dim=1).flatten(0, 2)

    attn1, attn2 = "self_attention", "cross_attention"
    values = {name: take(theirs) for name, theirs in _PUBLISHED_NAMES.items() if name in ours}
    values[f"{attn1}.linear_qkv.weight"] = per_head(*(f"attn1.{p}_proj.weight" for p in "qkv"))
    if block.cross_attention is not None:
        values[f"{attn2}.linear_kv.weight"] = per_head(*(f"attn2.{p}_proj.weight" for p in "kv"))
    if unknown := set(published) - taken:
        raise CheckpointError(f"the block has no place for {', '.join(sorted(unknown))}")
    for name, parameter in ours.items():
        if parameter.shape != values[name].shape:
            raise CheckpointError(
                f"published weight for {name} is {tuple(values[name].shape)}, the block's is {tuple(parameter.shape)}"
            )
        parameter.copy_(values[name])


_PUBLISHED_NAMES = {
    "modulation.linear.weight": "norm1.linear.weight",
    "modulation.linear.bias": "norm1.linear.bias",
    "self_attention.linear_proj.weight": "attn1.o_proj.weight",
    "self_attention.q_norm.weight": "attn1.q_norm.weight",
    "self_attention.k_norm.weight": "attn1.k_norm.weight",
    "cross_norm.weight": "norm2.weight",
    "cross_attention.linear_q.weight": "attn2.q_proj.weight",
    "cross_attention.linear_proj.weight": "attn2.o_proj.weight",
    "cross_attention.q_norm.weight": "attn2.q_norm.weight",
    "cross_attention.k_norm.weight": "attn2.k_norm.weight",
    "mlp_norm.weight": "norm3.weight",
    "mlp.linear_fc1.weight": "mlp.fc1.weight",
    "mlp.linear_fc1.bias": "mlp.fc1.bias",
    "mlp.linear_fc2.weight": "mlp.fc2.weight",
    "mlp.linear_fc2.bias": "mlp.fc2.bias",
}
