"""A Goku model in a layout: built on no memory, split, sharded, and then given its values.

The order is tensor and context parallelism (by the spec), FSDP2, memory, values. The model itself
knows nothing of FSDP.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from goku_mega.model.attention import InnerRMSNorm, PackedAttention
from goku_mega.model.sizes import ModelShape
from goku_mega.model.specs import LOCAL, Linears, block_spec
from goku_mega.model.transformer import GokuTransformer, megatron_config
from goku_mega.model.weights import initial_value
from goku_mega.parallel.context import UlyssesAttention
from goku_mega.parallel.groups import Groups
from goku_mega.parallel.shards import Shard


@dataclass(frozen=True)
class ParallelModel:
    """A model in a layout, and which box of every parameter this rank holds."""

    module: GokuTransformer
    shards: dict[str, Shard]
    """This rank's memory of each parameter, by the parameter's name; in the module's order."""
    split_over_tp: frozenset[str]
    """Parameters of which each tensor-parallel rank holds a part; the others are copies."""
    partial_over_tp: frozenset[str]
    """Copies whose gradients are partial, since each tensor-parallel rank saw other tokens."""

    def gradients(self) -> dict[str, Tensor]:
        """This rank's box of every gradient, summed over every rank that saw other tokens or samples."""
        return {name: _local(p.grad) for name, p in self.module.named_parameters() if p.grad is not None}


def build_model(
    shape: ModelShape,
    groups: Groups,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    fsdp: bool = True,
) -> ParallelModel:
    """Build a model in the groups' layout, with initial values drawn from (seed, name).

    Args:
        dtype: type of the stored parameters.
        compute_dtype: type of the matrix products under FSDP; None: `dtype`.
        fsdp: False leaves the parameters whole on every data-parallel rank (sampling).
    """
    layout = groups.layout
    config = megatron_config(shape, tp=layout.tp, sequence_parallel=layout.sequence_parallel, dtype=dtype)
    spec = block_spec(
        LOCAL,
        cross_attention=shape.text_width is not None,
        self_core_attention=UlyssesAttention if layout.cp > 1 else PackedAttention,
    )
    with torch.device("meta"):
        module = GokuTransformer(shape, config=config, block=spec, groups=groups.model)
    tp_dims = tensor_parallel_dims(module, LOCAL)
    partial = token_split_parameters(module) if layout.sequence_parallel else frozenset()
    if fsdp:
        apply_fsdp(module, groups, compute_dtype or dtype)
    module.to_empty(device=groups.device)
    shards = {name: _shard(p, tp_dims.get(name), groups) for name, p in module.named_parameters()}
    for name, shard in shards.items():
        shard.tensor.copy_(shard.take(initial_value(name, shard.global_shape, seed)))
    return ParallelModel(module, shards, frozenset(tp_dims), partial)


def apply_fsdp(module: GokuTransformer, groups: Groups, compute_dtype: torch.dtype) -> None:
    """Shard every block, then the rest, over the (replicate, shard x cp) mesh.

    Gradients are summed, not averaged: the loss is already divided by the tokens of the global batch.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.promote_types(compute_dtype, torch.float32),
        cast_forward_inputs=False,  # timesteps and modulation stay in fp32
    )
    for part in (*module.blocks, module):
        fully_shard(part, mesh=groups.fsdp_mesh, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def tensor_parallel_dims(module: nn.Module, linears: Linears) -> dict[str, int]:
    """Which axis of each parameter is split over the tensor-parallel ranks."""
    dims: dict[str, int] = {}
    for prefix, part in module.named_modules():
        if isinstance(part, linears.column):
            dims |= {f"{prefix}.weight": 0, f"{prefix}.bias": 0}
        elif isinstance(part, linears.row):
            dims[f"{prefix}.weight"] = 1
        elif isinstance(part, InnerRMSNorm):
            dims[f"{prefix}.weight"] = 0
    return {name: dim for name, dim in dims.items() if name in dict(module.named_parameters())}


def token_split_parameters(module: GokuTransformer) -> frozenset[str]:
    """Copies that act where sequence parallelism has split the tokens."""
    found = {"final_layer.linear.weight", "final_layer.linear.bias"}
    found |= {name for name, _ in module.named_parameters() if name.startswith("patch_embedding.")}
    for name, _ in module.blocks.named_parameters(prefix="blocks"):
        if name.endswith(("cross_norm.weight", "mlp_norm.weight", "mlp.linear_fc2.bias")):
            found.add(name)
    return frozenset(found)


def sum_partial_gradients(model: ParallelModel, groups: Groups) -> None:
    """Sum over the tensor-parallel ranks the gradients that sequence parallelism left partial."""
    gradients = [grad for name, grad in model.gradients().items() if name in model.partial_over_tp]
    if not gradients:
        return
    flat = torch.cat([grad.flatten() for grad in gradients])
    dist.all_reduce(flat, group=groups.tp)
    for grad, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        grad.copy_(summed.view_as(grad))


def gradient_norm(model: ParallelModel, groups: Groups) -> Tensor:
    """The global L2 norm, fp64 scalar: every number of every gradient counted once in any layout."""
    split, copied = torch.zeros(2, dtype=torch.float64, device=groups.device).unbind()
    for name, grad in model.gradients().items():
        square = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        if name in model.split_over_tp:
            split += square
        else:
            copied += square
    total = torch.stack((split, copied))
    dist.all_reduce(total, group=groups.shard)
    if groups.layout.tp > 1:
        dist.all_reduce(total[0], group=groups.tp)
    return total.sum().sqrt()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(parameter: nn.Parameter, tp_dim: int | None, groups: Groups) -> Shard:
    """The box of the global parameter that this rank holds: its tensor-parallel part, then its FSDP rows."""
    offsets = [0] * parameter.dim()
    if isinstance(parameter, DTensor):
        _, fsdp_offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        offsets = list(fsdp_offsets)
    global_shape = list(parameter.shape)
    if tp_dim is not None:
        offsets[tp_dim] += groups.tp_rank * parameter.shape[tp_dim]
        global_shape[tp_dim] *= groups.layout.tp
    first_copy = groups.is_first_replica and (tp_dim is not None or groups.tp_rank == 0)
    return Shard(
        tensor=_local(parameter.detach()), global_shape=tuple(global_shape), offsets=tuple(offsets), owner=first_copy
    )
