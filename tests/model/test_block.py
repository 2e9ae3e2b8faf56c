"""Our block is the authors' block, packed and unpacked, and samples of a pack never meet."""

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from published_block import PublishedBlock, random_weights

from goku_mega.errors import CheckpointError
from goku_mega.model.block import GokuBlock, PackLayout
from goku_mega.model.packed import Segments
from goku_mega.model.rope import rotary_from_positions
from goku_mega.model.sizes import ModelShape
from goku_mega.model.specs import block_spec
from goku_mega.model.transformer import megatron_config
from goku_mega.model.weights import load_published_block
from goku_mega.parallel.groups import single_process_groups

SHAPE = ModelShape(layers=1, hidden_size=96, ffn_hidden_size=384, heads=4, text_width=96)
LENGTHS = [
    ([(1, 4, 4)], [5]),
    ([(3, 4, 4), (1, 2, 6), (1, 1, 1)], [7, 1, 3]),
    ([(1, 4, 4)] * 3 + [(5, 2, 3)] * 2, [4, 4, 9, 2, 2]),
    ([(2, 3, 5), (1, 7, 2), (4, 1, 1), (1, 7, 2)], [1, 12, 3, 12]),
]


def make_block(dtype: torch.dtype = torch.float32) -> GokuBlock:
    spec = block_spec(cross_attention=True)
    groups = single_process_groups()
    return build_module(spec, config=megatron_config(SHAPE, dtype=dtype), layer_number=1, pg_collection=groups.model)


def grid(t: int, h: int, w: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).reshape(-1, 3)


def make_pack(grids, text_lengths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(grids))
    positions = torch.cat([grid(*g) for g in grids])
    lengths = tuple(t * h * w for t, h, w in grids)
    pack = PackLayout(
        sample_index=torch.repeat_interleave(torch.arange(len(grids)), torch.tensor(lengths)),
        rotary=rotary_from_positions(positions, SHAPE.head_dim, dtype),
        self_segments=Segments(lengths, lengths),
        cross_segments=Segments(lengths, tuple(text_lengths)),
    )

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    return pack, draw(sum(lengths), 96), draw(sum(text_lengths), 96), draw(len(grids), 96)


@pytest.mark.parametrize(("grids", "text_lengths"), LENGTHS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_packed_block_equals_the_published_block_on_each_sample(grids, text_lengths, seed):
    theirs = PublishedBlock(96, 4, 384)
    random_weights(theirs, seed)
    ours = make_block()
    load_published_block(ours, theirs.state_dict())
    pack, x, text, embedding = make_pack(grids, text_lengths)

    packed = ours(x, embedding, text, pack)

    start = text_start = 0
    for sample, (length, text_length) in enumerate(zip(pack.self_segments.q_lengths, text_lengths, strict=True)):
        tokens, words = slice(start, start + length), slice(text_start, text_start + text_length)
        cos, sin = (part[tokens, 0] for part in pack.rotary)
        expected = theirs(x[None, tokens], text[None, words], embedding[None, sample], cos, sin)[0]
        torch.testing.assert_close(packed[tokens], expected, atol=1e-5, rtol=1e-5)
        start, text_start = start + length, text_start + text_length


@pytest.mark.parametrize(("grids", "text_lengths"), LENGTHS)
def test_packed_gradients_equal_the_sum_of_unpacked_ones(grids, text_lengths):
    theirs = PublishedBlock(96, 4, 384)
    random_weights(theirs, 3)
    ours = make_block(torch.float64)
    load_published_block(ours, {name: value.double() for name, value in theirs.state_dict().items()})
    pack, x, text, embedding = make_pack(grids, text_lengths, torch.float64)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    (ours(x, embedding, text, pack) * target).sum().backward()
    packed = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    start = text_start = 0
    for sample, (size, text_length) in enumerate(zip(grids, text_lengths, strict=True)):
        alone, *_ = make_pack([size], [text_length], torch.float64)
        tokens = slice(start, start + len(alone.sample_index))
        words = slice(text_start, text_start + text_length)
        (ours(x[tokens], embedding[sample : sample + 1], text[words], alone) * target[tokens]).sum().backward()
        start, text_start = tokens.stop, words.stop

    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, packed[name], atol=1e-10, rtol=1e-10)


def test_a_samples_loss_has_exactly_no_gradient_to_its_neighbours():
    theirs = PublishedBlock(96, 4, 384)
    random_weights(theirs, 5)
    ours = make_block()
    load_published_block(ours, theirs.state_dict())
    pack, x, text, embedding = make_pack([(1, 4, 4), (3, 2, 2), (1, 4, 4)], [3, 5, 3])
    x.requires_grad_()
    text.requires_grad_()
    embedding.requires_grad_()

    ours(x, embedding, text, pack)[16:28].square().sum().backward()

    assert x.grad[16:28].abs().min() > 0
    assert x.grad[:16].abs().max() == 0 and x.grad[28:].abs().max() == 0
    assert text.grad[3:8].abs().min() > 0
    assert text.grad[:3].abs().max() == 0 and text.grad[8:].abs().max() == 0
    assert embedding.grad[1].abs().min() > 0
    assert embedding.grad[[0, 2]].abs().max() == 0


def test_the_importer_names_what_is_missing_unknown_or_of_another_shape():
    state = PublishedBlock(96, 4, 384).state_dict()
    with pytest.raises(CheckpointError, match=r"attn2\.k_proj\.weight"):
        load_published_block(make_block(), {k: v for k, v in state.items() if k != "attn2.k_proj.weight"})
    with pytest.raises(CheckpointError, match=r"norm4\.weight"):
        load_published_block(make_block(), {**state, "norm4.weight": torch.ones(96)})
    with pytest.raises(CheckpointError, match=r"mlp\.linear_fc1\.bias.*\(7,\)"):
        load_published_block(make_block(), {**state, "mlp.fc1.bias": torch.ones(7)})
