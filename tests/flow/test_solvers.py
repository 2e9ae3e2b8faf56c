"""Solvers against fields whose solutions are known."""

import math

import pytest
import torch
from torch import Tensor

from goku_mega.flow.solvers import Solver, guided, integrate
from goku_mega.flow.timesteps import time_grid

START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def error(solver: Solver, steps: int) -> float:
    """Against dx/dt = x cos(3 t), whose solution is x_0 exp(sin(3 t) / 3)."""
    found = integrate(lambda x, t: x * math.cos(3 * t), START, times=time_grid(steps), solver=solver)
    return float((found - START * math.exp(math.sin(3) / 3)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver: Solver, order: int):
    assert math.log2(error(solver, 256) / error(solver, 512)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_straight_path_is_exact_in_one_step(solver: Solver):
    data = torch.tensor([3.0, 4.0, -1.0], dtype=torch.float64)
    found = integrate(lambda x, t: data - START, START, times=[0.0, 1.0], solver=solver)
    torch.testing.assert_close(found, data, rtol=0, atol=1e-15)


def test_heun_is_exact_where_velocity_is_linear_in_time_and_ends_at_the_last_time():
    seen: list[float] = []

    def field(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return torch.full_like(x, 2 * t)

    found = integrate(field, START, times=time_grid(5, 3.0), solver="heun")
    torch.testing.assert_close(found, START + 1.0)
    assert (len(seen), seen[0], seen[-1]) == (10, 0.0, 1.0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_parts_with_times_of_their_own_go_as_they_would_alone(solver: Solver):
    def field(x: Tensor, t: float | Tensor) -> Tensor:
        return x * torch.cos(3 * torch.as_tensor(t))

    grids = [time_grid(8, shift) for shift in (1.0, 2.0, 0.7)]
    together = integrate(field, START, times=list(torch.tensor(grids, dtype=torch.float64).T), solver=solver)
    alone = [integrate(field, x, times=grid, solver=solver) for x, grid in zip(START, grids, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_guidance_leaves_the_conditional_at_1_the_unconditional_at_0_and_extrapolates_beyond():
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert torch.equal(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    assert torch.equal(guided(conditional, unconditional, 2.5), torch.tensor([2.5, -1.0]))
