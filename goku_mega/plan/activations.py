"""Bytes that one rank keeps of a block from its forward to its backward pass, under every policy. No torch.

A table of every tensor that the backward pass reads; tests hold it against what autograd really saves.
"""

from functools import lru_cache
from typing import NamedTuple

from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.layout import Layout


class Pack(NamedTuple):
    """The fullest micro-batch of a data-parallel rank, over all of its context-parallel ranks."""

    tokens: int
    text_tokens: int
    samples: int


class Numerics(NamedTuple):
    """Bytes of a number, and whose kernels work on it."""

    stored: int = 4
    """In parameters, gradients, moments and averages."""
    computed: int = 2
    """In matrix products and most activations."""
    gpu: bool = True
    fused: bool = True
    """Triton kernels between the matrix products."""

    @property
    def wide(self) -> int:
        """Of norms, rotations and modulation: fp32 or better."""
        return max(4, self.computed)


class Saved(NamedTuple):
    """A tensor that the backward pass of a block reads."""

    numbers: float
    bytes_each: int
    product: bool = False
    """Whether it is what a matrix product or attention gave: kept under `selective`."""
    autograd: bool = True
    """False for a product that only `selective` keeps, since nothing reads it."""

    @property
    def bytes(self) -> float:
        return self.numbers * self.bytes_each


class _BlockParts:
    """The tensors by the parts of a block, in the order of its forward pass.

    Plain operations keep more than the fused kernels: norms their input and result in fp32, a sum its result.
    """

    def __init__(self, shape: ModelShape, layout: Layout, pack: Pack, numerics: Numerics) -> None:
        d, self.narrow, self.wide = shape.hidden_size, numerics.computed, numerics.wide
        self.fused = numerics.fused
        self.has_text = shape.text_width is not None
        self.exchanges = layout.ulysses > 1
        self.ring = layout.ring > 1
        self.one_call = numerics.gpu  # attention of a whole pack; else its samples' results are put end to end
        self.torch_fuses_norms = numerics.gpu
        self.splits_heads = layout.tp > 1
        self.tokens = pack.tokens / layout.cp
        self.own_tokens = self.tokens / layout.tp if layout.sequence_parallel else self.tokens
        self.own = self.own_tokens * d  # numbers of the hidden states
        self.inner = self.tokens * d / layout.tp  # of a query: all heads of the rank
        self.ffn = self.tokens * shape.ffn_hidden_size / layout.tp
        self.text_tokens = pack.text_tokens
        self.text = pack.text_tokens * d / layout.tp
        self.log_sum_exp = self.tokens * shape.heads / layout.tp
        self.rows = pack.samples * d

    def modulation(self) -> list[Saved]:
        linear = Saved(6 * self.rows, self.narrow, product=True, autograd=self.narrow == self.wide)
        return [Saved(self.rows, self.narrow), Saved(6 * self.rows, self.wide), linear]

    def self_attention(self) -> list[Saved]:
        saved = [*self._modulated_norm(layer_norm=True), Saved(self.own, self.narrow)]
        saved += [*self._inner_norm(self.inner, self.tokens), *self._inner_norm(self.inner, self.tokens)]
        # The value is a view of the whole projection.
        saved.append(Saved(3 * self.inner, self.narrow, product=True, autograd=self.fused or not self.exchanges))
        saved.append(Saved((3 if self.exchanges else 2) * self.inner, self.narrow))
        copied = self.exchanges or not (self.ring or self.one_call)
        return [*saved, *self._attention(copied=copied), Saved(self.own, self.narrow, product=True)]

    def cross_attention(self) -> list[Saved]:
        if not self.has_text:
            return []
        saved = [*self._norm(self.own, self.own_tokens), Saved(self.own, self.narrow)]
        saved += [*self._inner_norm(self.inner, self.tokens), Saved(self.inner, self.narrow)]
        saved.append(Saved(self.inner, self.narrow, product=True, autograd=self.fused))
        saved += [*self._inner_norm(self.text, self.text_tokens), Saved(self.text, self.narrow)]
        saved.append(Saved(2 * self.text, self.narrow, product=True))
        saved += self._attention(copied=not self.one_call)
        return [*saved, Saved(self.own, self.narrow, product=True, autograd=False)]

    def mlp(self) -> list[Saved]:
        saved = [*self._modulated_norm(layer_norm=False), Saved(self.own, self.narrow)]
        saved += [Saved(self.ffn, self.narrow, product=True), Saved(self.ffn, self.narrow)]
        return [*saved, *self._gated_add_with_bias()]

    def _modulated_norm(self, *, layer_norm: bool) -> list[Saved]:
        """Of a layer norm, the input is the block's."""
        if self.fused:
            statistics = Saved((2 if layer_norm else 1) * self.own_tokens, self.wide)
            return [statistics] if layer_norm else [Saved(self.own, self.narrow), statistics]
        modulated = Saved(self.own, self.narrow)
        if layer_norm:
            return [Saved(2 * self.own_tokens, self.narrow), modulated]
        return [*self._norm(self.own, self.own_tokens), modulated]

    def _norm(self, values: float, tokens: float, *, spelled_out: bool = False) -> list[Saved]:
        """Input, and what torch's own norm keeps besides: on a GPU, the inverse deviation."""
        if self.torch_fuses_norms and not spelled_out:
            return [Saved(values, self.narrow), Saved(tokens, self.wide)]
        return [Saved(values, self.wide), Saved(values, self.wide), Saved(tokens, self.wide)]

    def _inner_norm(self, values: float, tokens: float) -> list[Saved]:
        """Fused, it reads the projection itself; over the heads of several ranks, torch has no norm."""
        if self.fused:
            return [Saved(tokens, self.wide)]
        return self._norm(values, tokens, spelled_out=self.splits_heads)

    def _attention(self, *, copied: bool) -> list[Saved]:
        saved = [Saved(self.inner, self.narrow, product=True), Saved(self.log_sum_exp, self.wide, product=True)]
        return [*saved, Saved(self.inner, self.narrow)] if copied else saved

    def _gated_add_with_bias(self) -> list[Saved]:
        update = Saved(self.own, self.narrow, product=True, autograd=self.fused)
        return [update] if self.fused else [update, Saved(self.own, self.narrow)]


class BlockBytes(NamedTuple):
    """What one rank keeps of a block from its forward to its backward pass, by policy."""

    off: float
    selective: float
    full: float
    """The block's input."""
    shared: float
    """Of `selective`, what the block reads as it is when it is computed again."""

    def at_work(self, policy: str) -> float:
        """What the one block that is computed again adds to what it kept."""
        return {"off": 0.0, "selective": self.off - self.full - self.shared, "full": self.off - self.full}[policy]


@lru_cache(maxsize=4096)
def block_bytes(shape: ModelShape, layout: Layout, pack: Pack, numerics: Numerics) -> BlockBytes:
    """Bytes of one block's activations under every policy."""
    parts = _BlockParts(shape, layout, pack, numerics)
    tensors = [*parts.modulation(), *parts.self_attention(), *parts.cross_attention(), *parts.mlp()]
    block_input = parts.own * numerics.computed
    return BlockBytes(
        off=block_input + sum(saved.bytes for saved in tensors if saved.autograd),
        selective=block_input + sum(saved.bytes for saved in tensors if saved.product),
        full=block_input,
        shared=sum(saved.bytes for saved in tensors if saved.product and saved.autograd),
    )


def outside_bytes(shape: ModelShape, layout: Layout, pack: Pack, numerics: Numerics) -> float:
    """Activations around the blocks, and the pack itself; small beside the blocks."""
    tokens = pack.tokens / layout.cp
    own = tokens / layout.tp if layout.sequence_parallel else tokens
    final = 3 * own * shape.hidden_size * numerics.computed
    patches = tokens * shape.patch_dim * (2 * numerics.computed + 2 * numerics.stored)
    places = tokens * (4 * 8 + shape.head_dim * numerics.wide)  # position and sample of a token; cos and sin
    text = pack.text_tokens * ((shape.text_width or 0) + 2 * shape.hidden_size) * numerics.computed
    return final + patches + places + text


def passing_bytes(shape: ModelShape, layout: Layout, pack: Pack, numerics: Numerics) -> float:
    """The widest result that the backward pass of a block makes and lets go."""
    return numerics.computed * pack.tokens / layout.cp * shape.ffn_hidden_size / layout.tp
