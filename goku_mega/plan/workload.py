"""What a step has to work through: the lengths of its samples, and the packs that they make. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.layout import Layout
from goku_mega.plan.activations import Pack
from goku_mega.plan.flops import attention_flops, forward_flops

LATENT_STRIDE = (4, 8, 8)
"""Frames, rows and columns of pixels in one latent cell; the first frame is a cell of its own."""


class Kind(NamedTuple):
    """Samples of one length."""

    tokens: int
    text_tokens: int
    share: float
    """Of the samples."""


@dataclass(frozen=True)
class Workload:
    """The samples of a step, and the most tokens of a pack."""

    kinds: tuple[Kind, ...]
    samples: int
    max_tokens: int

    @property
    def longest(self) -> int:
        return max(kind.tokens for kind in self.kinds)

    def mean(self, values: Sequence[float]) -> float:
        """Mean over the samples of a value of each kind."""
        shares = [kind.share for kind in self.kinds]
        return sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)

    @property
    def tokens(self) -> float:
        """Of a step."""
        return self.samples * self.mean([kind.tokens for kind in self.kinds])

    def micro_batches(self, layout: Layout) -> int:
        """Packs of a data-parallel rank in a step, as the batch planner counts them."""
        multiple = layout.micro_batch_multiple
        return max(1, ceil(self.tokens / (self.max_tokens * layout.dp * multiple))) * multiple

    def fullest_pack(self, layout: Layout) -> Pack:
        """The most that a pack can hold: packs are as even as whole samples allow, so one sample above the mean."""
        mean = self.tokens / (layout.dp * self.micro_batches(layout))
        tokens = min(self.max_tokens, self.longest + ceil(mean))
        if self.samples <= layout.dp:
            tokens = min(tokens, self.longest)
        tokens = ceil(tokens / layout.token_multiple) * layout.token_multiple
        samples = min(self.samples, ceil(tokens * self.samples / self.tokens))
        return Pack(tokens, ceil(samples * self.mean([kind.text_tokens for kind in self.kinds])), samples)

    def forward_flops(self, shape: ModelShape) -> float:
        """Of a step."""
        return self.samples * self.mean([forward_flops(kind.tokens, kind.text_tokens, shape) for kind in self.kinds])

    def attention_flops(self, shape: ModelShape) -> float:
        """The part of `forward_flops` that is scores and values."""
        return self.samples * self.mean([attention_flops(kind.tokens, kind.text_tokens, shape) for kind in self.kinds])


def video_tokens(frames: int, height: int, width: int, shape: ModelShape) -> int:
    """Tokens of a clip of `frames` x `height` x `width` pixels: 241 x 720 x 1280 are 219,600."""
    cells = ((frames - 1) // LATENT_STRIDE[0] + 1, height // LATENT_STRIDE[1], width // LATENT_STRIDE[2])
    t, h, w = (count // patch for count, patch in zip(cells, shape.patch, strict=True))
    return t * h * w
