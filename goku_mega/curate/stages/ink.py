"""A detected text box drawn in to the ink, so that its area is the text's and not the detector's rim.

Text is told by its colour: the one that is common in the box and rare around it.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RIM_SHARE = 0.5
"""Of the box's height, around the box, where the ground is looked at and ink may go on."""
BIN_LEVELS = 16
SPREAD_LEVELS = 24.0
"""Farthest of 255 levels, in each colour, that pixels of the text's own colour are from it."""
LEAST_CONTRAST = 40.0
"""Of 255 levels, between text and ground; with less the edge cannot be told."""
EDGE = 0.35
"""Share of the contrast to the text's colour up to which a pixel is ink."""
SPECK_SHARE = 0.001
"""Of the box, below which a spot of the text's colour is no ink."""
MOST_STRAYS = 0.01
"""Of the ink: pixels of its colour around the box, above which the ground has that colour, too."""
MOST_BEYOND_SHARE = 0.1
"""Of the box's height, by which ink may reach out of it on such a ground."""
LEAST_OF_BOX = 0.5
"""Ink that spans less of the box's width or height is not what was detected."""


class Box(NamedTuple):
    """Pixels from left and top on, before right and bottom."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)


def ink_box(frame: Array, box: Box) -> Box:
    """The box of the ink in and about a detected one in a frame [height, width, 3]; the detected one if in doubt."""
    width, height = box.right - box.left, box.bottom - box.top
    rim = max(4, round(RIM_SHARE * min(width, height)))
    left, top = max(box.left - rim, 0), max(box.top - rim, 0)
    crop = frame[top : box.bottom + rim, left : box.right + rim].astype(np.float64)
    inside = np.zeros(crop.shape[:2], dtype=bool)
    inside[box.top - top : box.bottom - top, box.left - left : box.right - left] = True
    alike = of_text_color(crop, inside)
    ink = find_ink(alike, inside)
    if not ink.any():
        return box
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    found = Box(left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)
    beyond = max(box.left - found.left, box.top - found.top, found.right - box.right, found.bottom - box.bottom)
    strays = (alike & ~ink & ~inside).sum() > MOST_STRAYS * ink.sum()
    if strays and beyond > MOST_BEYOND_SHARE * min(width, height) + 1:
        return box  # the ground has the text's colour too, so what reaches out may be ground
    fills = found.right - found.left >= LEAST_OF_BOX * width and found.bottom - found.top >= LEAST_OF_BOX * height
    return found if fills else box


def find_ink(alike: NDArray[np.bool_], inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those of the pixels of the text's colour [height, width] that belong to what was detected `inside`."""
    import cv2

    count, parts = cv2.connectedComponents(alike.astype(np.uint8))
    within = np.bincount(parts[inside], minlength=count)
    whole = np.bincount(parts.ravel(), minlength=count)
    mine = (within >= 0.5 * whole) & (whole > SPECK_SHARE * inside.sum())
    mine[0] = False
    return np.asarray(mine[parts])


def of_text_color(crop: Array, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which pixels [height, width] are nearer to the text's colour than to the ground's; none if it has no own."""
    color = text_color(crop, inside)
    if color is None:
        return np.zeros(inside.shape, dtype=bool)
    distance = np.linalg.norm(crop - color, axis=-1)
    contrast = float(np.median(distance[~inside]))
    return np.asarray(distance < EDGE * contrast) if contrast >= LEAST_CONTRAST else np.zeros(inside.shape, dtype=bool)


def text_color(crop: Array, inside: NDArray[np.bool_]) -> Array | None:
    """The colour [3] whose share of the box exceeds its share of the rim the most; None where none does."""
    if inside.all() or not inside.any():
        return None
    shape = (256 // BIN_LEVELS,) * 3
    flat = np.ravel_multi_index(tuple(np.moveaxis((crop // BIN_LEVELS).astype(int), -1, 0)), shape)
    counts = [np.bincount(flat[where], minlength=np.prod(shape)).reshape(shape) for where in (inside, ~inside)]
    in_box, in_rim = (_with_neighbours(count) / count.sum() for count in counts)
    excess = np.where(counts[0] > 0, in_box - in_rim, 0)
    if excess.max() <= 0:
        return None
    color = crop[inside & (flat == int(excess.argmax()))].mean(0)
    near = inside & (np.abs(crop - color) <= SPREAD_LEVELS).all(-1)
    return np.asarray(np.median(crop[near], axis=0))


def _with_neighbours(counts: Array) -> Array:
    """Bins with those beside them: noise moves colours over the edges of bins."""
    for axis in range(counts.ndim):
        padded = np.pad(counts, [(1, 1) if place == axis else (0, 0) for place in range(counts.ndim)])
        length = counts.shape[axis]
        counts = sum(padded.take(range(shift, shift + length), axis) for shift in range(3))  # type: ignore[assignment]
    return counts
