"""Micro-batches through the stages of a pipeline, by megatron-core's schedules.

One stage takes them one after the other; several run 1F1B (arXiv 2104.04473 section 2.2), or its
interleaved form where a stage holds several chunks of the model.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import megatron.core.transformer.multi_token_prediction  # noqa: F401 - else the schedules do, in the first step
import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func, get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from goku_mega.model.packed import PackedBatch
from goku_mega.model.transformer import GokuTransformer
from goku_mega.parallel.groups import Groups
from goku_mega.parallel.layout import Layout

Micro = TypeVar("Micro")
Loss = Callable[[Tensor], Tensor]
"""Velocity [tokens/cp, patch_dim] -> this rank's share of the global loss; micro-batches and ranks add up."""
ModelCall = Callable[[PackedBatch], Tensor]
"""The part of the model on this stage: a pack -> the velocity, or hidden states for the next stage."""


def chunk_layers(layout: Layout, pp_rank: int, layers: int) -> list[range]:
    """Numbers of the blocks in each chunk of a stage; of two stages' four chunks, the first stage has 0 and 2."""
    edges = accumulate(layout.layers or (layers,), initial=0)
    chunks = [range(start, stop) for start, stop in pairwise(edges)]
    return chunks[pp_rank :: layout.pp]


def forward_backward(
    chunks: Sequence[GokuTransformer],
    groups: Groups,
    micro_batches: Sequence[Micro],
    tokens: Sequence[int],
    forward: Callable[[ModelCall, Micro], tuple[Tensor, Loss]],
    dtype: torch.dtype,
    *,
    forward_only: bool = False,
) -> Tensor:
    """Forward and backward of all micro-batches; the sum of their losses on the last stage, 0 on the others.

    Gradients add up in the parameters. Every stage calls it with the same micro-batches.

    Args:
        chunks: the parts of the model on this stage, in the model's order.
        micro_batches: equally many on every rank; with several chunks a stage, a multiple of the stages.
        tokens: tokens of each micro-batch on this context-parallel rank.
        forward: runs the model it is given on a micro-batch; its output and the loss, called on the last stage.
        dtype: type of the hidden states between the stages.
        forward_only: no backward; gradients stay as they are.
    """
    layout = groups.layout
    config = schedule_config(chunks[0].config, layout, dtype)
    stages = [_Chunk(chunk, config) for chunk in chunks]

    def forward_step(data: Iterator[Micro], stage: _Chunk) -> tuple[Tensor, Callable[[Tensor], tuple]]:
        output, loss_of = forward(stage, next(data))

        def counted_loss(velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss = loss_of(velocity)
            return loss, torch.zeros((), dtype=torch.int), loss.detach()  # megatron's count of tokens is not used

        return output, counted_loss

    schedule = get_forward_backward_func(layout.pp, layout.chunks if layout.chunks > 1 else None)
    losses = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in stages],
        model=stages,
        num_microbatches=len(micro_batches),
        seq_length=0,  # PackCommunicator knows the shapes
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=PackCommunicator(groups, config, tokens),
        pg_collection=groups.model,
    )
    return sum(losses, torch.zeros((), dtype=torch.float64, device=groups.device))


def schedule_config(model_config: TransformerConfig, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """A model's config with what the schedules want to know besides."""
    config = copy.copy(model_config)
    config.pipeline_dtype = dtype
    config.variable_seq_lengths = True
    # The loss is a share of the global one already: neither micro-batches nor ranks divide it.
    config.calculate_per_token_loss = True
    interleaved = layout.chunks > 1
    config.virtual_pipeline_model_parallel_size = layout.chunks if interleaved else None
    config.microbatch_group_size_per_vp_stage = layout.pp
    # Interleaved stages send both ways at once. With two stages the neighbours are one and the same
    # rank, and a batched exchange pairs what goes forward with what comes back: wrong in silence.
    config.overlap_p2p_comm = interleaved
    config.batch_p2p_comm = not interleaved
    config.batch_p2p_sync = False
    config.deallocate_pipeline_outputs = False  # the outputs are views
    return config


class _Chunk(nn.Module):
    """A part of the model as the schedules call it: hidden states travel as [tokens, 1, hidden]."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, part: GokuTransformer, config: TransformerConfig) -> None:
        super().__init__()
        self.part = part
        self.config = config
        self.received: Tensor | None = None

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        (self.received,) = received

    def forward(self, batch: PackedBatch) -> Tensor:
        if self.received is not None:
            self.part.hidden_states_before = self.received.squeeze(1)
        output = self.part(batch)
        self.part.hidden_states_before = None  # of the size of an activation: not kept beyond its use
        return output if self.part.is_last else output.unsqueeze(1)


class PackCommunicator(P2PCommunicator):
    """Exchange between neighbouring stages of packs of varying lengths.

    megatron-core's own sends every shape ahead and waits for it. Here each stage has loaded the same
    packs, so it knows what comes.
    """

    def __init__(self, groups: Groups, config: TransformerConfig, tokens: Sequence[int]) -> None:
        super().__init__(pp_group=groups.pp, config=config)
        layout = groups.layout
        per_rank = layout.tp if layout.sequence_parallel else 1
        shapes = [[count // per_rank, 1, config.hidden_size] for count in tokens]
        table = get_schedule_table(len(tokens), layout.chunks, layout.pp)
        within = [shapes[micro_batch] for micro_batch, _ in table]
        # From the last stage back to the first, what the last chunk gives is not sent. The backward
        # passes go through the table with the chunks in reverse.
        around = [shapes[micro_batch] for micro_batch, chunk in table if chunk < layout.chunks - 1]
        self.from_previous = iter(around if groups.pp_rank == 0 else within)
        self.from_next = iter(around if groups.pp_rank == layout.pp - 1 else within)

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int] | None, list[int] | None]:
        return next(self.from_previous) if recv_prev else None, next(self.from_next) if recv_next else None
