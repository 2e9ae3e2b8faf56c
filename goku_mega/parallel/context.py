"""Context parallelism around the packed core attention: Ulysses.

Between the projections every rank holds some tokens of all heads; inside attention it holds all
tokens of some heads. Two all-to-alls change from one to the other (DeepSpeed-Ulysses,
arXiv 2309.14509; paper section 3.3).
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from goku_mega.model.attention import PackedAttention
from goku_mega.model.packed import Segments


class UlyssesAttention(nn.Module):
    """Core attention whose token axis is split over the context-parallel group."""

    def __init__(self, *, pg_collection: ProcessGroupCollection, **settings: object) -> None:
        super().__init__()
        self.group = pg_collection.cp
        self.inner = PackedAttention(**settings)  # type: ignore[arg-type]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """query, key, value and result: [tokens/cp, heads/tp, head_dim]; segments: of the whole pack."""
        together = torch.cat((query, key, value), dim=-1)  # one exchange instead of three
        together = heads_to_tokens(together, self.group)  # [tokens, heads/tp/cp, 3 * head_dim]
        attended = self.inner(*together.chunk(3, dim=-1), segments)  # [tokens, heads/tp/cp, head_dim]
        return tokens_to_heads(attended, self.group)


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens/cp, heads, width] -> [tokens, heads/cp, width]: give heads away, receive tokens."""
    by_receiver = x.unflatten(1, (group.size(), -1)).transpose(0, 1)  # [cp, tokens/cp, heads/cp, width]
    return _AllToAll.apply(by_receiver, group).flatten(0, 1)


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens, heads/cp, width] -> [tokens/cp, heads, width]: the way back."""
    by_receiver = x.unflatten(0, (group.size(), -1))  # [cp, tokens/cp, heads/cp, width]
    return _AllToAll.apply(by_receiver, group).transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Row r goes to rank r. Its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return _exchange(rows, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return _exchange(grad, ctx.group), None


def _exchange(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    dist.all_to_all_single(received, rows.contiguous(), group=group)
    return received
