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
MOST_BEYOND_SHARE = 0.1
"""Of the box's height, by which ink may reach out of it."""
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
    ink = find_ink(crop, inside)
    if ink is None:
        return box
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    found = Box(left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)
    beyond = max(box.left - found.left, box.top - found.top, found.right - box.right, found.bottom - box.bottom)
    if beyond > MOST_BEYOND_SHARE * min(width, height) + 1:
        return box  # the ground has the text's colour too
    fills = found.right - found.left >= LEAST_OF_BOX * width and found.bottom - found.top >= LEAST_OF_BOX * height
    return found if fills else box


def find_ink(crop: Array, inside: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Which pixels [height, width] are of the text that was detected `inside`; None where it cannot be told."""
    import cv2

    if inside.all() or not inside.any():
        return None
    distance = np.linalg.norm(crop - text_color(crop, inside), axis=-1)
    contrast = float(np.median(distance[~inside]))
    if contrast < LEAST_CONTRAST:
        return None
    count, parts = cv2.connectedComponents((distance < EDGE * contrast).astype(np.uint8))
    within = np.bincount(parts[inside], minlength=count)
    whole = np.bincount(parts.ravel(), minlength=count)
    mine = (within >= 0.5 * whole) & (whole > SPECK_SHARE * inside.sum())
    mine[0] = False
    return np.asarray(mine[parts]) if mine.any() else None


def text_color(crop: Array, inside: NDArray[np.bool_]) -> Array:
    """The colour [3] whose share of the box exceeds its share of the rim the most."""
    bins = (crop // BIN_LEVELS).astype(int)
    flat = np.ravel_multi_index(tuple(np.moveaxis(bins, -1, 0)), (256 // BIN_LEVELS,) * 3)
    size = (256 // BIN_LEVELS) ** 3
    in_box, in_rim = (np.bincount(flat[where], minlength=size) / where.sum() for where in (inside, ~inside))
    color = crop[inside & (flat == int((in_box - in_rim).argmax()))].mean(0)
    near = inside & (np.abs(crop - color) <= SPREAD_LEVELS).all(-1)
    return np.asarray(np.median(crop[near], axis=0))
