"""Outlines of the shapes and grounds to put them on, as numbers; what is drawn where is decided in `shapes`."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def distance(shape: str, x: Floats, y: Floats, radius: float) -> Floats:
    """Signed distance to the outline, px, below 0 inside. The three shapes have about the same area."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.886 * radius
    inner = 0.74 * radius  # an equilateral triangle that points up, around its centroid
    slope = np.sqrt(3) / 2
    return np.maximum.reduce([y - inner, slope * x - 0.5 * y - inner, -slope * x - 0.5 * y - inner])


def extent(shape: str, radius: float) -> tuple[float, float, float]:
    """How far a shape reaches from its centre: sideways, up and down, px."""
    if shape == "triangle":
        inner = 0.74 * radius
        return inner * np.sqrt(3), 2 * inner, inner
    reach = radius if shape == "circle" else 0.886 * radius
    return reach, reach, reach


def draw_ground(rng: np.random.Generator, height: int, width: int, *, textured: bool) -> Floats:
    """A muted ground [height, width, 3]: plain, or with a gradient, stripes, checks or grain."""
    tint = rng.uniform(-8, 8, 3)
    ground = np.full((height, width, 3), rng.uniform(45, 210)) + tint
    if textured:
        y, x = np.mgrid[0:height, 0:width]
        period = int(rng.integers(8, 17))
        kind = int(rng.integers(4))
        pattern = [
            (x / width + y / height) - 1,
            np.sign(np.sin(2 * np.pi * (x + y * rng.integers(2)) / period)),
            np.sign(np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period)),
            rng.standard_normal((height, width)) / 2,
        ][kind]
        ground += rng.uniform(8, 18) * pattern[..., None]
    return np.clip(ground, 0, 255)
