"""A layout fits the processes and the model, or is refused with the numbers that would."""

import pytest

from goku_mega.config.training import LayoutConfig
from goku_mega.errors import ConfigError, LayoutError
from goku_mega.model.sizes import SIZES
from goku_mega.parallel.layout import Layout, resolve

TINY = SIZES["tiny"]  # 4 heads, 4 layers


def test_the_shard_degree_takes_what_the_others_leave():
    layout = resolve(LayoutConfig(tp=2, cp=2, dp_replicate=2), 32, TINY)
    assert layout == Layout(tp=2, ulysses=2, dp_replicate=2, dp_shard=4, sequence_parallel=True, layers=(4,))
    assert layout.world_size == 32 and layout.dp == 8 and layout.token_multiple == 4


def test_without_tensor_parallelism_there_is_no_sequence_parallelism():
    assert not resolve(LayoutConfig(sequence_parallel=True), 2, TINY).sequence_parallel


def test_a_layout_that_does_not_fit_the_processes_says_how_many_to_start():
    with pytest.raises(LayoutError, match="tp=3.* does not divide 4 processes; start a multiple of 3"):
        resolve(LayoutConfig(tp=3), 4, TINY)
    with pytest.raises(LayoutError, match="= 4 but 2 processes were started; start 4"):
        resolve(LayoutConfig(tp=2, dp_shard=2), 2, TINY)


def test_heads_that_do_not_divide_are_named_with_the_degrees_that_do():
    with pytest.raises(LayoutError, match=r"28 heads do not divide over tp=8; use tp in \{1, 2, 4, 7, 14, 28\}"):
        resolve(LayoutConfig(tp=8), 8, SIZES["2b"])
    with pytest.raises(LayoutError, match=r"28 heads per tensor-parallel rank do not divide over Ulysses 8"):
        resolve(LayoutConfig(cp=8, cp_ring=1), 8, SIZES["2b"])
    with pytest.raises(LayoutError, match=r"cp_ring=3 does not divide cp=8; use cp_ring in \{1, 2, 4, 8\}"):
        resolve(LayoutConfig(cp=8, cp_ring=3), 8, SIZES["2b"])


@pytest.mark.parametrize(
    ("size", "tp", "cp", "ulysses"),
    [("2b", 1, 8, 4), ("2b", 4, 7, 7), ("8b", 1, 8, 8), ("8b", 8, 8, 2), ("1b", 1, 3, 1)],
)
def test_the_ring_is_the_smallest_that_the_heads_allow(size, tp, cp, ulysses):
    layout = resolve(LayoutConfig(tp=tp, cp=cp), tp * cp, SIZES[size])
    assert (layout.ulysses, layout.ring) == (ulysses, cp // ulysses)


def test_layers_go_to_the_stages_evenly_and_the_longer_chunks_lie_in_the_middle():
    assert resolve(LayoutConfig(pp=4), 4, SIZES["8b"]).layers == (10, 10, 10, 10)
    assert resolve(LayoutConfig(pp=8), 8, SIZES["2b"]).layers == (3, 3, 4, 4, 4, 4, 3, 3)
    assert resolve(LayoutConfig(pp=2, pp_chunks=2), 2, TINY).layers == (1, 1, 1, 1)
    assert resolve(LayoutConfig(pp=2, pp_layers=(1, 3)), 2, TINY).layers == (1, 3)


def test_stages_that_do_not_fit_the_layers_are_refused():
    with pytest.raises(LayoutError, match="pp=3 x pp_chunks=2 = 6 chunks for 4 layers"):
        resolve(LayoutConfig(pp=3, pp_chunks=2), 3, TINY)
    with pytest.raises(LayoutError, match=r"layout\.pp_layers \[1, 2\] add up to 3, the model has 4"):
        resolve(LayoutConfig(pp=2, pp_layers=(1, 2)), 2, TINY)
    with pytest.raises(LayoutError, match="pp_chunks=2 needs pipeline stages"):
        resolve(LayoutConfig(pp_chunks=2), 1, TINY)
    with pytest.raises(ConfigError, match=r"pp_layers is \[1\]; give pp x pp_chunks = 2 numbers"):
        LayoutConfig(pp=2, pp_layers=(1,))


def test_degrees_below_one_are_refused_at_the_door():
    with pytest.raises(ConfigError, match=r"layout\.tp is 0"):
        LayoutConfig(tp=0)
