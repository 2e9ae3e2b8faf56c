"""Solvers of dx/dt = velocity(x, t) from noise at t = 0 to data at t = 1, and guidance."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
Solver = Literal["euler", "heun"]


def integrate(velocity: Velocity, x_0: Tensor, *, times: Sequence[float], solver: Solver = "euler") -> Tensor:
    """x at the last time.

    Args:
        velocity: (x, t) -> dx/dt, of x's shape.
        x_0: x at times[0], any shape.
        times: rising times.
        solver: euler (one velocity a step) or heun (two; second order).
    """
    step = _STEPS[solver]
    x = x_0
    for t, t_next in pairwise(times):
        x = step(velocity, x, t, t_next)
    return x


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_uncond + scale (v_cond - v_uncond) (arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def _euler_step(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    return x + (t_next - t) * velocity(x, t)


def _heun_step(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    first = velocity(x, t)
    second = velocity(x + (t_next - t) * first, t_next)
    return x + (t_next - t) * (first + second) / 2


_STEPS: dict[Solver, Callable[[Velocity, Tensor, float, float], Tensor]] = {"euler": _euler_step, "heun": _heun_step}
