"""A layout fits the processes and the model, or is refused with the numbers that would."""

import pytest

from goku_mega.config import LayoutConfig
from goku_mega.errors import ConfigError, LayoutError
from goku_mega.model.sizes import SIZES
from goku_mega.parallel.layout import Layout, check_fits, resolve


def test_the_shard_degree_takes_what_the_others_leave():
    layout = resolve(LayoutConfig(tp=2, cp=2, dp_replicate=2), 32)
    assert layout == Layout(tp=2, cp=2, dp_replicate=2, dp_shard=4, sequence_parallel=True)
    assert layout.world_size == 32 and layout.dp == 8 and layout.token_multiple == 4


def test_without_tensor_parallelism_there_is_no_sequence_parallelism():
    assert not resolve(LayoutConfig(sequence_parallel=True), 2).sequence_parallel


def test_a_layout_that_does_not_fit_the_processes_says_how_many_to_start():
    with pytest.raises(LayoutError, match="tp=3.* does not divide 4 processes; start a multiple of 3"):
        resolve(LayoutConfig(tp=3), 4)
    with pytest.raises(LayoutError, match="= 4 but 2 processes were started; start 4"):
        resolve(LayoutConfig(tp=2, dp_shard=2), 2)


def test_heads_that_do_not_divide_are_named_with_the_degrees_that_do():
    with pytest.raises(LayoutError, match=r"28 heads do not divide over tp=8; use tp in \{1, 2, 4, 7, 14, 28\}"):
        check_fits(Layout(tp=8), SIZES["2b"])
    with pytest.raises(LayoutError, match=r"28 heads per tensor-parallel rank do not divide over cp=8"):
        check_fits(Layout(cp=8), SIZES["2b"])
    check_fits(Layout(tp=4, cp=7), SIZES["2b"])


def test_degrees_below_one_are_refused_at_the_door():
    with pytest.raises(ConfigError, match=r"layout\.tp is 0"):
        LayoutConfig(tp=0)
