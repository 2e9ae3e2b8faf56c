"""Stored pictures turned and mirrored as their file says: phones store them as the sensor lies."""

from typing import Any

import numpy as np

from goku_mega.media.video import Frames

DisplayMatrix = tuple[int, int, int, int]
"""Signs of (a, b, c, d): a stored picture's (x, y) is shown at (a x + c y, b x + d y), from its new corner."""

AS_STORED: DisplayMatrix = (1, 0, 0, 1)


def display_matrix(frame: Any) -> DisplayMatrix:
    """Of PyAV's frame."""
    for side_data in frame.side_data:
        if side_data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.sign(np.frombuffer(side_data, dtype=np.int32)[:5])
            return int(a), int(b), int(c), int(d)
    return AS_STORED


def is_mirrored(matrix: DisplayMatrix) -> bool:
    a, b, c, d = matrix
    return a * d - b * c < 0


def upright(pixels: Frames, matrix: DisplayMatrix) -> Frames:
    """Stored pictures [..., height, width, 3] as they are shown."""
    if matrix == AS_STORED:
        return pixels
    a, b, c, d = matrix
    across, down = a, d
    if _is_turned(matrix):
        pixels, across, down = pixels.swapaxes(-3, -2), c, b
    return np.ascontiguousarray(pixels[..., :: down or 1, :: across or 1, :])


def stored_size(size: tuple[int, int], matrix: DisplayMatrix) -> tuple[int, int]:
    """(height, width) as stored, of a picture that is shown in `size`."""
    return (size[1], size[0]) if _is_turned(matrix) else size


def _is_turned(matrix: DisplayMatrix) -> bool:
    """Whether rows are shown as columns."""
    return not matrix[0] and not matrix[3]
