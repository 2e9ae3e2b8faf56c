"""When to train: times drawn uniformly or from a logit-normal, shifted for large samples.

A time belongs to its seed, so the caller decides what it depends on (seed, step and sample).
"""

import math

import numpy as np

from goku_mega.config.training import FlowConfig


def draw_time(flow: FlowConfig, *, seed: int, tokens: int) -> float:
    """The training time t of one sample, in (0, 1); 1 is data.

    Args:
        flow: the distribution: uniform, or logit-normal (arXiv 2403.03206 section 3.1).
        seed: all the randomness there is.
        tokens: length of the sample, for the resolution shift.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    if flow.time_sampler == "uniform":
        t = float(rng.uniform(1e-6, 1 - 1e-6))
    else:
        t = 1 / (1 + math.exp(-(flow.logit_mean + flow.logit_std * float(rng.standard_normal()))))
    return shift_time(t, shift_for(tokens, flow.shift_base_tokens))


def shift_for(tokens: int, base_tokens: int) -> float:
    """sqrt(tokens / base): at equal noise a larger sample keeps more of its signal, so it needs more noise
    (arXiv 2403.03206 section 5.3.2). 1 where base_tokens is 0."""
    return math.sqrt(tokens / base_tokens) if base_tokens else 1.0


def shift_time(t: float, shift: float) -> float:
    """Move t towards noise: the noise level 1 - t becomes shift (1 - t) / (1 + (shift - 1)(1 - t))
    (arXiv 2403.03206 equation 23, where t is the noise level)."""
    noise = 1 - t
    return 1 - shift * noise / (1 + (shift - 1) * noise)


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """`steps` + 1 times from 0 (noise) to 1 (data) for a solver, shifted like the training times."""
    return [shift_time(number / steps, shift) for number in range(steps + 1)]
