"""A Goku model in a layout: built on no memory, split, sharded, and then given its values.

The order is pipeline stages (by the numbers of their blocks), tensor and context parallelism (by the
spec), recomputation, FSDP2, memory, values. The model itself knows nothing of FSDP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from goku_mega.config.training import ComputeConfig, RecomputeConfig
from goku_mega.kernels.fused import fused_available
from goku_mega.model.attention import InnerRMSNorm
from goku_mega.model.sizes import ModelShape
from goku_mega.model.specs import Engine, make_engine
from goku_mega.model.transformer import GokuTransformer, megatron_config
from goku_mega.model.weights import initial_value
from goku_mega.parallel.context import ContextAttention, heads_at_once
from goku_mega.parallel.groups import Groups
from goku_mega.parallel.pipeline import chunk_layers
from goku_mega.parallel.recompute import apply_recompute
from goku_mega.parallel.shards import Copies, Shard


@dataclass(frozen=True)
class ParallelModel:
    """A model in a layout, and which box of every parameter this rank holds."""

    chunks: tuple[GokuTransformer, ...]
    """The parts of the model on this rank, in the model's order; one, but for interleaved pipeline stages."""
    parameters: dict[str, tuple[nn.Parameter, ...]]
    """This rank's copies of each of its parameters, by name; several of what every chunk has. The first counts."""
    shards: dict[str, Shard]
    """This rank's memory of each of its parameters, by name; in the model's order."""
    split_over_tp: frozenset[str]
    """Parameters of which each tensor-parallel rank holds a part; the others are copies."""
    partial_over_tp: frozenset[str]
    """Copies whose gradients are partial, since each tensor-parallel rank saw other tokens."""
    partial_over_pp: frozenset[str]
    """Copies whose gradients are partial, since each pipeline stage ran other blocks."""

    @property
    def module(self) -> GokuTransformer:
        """The model, where the layout has one pipeline stage."""
        (module,) = self.chunks
        return module

    def start_step(self) -> None:
        """Clear the gradients, and bring every chunk's copies up to date with those that are updated."""
        for chunk in self.chunks:
            chunk.zero_grad()
        for first, *others in self.parameters.values():
            for other in others:
                _local(other.detach()).copy_(_local(first.detach()))

    def gradients(self) -> dict[str, Tensor]:
        """This rank's box of every gradient, summed over every rank that saw other tokens or samples."""
        return {name: _local(copies[0].grad) for name, copies in self.parameters.items() if copies[0].grad is not None}


def build_model(
    shape: ModelShape,
    groups: Groups,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    fsdp: bool = True,
    recompute: RecomputeConfig = RecomputeConfig(),
    compute: ComputeConfig = ComputeConfig(),
) -> ParallelModel:
    """Build a model in the groups' layout, with initial values drawn from (seed, name).

    Args:
        dtype: type of the stored parameters.
        compute_dtype: type of the matrix products under FSDP; None: `dtype`.
        fsdp: False leaves the parameters whole on every data-parallel rank (sampling).
        recompute: which activations are computed again; decided, not `auto`.
        compute: the engine of the blocks, whether they run in FP8, and whether Triton kernels may be used.

    Raises:
        UserError: the engine is not installed, or the device, the type or the layout cannot do what it asks.
    """
    layout = groups.layout
    engine = make_engine(
        compute, shape, tp=layout.tp, device=groups.device, dtype=compute_dtype or dtype,
        recomputes=recompute.policy != "off",
    )  # fmt: skip
    config = megatron_config(
        shape, tp=layout.tp, sequence_parallel=layout.sequence_parallel, dtype=dtype, **engine.settings
    )
    core = core_attention(engine, shape, groups)
    block = partial(engine.block, cross_attention=shape.text_width is not None, self_core_attention=core)
    around_blocks = partial(engine.around_blocks, config, groups.tp)
    with torch.device("meta"):
        chunks = tuple(
            GokuTransformer(
                shape,
                config=config,
                block=block,
                groups=groups.model,
                layers=layers,
                around_blocks=around_blocks,
                fused=compute.fused == "auto" and fused_available(groups.device),
            )
            for layers in chunk_layers(layout, groups.pp_rank, shape.layers)
        )
    parameters: dict[str, tuple[nn.Parameter, ...]] = {}
    tp_dims: dict[str, int] = {}
    partial_over_tp: set[str] = set()
    for chunk in chunks:
        tp_dims |= tensor_parallel_dims(chunk, engine)
        partial_over_tp |= token_split_parameters(chunk) if layout.sequence_parallel else frozenset()
        in_place = layout.tp > 1 and not layout.sequence_parallel
        apply_recompute(chunk.blocks, recompute, summed_in_place=shape.hidden_size if in_place else None)
        if fsdp:
            apply_fsdp(chunk, groups, compute_dtype or dtype)
        chunk.to_empty(device="cpu" if layout.cpu_offload else groups.device)
        for name, parameter in chunk.named_parameters():
            parameters[name] = (*parameters.get(name, ()), parameter)
    partial_over_pp = frozenset(filter(is_on_every_stage, parameters)) if layout.pp > 1 else frozenset()
    shards = {
        name: _shard(first, tp_dims.get(name), groups, on_every_stage=name in partial_over_pp)
        for name, (first, *_) in parameters.items()
    }
    for name, shard in shards.items():
        shard.tensor.copy_(shard.take(initial_value(name, shard.global_shape, seed)))
    return ParallelModel(chunks, parameters, shards, frozenset(tp_dims), frozenset(partial_over_tp), partial_over_pp)


def core_attention(engine: Engine, shape: ModelShape, groups: Groups) -> Callable[..., nn.Module]:
    """Builder of self-attention's core: the engine's, inside of context parallelism where there is any."""
    layout = groups.layout
    if layout.cp == 1:
        return engine.core_attention
    heads = shape.heads // layout.tp // layout.ulysses
    whole = partial(
        engine.core_attention,
        heads=heads_at_once(heads) if layout.ulysses > 1 else heads,
        ring=groups.ring if layout.ring > 1 else None,
    )
    return partial(ContextAttention, ulysses=groups.ulysses, ring=groups.ring, core=whole)


def apply_fsdp(module: GokuTransformer, groups: Groups, compute_dtype: torch.dtype) -> None:
    """Shard every block, then the rest, over the (replicate, shard x cp) mesh.

    Gradients are summed, not averaged: the loss is already divided by the tokens of the global batch.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.promote_types(compute_dtype, torch.float32),
        cast_forward_inputs=False,  # timesteps and modulation stay in fp32
    )
    offload = (
        CPUOffloadPolicy(pin_memory=groups.device.type == "cuda") if groups.layout.cpu_offload else OffloadPolicy()
    )
    for part in (*module.blocks, module):
        fully_shard(part, mesh=groups.fsdp_mesh, mp_policy=policy, offload_policy=offload)
    blocks = [block for block in module.blocks if isinstance(block, FSDPModule)]
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])  # its parameters travel while this block computes
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def tensor_parallel_dims(module: nn.Module, engine: Engine) -> dict[str, int]:
    """Which axis of each parameter is split over the tensor-parallel ranks."""
    dims: dict[str, int] = {}
    for prefix, part in module.named_modules():
        if isinstance(part, engine.columns):
            dims |= {f"{prefix}.weight": 0, f"{prefix}.bias": 0}
        elif isinstance(part, engine.rows):
            dims[f"{prefix}.weight"] = 1
        elif isinstance(part, InnerRMSNorm):
            dims[f"{prefix}.weight"] = 0
    names = {name for name, _ in module.named_parameters()}  # not every layer has a bias
    return {name: dim for name, dim in dims.items() if name in names}


def token_split_parameters(module: GokuTransformer) -> frozenset[str]:
    """Copies that act where sequence parallelism has split the tokens."""
    names = [name for name, _ in module.named_parameters()]
    outside = ("patch_embedding.", "final_layer.linear.")
    in_block = ("cross_norm.weight", "mlp_norm.weight", "mlp.linear_fc2.bias")
    return frozenset(
        name for name in names if name.startswith(outside) or (name.startswith("blocks.") and name.endswith(in_block))
    )


def is_on_every_stage(name: str) -> bool:
    """Whether every pipeline stage has the parameter: what the blocks get besides hidden states is embedded on each."""
    return not name.startswith(("patch_embedding.", "blocks.", "final_layer."))


def sum_partial_gradients(model: ParallelModel, groups: Groups) -> None:
    """Sum the gradients that sequence parallelism, and pipeline stages and chunks, left partial."""
    gradients = model.gradients()
    for name in model.partial_over_pp:
        for other in model.parameters[name][1:]:
            if other.grad is not None:
                gradients[name] += _local(other.grad)
    _all_reduce([grad for name, grad in gradients.items() if name in model.partial_over_tp], groups.tp)
    _all_reduce([grad for name, grad in gradients.items() if name in model.partial_over_pp], groups.pp)


def _all_reduce(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum over a group, in place and in one message."""
    if not gradients:
        return
    flat = torch.cat([grad.flatten() for grad in gradients])
    dist.all_reduce(flat, group=group)
    for grad, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        grad.copy_(summed.view_as(grad))


def gradient_norm(model: ParallelModel, groups: Groups, votes: Tensor) -> tuple[Tensor, Tensor]:
    """The global L2 norm, fp64 scalar: every number of every gradient counted once in any layout.

    Beside it, on the same messages, the sums of `votes` (fp64 [n]) over all ranks of this rank's replica, and as one
    more number at the end how many of those ranks have gradients that are not finite.
    """
    split, copied = torch.zeros(2, dtype=torch.float64, device=groups.device).unbind()
    for name, grad in model.gradients().items():
        if name in model.partial_over_pp and groups.pp_rank > 0:
            continue  # a copy of what the first stage counts
        square = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        if name in model.split_over_tp:
            split += square
        else:
            copied += square
    unusable = ~(split + copied).isfinite()
    numbers = torch.cat((torch.stack((copied, split)), votes, unusable.to(votes)[None]))
    dist.all_reduce(numbers, group=groups.shard)
    if groups.layout.tp > 1:
        dist.all_reduce(numbers[1:], group=groups.tp)
    if groups.layout.pp > 1:
        dist.all_reduce(numbers, group=groups.pp)
    return numbers[:2].sum().sqrt(), numbers[2:]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(parameter: nn.Parameter, tp_dim: int | None, groups: Groups, *, on_every_stage: bool) -> Shard:
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
    copies = _copies(groups, tp_dim, on_every_stage)
    return Shard(_local(parameter.detach()), tuple(global_shape), tuple(offsets), copies)


def _copies(groups: Groups, tp_dim: int | None, on_every_stage: bool) -> Copies:
    """The axes along which ranks hold the same box, and this rank's place on them."""
    layout = groups.layout
    axes = {
        "replicate": (groups.replica, layout.dp_replicate),
        "tp": (groups.tp_rank, layout.tp if tp_dim is None else 1),
        "pp": (groups.pp_rank, layout.pp if on_every_stage else 1),
    }
    number, count = 0, 1
    for place, ranks in axes.values():
        if ranks > 1:
            number, count = number * ranks + place, count * ranks
    return Copies(number, count, tuple(axis for axis, (_, ranks) in axes.items() if ranks > 1))
