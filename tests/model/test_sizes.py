"""The family has the sizes of the paper's Table 1, counted on no memory."""

import pytest
import torch

from goku_mega.errors import ConfigError
from goku_mega.model.sizes import SIZES, model_shape
from goku_mega.model.specs import block_spec
from goku_mega.model.transformer import GokuTransformer, megatron_config
from goku_mega.parallel.groups import single_process_groups


def parameters(size: str) -> int:
    shape = SIZES[size]
    with torch.device("meta"):
        model = GokuTransformer(
            shape,
            config=megatron_config(shape),
            block=lambda number: block_spec(cross_attention=shape.text_width is not None),
            groups=single_process_groups().model,
        )
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "count"),
    [("1b", 826_162_624), ("2b", 1_996_207_424), ("8b", 8_352_052_288), ("pilot-1b", 674_894_656), ("tiny", 1_574_336)],
)
def test_parameter_counts(size, count):
    assert parameters(size) == count


@pytest.mark.parametrize("size", ["2b", "8b"])
def test_a_block_has_about_22_squares_of_its_width(size):
    """Self-attention 4, cross-attention 4, feed-forward 8, adaLN 6 (DESIGN section 2)."""
    shape = SIZES[size]
    per_block = parameters(size) / shape.layers / shape.hidden_size**2
    assert 22 <= per_block < 22.3


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="3b.*tiny, pilot-1b, 1b, 2b, 8b"):
        model_shape("3b")
