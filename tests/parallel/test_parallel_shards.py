"""A shard knows which box of the global tensor it is."""

import pytest
import torch

from goku_mega.parallel.shards import Shard


def test_a_shard_takes_its_box_of_the_whole_tensor() -> None:
    full = torch.arange(20.0).view(4, 5)
    shard = Shard(torch.empty(2, 3), (4, 5), (1, 2))
    assert torch.equal(shard.take(full), full[1:3, 2:5])
    assert shard.slices == (slice(1, 3), slice(2, 5))
    assert not shard.complete


def test_a_scalar_is_a_box_without_axes() -> None:
    shard = Shard(torch.tensor(1.0), (), ())
    assert shard.take(torch.tensor(7.0)).item() == 7.0
    assert shard.complete


@pytest.mark.parametrize("local_shape", [(0,), (0, 5)])
def test_an_empty_box_takes_nothing_in_whatever_shape_it_has(local_shape: tuple[int, ...]) -> None:
    shard = Shard(torch.empty(local_shape), (4, 5), (4, 0))
    assert shard.empty
    assert tuple(shard.take(torch.zeros(4, 5)).shape) == local_shape


def test_a_box_outside_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="is not inside a tensor of"):
        Shard(torch.empty(2, 3), (4, 5), (3, 2))
    with pytest.raises(ValueError, match="do not match the shape"):
        Shard(torch.empty(2, 3), (4, 5), (0,))
    with pytest.raises(ValueError, match="expected a tensor of"):
        Shard(torch.empty(2, 3), (4, 5), (0, 0)).take(torch.zeros(5, 4))
