"""Attention over tokens that are split over ranks gives what one rank gives, and every rank works as hard."""

import pytest
import torch

from goku_mega.model.core_attention import PackedAttention, attend, attend_backward
from goku_mega.model.packed import Segments
from goku_mega.parallel.context import context_tokens, deal
from launch import run_ranks

HEADS, HEAD_DIM = 4, 8
PACKS = {
    "one long sample": (24,),
    "long and short": (37, 1, 5, 2, 3),
    "samples shorter than the ring": (1, 2, 1, 3, 1, 4),
}


class Config:
    kv_channels = HEAD_DIM


def make_pack(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """[query, key, value] stacked and the gradient of the result, fp64."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (sum(lengths), HEADS, HEAD_DIM)
    qkv = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return qkv, torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and gradients by the textbook, sample by sample."""
    qkv, grad = make_pack(lengths)
    qkv.requires_grad_()
    outs = []
    for part in qkv.split(lengths, dim=1):
        q, k, v = (x.transpose(0, 1) for x in part)
        outs.append(((q @ k.mT * HEAD_DIM**-0.5).softmax(-1) @ v).transpose(0, 1))
    out = torch.cat(outs)
    out.backward(grad)
    return out.detach(), qkv.grad


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_packed_attention_is_attention_of_each_sample(lengths):
    qkv, grad = make_pack(lengths)
    out, expected = reference(lengths)
    qkv.requires_grad_()
    found = PackedAttention(config=Config)(*qkv, Segments(lengths, lengths))
    found.backward(grad)
    close(found, out)
    close(qkv.grad, expected)


def test_blocks_of_keys_joined_by_their_logsumexp_are_the_whole():
    lengths = (9, 4, 1)
    (query, key, value), grad = make_pack(lengths)
    out, expected = reference(lengths)
    scale = HEAD_DIM**-0.5
    halves = [(9, 0, 1), (0, 4, 0)]  # some queries see no keys in a block
    chosen = [[*range(9), 13], [*range(9, 13)]]
    blocks = [attend(query, key[c], value[c], Segments(lengths, h), scale) for c, h in zip(chosen, halves, strict=True)]
    lse = torch.logaddexp(blocks[0][1], blocks[1][1])
    close(sum(o * (weight - lse).exp()[..., None] for o, weight in blocks), out)
    gradients = [
        attend_backward(grad, query, key[c], value[c], out, lse, Segments(lengths, h), scale)
        for c, h in zip(chosen, halves, strict=True)
    ]
    close(gradients[0][0] + gradients[1][0], expected[0])
    order = torch.tensor([*chosen[0], *chosen[1]]).argsort()
    for number in (1, 2):
        close(torch.cat([g[number] for g in gradients])[order], expected[number])


def attend_in_parallel(rank: int, lengths: tuple[int, ...], ulysses: int, ring: int) -> tuple[torch.Tensor, ...]:
    from torch.distributed.device_mesh import init_device_mesh

    from goku_mega.parallel.context import ContextAttention

    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    core = ContextAttention(
        ulysses=mesh.get_group("ulysses"), ring=mesh.get_group("ring"), config=Config, softmax_scale=None
    )
    qkv, grad = make_pack(lengths)
    tokens = context_tokens(lengths, rank, ulysses=ulysses, ring=ring)
    mine = qkv[:, tokens].requires_grad_()
    out = core(*mine, deal(lengths, ring) if ring > 1 else Segments(lengths, lengths))
    out.backward(grad[tokens])
    return tokens, out.detach(), mine.grad


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_attention_split_over_ranks_is_that_of_one(lengths, ulysses, ring):
    lengths = (*lengths, -sum(lengths) % (ulysses * ring)) if sum(lengths) % (ulysses * ring) else lengths
    parts = run_ranks(attend_in_parallel, ulysses * ring, lengths, ulysses, ring)
    order = torch.cat([tokens for tokens, _, _ in parts]).argsort()
    out, expected = reference(lengths)
    close(torch.cat([found for _, found, _ in parts])[order], out)
    close(torch.cat([grads for _, _, grads in parts], dim=1)[:, order], expected)


def test_an_odd_number_of_heads_needs_no_even_parts():
    """Three heads a rank: the exchanges cannot run in two parts."""
    parts = run_ranks(attend_with_six_heads, 2)
    close(torch.cat(parts), torch.arange(6.0, dtype=torch.float64).expand(4, 6)[..., None].expand(4, 6, 2))


def attend_with_six_heads(rank: int) -> torch.Tensor:
    """The values of a head are its number, so the result is too."""
    import torch.distributed as dist

    from goku_mega.parallel.context import ContextAttention

    alone = [dist.new_group([number]) for number in range(2)][rank]
    core = ContextAttention(ulysses=dist.group.WORLD, ring=alone, config=Config, softmax_scale=1.0)
    query = torch.randn(2, 6, 2, dtype=torch.float64)
    value = torch.arange(6.0, dtype=torch.float64)[None, :, None].expand(2, 6, 2)
    return core(query, query, value, Segments((4,), (4,)))


@pytest.mark.parametrize("ring", [2, 3, 8])
def test_the_deal_keeps_every_token_and_balances_attention(ring):
    lengths = [4096, 17, 1, 923, 64, 2, 31]
    lengths.append(-sum(lengths) % ring or ring)
    chunks = deal(lengths, ring).lengths
    assert [sum(parts) for parts in zip(*chunks, strict=True)] == lengths
    assert len({sum(chunk) for chunk in chunks}) == 1
    work = [sum(part * whole for part, whole in zip(chunk, lengths, strict=True)) for chunk in chunks]
    assert (
        max(work) / min(work) - 1 < 0.003
    )  # cut end to end, the first of eight chunks would have 100 times the last's
    everything = torch.cat([context_tokens(lengths, rank, ulysses=1, ring=ring) for rank in range(ring)])
    assert torch.equal(everything.sort().values, torch.arange(sum(lengths)))
