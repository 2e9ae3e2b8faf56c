"""What packing saves and what megatron-core costs: `python -m benchmarks.packing [--json]`.

One training step (forward and backward, fp32 on a CPU) of a few Goku blocks on a batch of images and
videos of mixed lengths, three ways with the same weights:
  packed: our block, samples end to end;
  padded: the plain torch block, every sample padded to the longest, keys masked;
  plain:  the plain torch block on each group of equal samples, so exactly the packed FLOPs.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from benchmarks._measure import alternate, arguments, device_name, median_ms, ratio, report
from goku_mega.model.block import PackLayout
from goku_mega.model.packed import Segments
from goku_mega.model.rope import rotary_from_positions
from goku_mega.model.sizes import ModelShape
from goku_mega.model.specs import block_spec
from goku_mega.model.transformer import megatron_config
from goku_mega.model.weights import load_published_block
from goku_mega.parallel.groups import single_process_groups

sys.path.append(str(Path(__file__).parent.parent / "tests" / "model"))
from published_block import PublishedBlock, random_weights

SHAPE = ModelShape(layers=4, hidden_size=384, ffn_hidden_size=1536, heads=6, text_width=384)
GRIDS = [(1, 8, 8)] * 6 + [(1, 6, 10)] * 2 + [(3, 8, 8)] * 3 + [(4, 8, 8)]
TEXT_TOKENS = 12


class Stack(nn.Module):
    """Blocks in a row, called alike."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *arguments: object) -> Tensor:
        for block in self.blocks:
            x = block(x, *arguments)
        return x


class MaskedBlock(PublishedBlock):
    """The plain block on a padded batch: padding keys are masked out of self-attention."""

    mask: Tensor

    def forward(self, x: Tensor, text: Tensor, embedding: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        masked = F.scaled_dot_product_attention
        calls = iter((self.mask, None))  # self-attention first, then cross-attention

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return masked(q, k, v, attn_mask=next(calls))

        F.scaled_dot_product_attention = attention
        try:
            return super().forward(x, text, embedding, cos, sin)
        finally:
            F.scaled_dot_product_attention = masked


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    lengths = [t * h * w for t, h, w in GRIDS]
    positions = [torch.cartesian_prod(*(torch.arange(n) for n in grid)) for grid in GRIDS]
    samples = [torch.randn(n, SHAPE.hidden_size, generator=generator) for n in lengths]
    text = torch.randn(len(GRIDS), TEXT_TOKENS, SHAPE.hidden_size, generator=generator)
    embedding = torch.randn(len(GRIDS), SHAPE.hidden_size, generator=generator)

    plain = Stack([MaskedBlock(SHAPE.hidden_size, SHAPE.heads, SHAPE.ffn_hidden_size) for _ in range(SHAPE.layers)])
    random_weights(plain, 0)
    ours = Stack(build_blocks(plain))

    outputs: dict[str, Tensor] = {}
    sides = {
        "packed": packed_step(ours, samples, positions, text, embedding, outputs),
        "padded": padded_step(plain, samples, positions, text, embedding, outputs),
        "plain": grouped_step(plain, samples, positions, text, embedding, outputs),
    }
    seconds = alternate(sides, repeats=options.repeats)
    torch.testing.assert_close(outputs["packed"], outputs["padded"], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(outputs["packed"], outputs["plain"], atol=2e-4, rtol=2e-4)

    over_padded, over_plain = ratio(seconds, "padded", "packed"), ratio(seconds, "packed", "plain")
    real_share = sum(lengths) / (max(lengths) * len(lengths))
    lines = [f"{name:8} {median_ms(seconds[name]):9.2f} ms" for name in sides]
    lines.append(f"real tokens in the padded batch: {real_share:.0%}; outputs of all three agree")
    report(
        options,
        lines,
        {
            "name": "packing",
            "value": median_ms(seconds["packed"]),
            "unit": "ms per packed step",
            "baseline": {"padded_ms": median_ms(seconds["padded"]), "plain_torch_ms": median_ms(seconds["plain"])},
            "ratio": round(over_padded, 3),
            "padded_over_packed": round(over_padded, 3),
            "packed_over_plain_torch": round(over_plain, 3),
            "real_token_share_padded": round(real_share, 3),
            "tokens": sum(lengths),
            "repeats": options.repeats,
            "device": device_name(),
        },
    )


def build_blocks(plain: Stack) -> list[nn.Module]:
    spec, groups = block_spec(cross_attention=True), single_process_groups()
    blocks = []
    for number, theirs in enumerate(plain.blocks):
        block = build_module(spec, config=megatron_config(SHAPE), layer_number=number + 1, pg_collection=groups.model)
        load_published_block(block, theirs.state_dict())
        blocks.append(block)
    return blocks


def packed_step(model, samples, positions, text, embedding, outputs):
    lengths = tuple(len(sample) for sample in samples)
    pack = PackLayout(
        sample_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        rotary=rotary_from_positions(torch.cat(positions), SHAPE.head_dim),
        self_segments=Segments(lengths, lengths),
        cross_segments=Segments(lengths, (TEXT_TOKENS,) * len(lengths)),
    )

    def step() -> None:
        model.zero_grad()
        out = model(torch.cat(samples), embedding, text.flatten(0, 1), pack)
        out.square().mean().backward()
        outputs["packed"] = out.detach()

    return step


def padded_step(model, samples, positions, text, embedding, outputs):
    lengths = torch.tensor([len(sample) for sample in samples])
    x = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    padded_positions = nn.utils.rnn.pad_sequence(positions, batch_first=True)
    rotary = rotary_from_positions(padded_positions.flatten(0, 1), SHAPE.head_dim)
    # [samples, 1, tokens, head_dim / 2], broadcast over the heads
    cos, sin = (part[:, 0].unflatten(0, x.shape[:2])[:, None] for part in rotary)
    real = torch.arange(x.shape[1]) < lengths[:, None]

    def step() -> None:
        model.zero_grad()
        for block in model.blocks:
            block.mask = real[:, None, None]
        out = model(x, text, embedding, cos, sin)
        (out[real].square().mean()).backward()
        outputs["padded"] = out[real].detach()

    return step


def grouped_step(model, samples, positions, text, embedding, outputs):
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, grid in enumerate(GRIDS):
        groups.setdefault(grid, []).append(number)
    prepared = []
    for numbers in groups.values():
        cos, sin = (part[:, 0] for part in rotary_from_positions(positions[numbers[0]], SHAPE.head_dim))
        prepared.append((torch.stack([samples[n] for n in numbers]), text[numbers], embedding[numbers], cos, sin))
    total = sum(sample.numel() for sample in samples)

    def step() -> None:
        model.zero_grad()
        for block in model.blocks:
            block.mask = None
        parts = []
        for group in prepared:
            out = model(*group)
            (out.square().sum() / total).backward()
            parts.append(out.detach().flatten(0, 1))
        outputs["plain"] = torch.cat(parts)

    return step


if __name__ == "__main__":
    main()
