"""Selective activation checkpointing: which blocks are computed again in the backward pass, and what of them is kept.

Applied from outside, before FSDP. Numbers of blocks are those of the whole model, so a pipeline stage recomputes
what the same block would anywhere else.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from goku_mega.config.training import RecomputeConfig

MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten._scaled_mm)
ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
    torch.ops.aten._flash_attention_forward,
    torch.ops.aten._cudnn_attention_forward,
)
"""The forward passes of every attention that `model.core_attention` may call."""
OPERATORS_OF_LIBRARIES = ("torch_attn::_varlen_attn", "goku_mega::ring_attention")


def apply_recompute(blocks: nn.Module, config: RecomputeConfig, *, summed_in_place: int | None = None) -> None:
    """Let the chosen blocks forget their activations.

    Args:
        blocks: its children are the blocks, named by their numbers.
        summed_in_place: width of the products that are summed over ranks in their own memory, as row-parallel
            linears do without sequence parallelism. They are not kept: a kept one would be summed twice.

    Raises:
        ValueError: the policy is still `auto`; the plan has to choose one first.
    """
    if config.policy == "auto":
        raise ValueError("recompute.policy=auto must be decided before a model is built")
    for name, block in blocks.named_children():
        if config.covers(int(name)):
            # On the method: the hooks that FSDP hangs on the module stay outside of what is run again.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
                **_policy(config, summed_in_place),
            )  # fmt: skip


def _policy(config: RecomputeConfig, summed_in_place: int | None) -> dict[str, Any]:
    if config.policy == "full":
        return {}
    keep = partial(_keep_products, summed_in_place)
    return {"context_fn": partial(create_selective_checkpoint_contexts, keep)}


def _keep_products(summed_in_place: int | None, ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what matrix products and attention give; norms, modulation, rotation and GELU are cheap to repeat."""
    packet = operator.overloadpacket
    if packet in MATRIX_PRODUCTS:
        *_, right = (arg for arg in args if isinstance(arg, Tensor) and arg.dim() > 1)
        kept = right.shape[-1] != summed_in_place
    else:
        kept = packet in ATTENTION or operator.name() in OPERATORS_OF_LIBRARIES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
