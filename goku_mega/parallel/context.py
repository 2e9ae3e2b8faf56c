"""Context parallelism around the packed core attention: Ulysses, ring, and both.

The tokens of a pack are dealt to ring chunks sample by sample: every chunk has its share of every sample, so a
ring rank's attention costs what the others' costs, whatever the samples' lengths. Inside a chunk the tokens are
cut evenly over its Ulysses ranks.

Ulysses (arXiv 2309.14509; paper section 3.3): between the projections a rank holds some tokens of all heads,
inside attention all tokens of its chunk for some heads; all-to-alls change from one to the other. Ring
(arXiv 2310.01889): keys and values travel from chunk to chunk and the softmax is joined block by block. Heads
that the group does not divide over take both (28 heads over 8 ranks: Ulysses 4 x ring 2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from goku_mega.model.core_attention import PackedAttention, attend, attend_backward
from goku_mega.model.packed import RingSegments, Segments

OVERLAP_PARTS = 2
"""Groups of heads whose exchanges run beside each other's attention, where the heads divide."""


def deal(lengths: Sequence[int], ring: int) -> RingSegments:
    """Each ring chunk's tokens of every sample, as equal as can be.

    The tokens left over go round: every chunk gets the same number of tokens if `ring` divides their sum.
    """
    shares: list[list[int]] = [[] for _ in range(ring)]
    turn = 0
    for length in lengths:
        base, left = divmod(length, ring)
        for chunk in range(ring):
            shares[chunk].append(base + ((chunk - turn) % ring < left))
        turn = (turn + left) % ring
    return RingSegments(tuple(map(tuple, shares)))


def context_tokens(lengths: Sequence[int], cp_rank: int, *, ulysses: int, ring: int) -> Tensor:
    """Numbers of the pack's tokens that a context-parallel rank holds, ascending, [tokens / cp] int64.

    Args:
        lengths: tokens of each sample; their sum is a multiple of ulysses x ring.
    """
    shares = torch.tensor(deal(lengths, ring).lengths)  # [ring, samples]
    chunk, place = divmod(cp_rank, ulysses)
    starts = torch.cumsum(torch.tensor([0, *lengths[:-1]]), 0) + shares[:chunk].sum(0)
    in_chunk = torch.cat([torch.arange(n) + start for n, start in zip(shares[chunk].tolist(), starts, strict=True)])
    return in_chunk.chunk(ulysses)[place]


def heads_at_once(heads: int) -> int:
    """How many of a Ulysses rank's heads attend in one call, so that the exchange of others runs beside it."""
    return heads // OVERLAP_PARTS if heads % OVERLAP_PARTS == 0 else heads


class ContextAttention(nn.Module):
    """Core attention whose token axis is split over the context-parallel group."""

    def __init__(
        self,
        *,
        ulysses: dist.ProcessGroup,
        ring: dist.ProcessGroup,
        core: Callable[..., PackedAttention] = PackedAttention,
        **settings: Any,
    ) -> None:
        """
        Args:
            core: builder of the core attention of whole samples, and of those over a ring that it `takes`.
            settings: of the core attention.
        """
        super().__init__()
        self.ulysses = ulysses
        self.ring = ring
        self.inner = core(**settings)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | RingSegments) -> Tensor:
        """query, key, value and result: [tokens/cp, heads/tp, head_dim]; segments: of the whole pack."""
        size = self.ulysses.size()
        if size == 1:
            return self._attend(query, key, value, segments)
        together = torch.cat((query, key, value), dim=-1)  # one exchange instead of three
        heads = together.shape[1] // size
        parts = heads // heads_at_once(heads)
        # [tokens/cp, ulysses, heads, width], a part of every receiver's heads at a time
        by_part = together.unflatten(1, (size, heads)).chunk(parts, dim=2)
        arriving = [exchange(part.transpose(0, 1), self.ulysses) for part in by_part]
        returning = []
        for part in arriving:
            query, key, value = part.wait().flatten(0, 1).chunk(3, dim=-1)  # [tokens/ring, heads/parts, head_dim]
            attended = self._attend(query, key, value, segments)
            returning.append(exchange(attended.unflatten(0, (size, -1)), self.ulysses))
        # each [ulysses, tokens/cp, heads/parts, head_dim]: the heads of one sender after the other
        return torch.cat([part.wait() for part in returning], dim=2).transpose(0, 1).flatten(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | RingSegments) -> Tensor:
        if isinstance(segments, RingSegments) and not self.inner.takes(segments):
            out, _ = ring_attention(
                query, key, value, [n for chunk in segments.lengths for n in chunk], self.ring.group_name,
                self.inner.softmax_scale,
            )  # fmt: skip
            return out
        return self.inner(query, key, value, segments)


class Exchange:
    """An all-to-all on its way; `wait` gives what came. Its gradient travels back the same way, as early."""

    def __init__(self, received: Tensor, state: dict[str, Any]) -> None:
        self._received = received
        self._state = state

    def wait(self) -> Tensor:
        """[senders, ...]: row r came from rank r."""
        return _Arrive.apply(self._received, self._state)


def exchange(rows: Tensor, group: dist.ProcessGroup) -> Exchange:
    """Send row r of [receivers, ...] to rank r of the group and go on while it travels."""
    state: dict[str, Any] = {"group": group}
    return Exchange(_Depart.apply(rows, state), state)


def _send(rows: Tensor, state: dict[str, Any]) -> Tensor:
    rows = rows.contiguous()
    received = torch.empty_like(rows)
    state["sent"] = rows  # until it has left
    state["work"] = dist.all_to_all_single(received, rows, group=state["group"], async_op=True)
    return received


def _receive(state: dict[str, Any]) -> None:
    state.pop("work").wait()
    state.pop("sent")


class _Depart(torch.autograd.Function):
    """Starts an exchange; backward ends the one that `_Arrive` started."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, state: dict[str, Any]) -> Tensor:
        ctx.state = state
        return _send(rows, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _receive(ctx.state)
        return grad, None


class _Arrive(torch.autograd.Function):
    """Ends an exchange; backward starts the gradient's, which is the same exchange."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, state: dict[str, Any]) -> Tensor:
        _receive(state)
        ctx.state = state
        return received.view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _send(grad, ctx.state), None


@torch.library.custom_op("goku_mega::ring_attention", mutates_args=())
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], group_name: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of this chunk's queries to every chunk's keys.

    An operator of its own, so that a checkpointing policy can keep its result whole.

    Args:
        query, key, value: [tokens/ring, heads, head_dim].
        lengths: tokens of every sample in every chunk, chunk after chunk.
        group_name: the ring's process group.

    Returns:
        The result, as `query`, and the logsumexp over all keys [tokens/ring, heads].
    """
    ring = _Ring(group_name, lengths)
    wide = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros(query.shape, dtype=wide, device=query.device)
    lse = torch.full(query.shape[:-1], -torch.inf, dtype=wide, device=query.device)
    keys_values = torch.stack((key, value))
    for step in range(ring.size):
        following = ring.pass_on(keys_values) if step + 1 < ring.size else None
        keys, values = keys_values
        block_out, block_lse = attend(query, keys, values, ring.segments(step), scale)
        joined = torch.logaddexp(lse, block_lse)
        out = out * (lse - joined).exp()[..., None] + block_out * (block_lse - joined).exp()[..., None]
        lse = joined
        if following is not None:
            keys_values = following.wait()
    return out.to(query.dtype), lse


@ring_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], group_name: str, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(
        query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32)
    )


@torch.library.custom_op("goku_mega::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lengths: list[int],
    group_name: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `ring_attention`. A chunk's keys and values travel with the sum of their gradients so far."""
    ring = _Ring(group_name, lengths)
    wide = torch.promote_types(query.dtype, torch.float32)
    dq = torch.zeros(query.shape, dtype=wide, device=query.device)
    keys_values = torch.stack((key, value))
    sums: _Passing | None = None
    for step in range(ring.size):
        following = ring.pass_on(keys_values) if step + 1 < ring.size else None
        keys, values = keys_values
        block_dq, *block_dkv = attend_backward(grad, query, keys, values, out, lse, ring.segments(step), scale)
        dq += block_dq
        dkv = torch.stack(block_dkv).to(wide)
        if sums is not None:
            dkv += sums.wait()
        sums = ring.pass_on(dkv)
        if following is not None:
            keys_values = following.wait()
    assert sums is not None
    dk, dv = sums.wait().to(key.dtype)  # after a whole round the sums are home
    return dq.to(query.dtype), dk.clone(), dv.clone()


@ring_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lengths: list[int],
    group_name: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.lengths, ctx.group_name, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = ring_attention_backward(grad, *ctx.saved_tensors, ctx.lengths, ctx.group_name, ctx.scale)
    return *gradients, None, None, None


ring_attention.register_autograd(_backward, setup_context=_save_for_backward)


class _Ring:
    """This rank's place in the ring, and which chunk's keys it holds at each step."""

    def __init__(self, group_name: str, lengths: list[int]) -> None:
        self.group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
        self.size, self.rank = self.group.size(), self.group.rank()
        samples = len(lengths) // self.size
        self.chunks = [tuple(lengths[c * samples : (c + 1) * samples]) for c in range(self.size)]

    def segments(self, step: int) -> Segments:
        """This chunk's queries against the keys that have arrived after `step` passes."""
        return Segments(self.chunks[self.rank], self.chunks[(self.rank - step) % self.size])

    def pass_on(self, tensor: Tensor) -> "_Passing":
        """Send to the next rank, and receive from the one before, while the caller goes on."""
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        send = dist.P2POp(dist.isend, tensor, group=self.group, group_peer=(self.rank + 1) % self.size)
        receive = dist.P2POp(dist.irecv, received, group=self.group, group_peer=(self.rank - 1) % self.size)
        return _Passing(dist.batch_isend_irecv([send, receive]), tensor, received)


class _Passing:
    """A tensor on its way round the ring."""

    def __init__(self, works: list[dist.Work], sent: Tensor, received: Tensor) -> None:
        self.works, self.sent, self.received = works, sent, received  # `sent` lives until it has left

    def wait(self) -> Tensor:
        """What the rank before has sent."""
        for work in self.works:
            work.wait()
        return self.received
