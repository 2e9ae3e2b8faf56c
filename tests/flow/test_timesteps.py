"""Training times: their distributions, their shift, and the grid a solver walks on."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from goku_mega.config.training import FlowConfig
from goku_mega.flow.timesteps import draw_time, shift_for, shift_time, time_grid
from goku_mega.seeding import derive_seed

DRAWS = 4000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def draws(flow: FlowConfig, tokens: int = 48) -> list[float]:
    return [draw_time(flow, seed=derive_seed(0, "time", number), tokens=tokens) for number in range(DRAWS)]


def share_below(times: list[float], bound: float) -> float:
    return float(np.mean(np.array(times) < bound))


def test_uniform_times_fill_the_open_interval_evenly():
    times = draws(FlowConfig(time_sampler="uniform"))
    assert min(times) > 0 and max(times) < 1
    for quantile in QUANTILES:
        assert share_below(times, quantile) == pytest.approx(quantile, abs=0.025)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_times_have_its_quantiles(mean: float, std: float):
    times = draws(FlowConfig(time_sampler="logit_normal", logit_mean=mean, logit_std=std))
    assert min(times) > 0 and max(times) < 1
    for quantile in QUANTILES:
        bound = 1 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(quantile)))
        assert share_below(times, bound) == pytest.approx(quantile, abs=0.025)


def test_a_time_belongs_to_its_seed():
    flow = FlowConfig()
    assert draw_time(flow, seed=5, tokens=48) == draw_time(flow, seed=5, tokens=48)
    assert draw_time(flow, seed=5, tokens=48) != draw_time(flow, seed=6, tokens=48)


def test_larger_samples_spend_more_time_near_noise_and_base_sized_ones_are_not_shifted():
    shifted, plain = FlowConfig(shift_base_tokens=256), FlowConfig()
    for seed in range(20):
        by_size = [draw_time(shifted, seed=seed, tokens=tokens) for tokens in (64, 256, 1024, 219_600)]
        assert by_size == sorted(by_size, reverse=True)
        assert by_size[1] == pytest.approx(draw_time(plain, seed=seed, tokens=256), rel=1e-12)
        assert draw_time(plain, seed=seed, tokens=64) == draw_time(plain, seed=seed, tokens=219_600)


def test_four_times_the_tokens_at_half_the_signal_to_noise_odds():
    """The shift multiplies the odds of noise, (1 - t) / t, by sqrt(tokens / base)."""
    for t in (0.1, 0.5, 0.8):
        moved = shift_time(t, shift_for(1024, 256))
        assert (1 - moved) / moved == pytest.approx(2 * (1 - t) / t)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_solvers_grid_rises_from_exactly_0_to_exactly_1(shift: float):
    grid = time_grid(20, shift)
    assert (len(grid), grid[0], grid[-1]) == (21, 0.0, 1.0)
    assert all(here < there for here, there in pairwise(grid))
    assert time_grid(1, shift) == [0.0, 1.0]
