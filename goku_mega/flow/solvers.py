"""Solvers of dx/dt = velocity(x, t) from noise at t = 0 to data at t = 1, and guidance."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeVar

from torch import Tensor

Time = TypeVar("Time", float, Tensor)
Velocity = Callable[[Tensor, Time], Tensor]
Solver = Literal["euler", "heun"]


def integrate(velocity: Velocity[Time], x_0: Tensor, *, times: Sequence[Time], solver: Solver = "euler") -> Tensor:
    """x at the last time.

    Args:
        velocity: (x, t) -> dx/dt, of x's shape.
        x_0: x at times[0], any shape.
        times: rising times; numbers, or tensors that broadcast to x where its parts keep times of their own.
        solver: euler (one velocity a step; first order) or heun (two, the second at the step's end; second order).
    """
    step = _euler_step if solver == "euler" else _heun_step
    x = x_0
    for t, t_next in pairwise(times):
        x = step(velocity, x, t, t_next)
    return x


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_uncond + scale (v_cond - v_uncond) (arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def _euler_step(velocity: Velocity[Time], x: Tensor, t: Time, t_next: Time) -> Tensor:
    return x + (t_next - t) * velocity(x, t)


def _heun_step(velocity: Velocity[Time], x: Tensor, t: Time, t_next: Time) -> Tensor:
    here = velocity(x, t)
    there = velocity(x + (t_next - t) * here, t_next)
    return x + (t_next - t) * (here + there) / 2
