"""Optical flow on a grid of cells, fine enough to tell 0.29 px from 0.30 px in compressed footage; no weights.

OpenCV's DIS finds the flow; its lengths are off by up to a tenth of a pixel and follow the noise where there is no
texture, so the flow is then fitted once more to the pictures, with neighbouring cells bound to move alike.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CELL_PX = 8
BLUR_PX = 1.0
"""Gaussian over both pictures: noise of the codec down, and interpolation between pixels without a bias."""
WARPS = 3
NEIGHBOUR_PX = 0.05
"""How much neighbouring cells differ, beyond what the camera's motion makes them differ; a border of an object is
told by a difference well above BORDER_PX, and is then free."""
BORDER_PX = 0.1
TRUST_PX = 3.0
"""How far DIS may be off: it decides only where nothing else does."""
NOISE_LEVELS = 1.0
"""Least noise that is taken for granted, of 255 levels."""
SUPPORT = 0.5
"""DIS is believed where it leaves less than this share of the squared difference of the two pictures; where it
explains no more, it has followed the noise, and the camera's motion is taken, or none where DIS explains little."""
EDGE_PX = 8
"""DIS is not asked for its opinion this near to the picture's edge, where new content comes in."""
PLAIN_GRADIENT = 0.25
"""Mean squared gradient, levels a pixel, below which a cell shows no texture."""
PLAIN_SHARE = 0.5
"""A plain ground of more than this share of the picture stands still; a smaller one moves as its surroundings."""
SOLVER_STEPS = 40
SOLVER_TOLERANCE = 1e-3


class CellFlow(NamedTuple):
    """Flow (x, y) of every cell, px, [rows, columns, 2], and the pixels of each [rows, columns]."""

    flow: Array
    pixels: Array


class _Edges(NamedTuple):
    """How strongly neighbours are bound: in a row [rows, columns - 1], in a column [rows - 1, columns]."""

    across: Array
    down: Array


class _Data(NamedTuple):
    """What the pictures ask of each cell: flow is the minimum of `f matrix f / 2 - pull f`.

    Attributes:
        matrix: xx, xy and yy of the symmetric matrix, [rows, columns, 3].
        pull: [rows, columns, 2].
    """

    matrix: Array
    pull: Array


def rough_flow(first: Array, second: Array) -> Array:
    """DIS from one picture to the next, [height, width] levels of 255; px, [height, width, 2]."""
    import cv2

    cv2.setNumThreads(1)  # DIS shares patches out among threads, and its answer depends on the parts
    engine: Any = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)  # type: ignore[attr-defined]
    return np.asarray(engine.calc(np.rint(first).astype(np.uint8), np.rint(second).astype(np.uint8), None))


def cell_flow(first: Array, second: Array) -> CellFlow:
    """Flow from one picture to the next, each [height, width] levels of 255."""
    pictures = _Pictures(first, second)
    pixels = sum_cells(np.ones(first.shape))
    nothing = np.zeros((*first.shape, 2), np.float32)
    by_nothing = pictures.difference(nothing)
    rough = rough_flow(first, second)
    by_rough = pictures.difference(rough)
    if by_rough.sum() > SUPPORT * by_nothing.sum():
        rough, by_rough = nothing, by_nothing
    prior = sum_cells(rough.astype(np.float64)) / pixels[..., None]
    trust = sum_cells(_trusted(rough)) / pixels
    texture = sum_cells(pictures.first_x**2 + pictures.first_y**2) / pixels
    weights = trust * np.minimum(texture, 4.0)
    explained = (by_nothing <= NOISE_LEVELS**2 * pixels) | (by_rough <= SUPPORT * by_nothing)
    camera = camera_flow(prior, weights * explained + 1e-9)
    if (weights * explained).sum() < 0.5 * weights.sum():
        camera = np.zeros_like(camera)
    prior = np.where(explained[..., None], prior, camera)
    camera_dense = _to_pixels(camera, first.shape)
    by_camera = pictures.difference(camera_dense)
    flow, dense = prior, np.where(_whole(explained, first.shape)[..., None], rough, camera_dense)
    for _ in range(WARPS):
        # Beside an object DIS smears; a cell there that moves with the camera, or stands, is brought back.
        left = np.where(sum_cells(_lands_inside(dense, 2)) < pixels, 0, pictures.difference(dense))
        for other, other_dense, by_other in ((camera, camera_dense, by_camera), (np.zeros(2), nothing, by_nothing)):
            strays = by_other < SUPPORT * left
            flow = np.where(strays[..., None], other, flow)
            dense = np.where(_whole(strays, first.shape)[..., None], other_dense, dense)
            left = np.where(strays, by_other, left)
        data = pictures.data(dense)
        own = flow - camera
        edges = _bind(own, _variance(data.matrix))
        rest = data.pull - _apply(data.matrix, camera)
        hold = trust / TRUST_PX**2 + 1e-6
        flow = camera + _solve(data.matrix, rest + hold[..., None] * (prior - camera), hold, edges, own)
        dense = _to_pixels(flow, first.shape)
    ground = plain_ground(texture > PLAIN_GRADIENT)
    if (ground * pixels).sum() > PLAIN_SHARE * pixels.sum():
        flow = np.where(ground[..., None], 0.0, flow)
    return CellFlow(flow, pixels)


def camera_flow(flow: Array, weights: Array) -> Array:
    """The affine motion that most cells share, [rows, columns, 2]: pan, zoom, rotation, shear."""
    rows, columns = flow.shape[:2]
    y, x = np.mgrid[:rows, :columns]
    basis = np.stack([np.ones(x.size), (x.ravel() - columns / 2) / columns, (y.ravel() - rows / 2) / rows], -1)
    target, weight = flow.reshape(-1, 2), weights.ravel()
    share = weight
    fitted = target
    for _ in range(8):
        weighted = basis * share[:, None]
        ridge = 1e-9 * share.sum() * np.eye(3)
        fitted = basis @ np.linalg.solve(weighted.T @ basis + ridge, weighted.T @ target)
        miss = np.linalg.norm(target - fitted, axis=1)
        share = weight / (1 + (miss / max(float(np.median(miss)), 0.02)) ** 2)
    return fitted.reshape(flow.shape)


def plain_ground(textured: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Cells that lie between textured ones neither in their row nor in their column, [rows, columns]."""
    before = [np.logical_or.accumulate(textured, axis) for axis in (0, 1)]
    after = [np.flip(np.logical_or.accumulate(np.flip(textured, axis), axis), axis) for axis in (0, 1)]
    return ~((before[0] & after[0]) | (before[1] & after[1]))


def sum_cells(values: Array) -> Array:
    """[height, width, ...] to sums over cells [rows, columns, ...]; the last row and column may be of fewer pixels."""
    height, width = values.shape[:2]
    rest = ((0, -height % CELL_PX), (0, -width % CELL_PX), *((0, 0),) * (values.ndim - 2))
    padded = np.pad(values, rest)
    rows, columns = padded.shape[0] // CELL_PX, padded.shape[1] // CELL_PX
    lines = padded.reshape(rows, CELL_PX, *padded.shape[1:]).sum(1)
    return np.asarray(lines.reshape(rows, columns, CELL_PX, *values.shape[2:]).sum(2))


class _Pictures:
    """A pair of pictures, blurred, with what every warp needs of them."""

    def __init__(self, first: Array, second: Array) -> None:
        import cv2

        blurred = [cv2.GaussianBlur(picture.astype(np.float32), (0, 0), BLUR_PX) for picture in (first, second)]
        # Twice the size, then linear: a shift is met without a bias, where OpenCV's cubic has one of 0.04 px.
        self._second = cv2.pyrUp(blurred[1])
        same_blur = np.array([[1, 6, 1]], np.float32) / 8
        self._first = cv2.sepFilter2D(blurred[0], -1, same_blur, same_blur)
        self.first_x, self.first_y = _gradient(self._first)
        self._y, self._x = np.mgrid[: first.shape[0], : first.shape[1]].astype(np.float32)

    def back(self, flow: Array) -> Array:
        """The second picture brought back to the first by a flow of whole 64ths of a pixel, [height, width]."""
        import cv2

        to_x, to_y = 2 * (self._x + flow[..., 0]), 2 * (self._y + flow[..., 1])
        return np.asarray(cv2.remap(self._second, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))

    def difference(self, flow: Array) -> Array:
        """Squares of what is left between the pictures, summed over cells."""
        return sum_cells((self.back(flow).astype(np.float64) - self._first) ** 2)

    def data(self, flow: Array) -> _Data:
        """Least squares of the difference to the second picture brought back by `flow`, about that flow."""
        flow = np.rint(flow * 64) / 64  # OpenCV samples at 32nds of a pixel, here of half one
        back = self.back(flow)
        back_x, back_y = _gradient(back)
        x, y, miss = (self.first_x + back_x) / 2, (self.first_y + back_y) / 2, back - self._first
        inside = _lands_inside(flow, 2)
        noise = max(NOISE_LEVELS, 1.5 * float(np.median(np.abs(miss[inside]))) if inside.any() else NOISE_LEVELS)
        weight = inside / (1 + (miss / (3 * noise)) ** 2) / noise**2
        target = x * flow[..., 0] + y * flow[..., 1] - miss
        matrix = sum_cells((np.stack([x * x, x * y, y * y], -1) * weight[..., None]).astype(np.float64))
        return _Data(matrix, sum_cells((np.stack([x, y], -1) * (target * weight)[..., None]).astype(np.float64)))


def _gradient(picture: Array) -> tuple[Array, Array]:
    import cv2

    kernel = np.array([[-1, 0, 1]], np.float32) / 2
    return cv2.filter2D(picture, -1, kernel), cv2.filter2D(picture, -1, kernel.T)


def _lands_inside(flow: Array, margin: int) -> NDArray[np.bool_]:
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width]
    to_x, to_y = x + flow[..., 0], y + flow[..., 1]
    across = (to_x >= margin) & (to_x <= width - 1 - margin)
    return np.asarray(across & (to_y >= margin) & (to_y <= height - 1 - margin))


def _whole(cells: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.kron(cells, np.ones((CELL_PX, CELL_PX), bool))[: shape[0], : shape[1]]


def _trusted(rough: Array) -> Array:
    height, width = rough.shape[:2]
    middle = np.zeros((height, width))
    middle[EDGE_PX : height - EDGE_PX, EDGE_PX : width - EDGE_PX] = 1
    return middle * _lands_inside(rough, 0)


def _variance(matrix: Array) -> Array:
    """How uncertain a cell's flow is by its own pixels alone, px^2."""
    xx, xy, yy = matrix[..., 0] + 1e-3, matrix[..., 1], matrix[..., 2] + 1e-3
    return np.asarray((xx + yy) / (xx * yy - xy**2))


def _bind(flow: Array, variance: Array) -> _Edges:
    """Neighbours are bound unless they differ by more than their uncertainty explains."""
    across = (np.diff(flow, axis=1) ** 2).sum(-1) / (BORDER_PX**2 + variance[:, 1:] + variance[:, :-1])
    down = (np.diff(flow, axis=0) ** 2).sum(-1) / (BORDER_PX**2 + variance[1:] + variance[:-1])
    return _Edges(1 / NEIGHBOUR_PX**2 / (1 + across), 1 / NEIGHBOUR_PX**2 / (1 + down))


def _apply(matrix: Array, flow: Array) -> Array:
    x, y = flow[..., 0], flow[..., 1]
    return np.stack([matrix[..., 0] * x + matrix[..., 1] * y, matrix[..., 1] * x + matrix[..., 2] * y], -1)


def _solve(matrix: Array, pull: Array, hold: Array, edges: _Edges, start: Array) -> Array:
    """`(matrix + hold + edges) flow = pull` by conjugate gradients, each cell's own 2x2 as the preconditioner."""
    own = hold.copy()
    own[:, 1:] += edges.across
    own[:, :-1] += edges.across
    own[1:] += edges.down
    own[:-1] += edges.down
    xx, xy, yy = matrix[..., 0] + own, matrix[..., 1], matrix[..., 2] + own
    inverse = np.stack([yy, -xy, xx], -1) / (xx * yy - xy**2)[..., None]

    def whole(flow: Array) -> Array:
        result = _apply(matrix, flow) + hold[..., None] * flow
        across = np.diff(flow, axis=1) * edges.across[..., None]
        down = np.diff(flow, axis=0) * edges.down[..., None]
        result[:, 1:] += across
        result[:, :-1] -= across
        result[1:] += down
        result[:-1] -= down
        return result

    flow, rest = start, pull - whole(start)
    enough = SOLVER_TOLERANCE**2 * float((pull * _apply(inverse, pull)).sum())
    step = _apply(inverse, rest)
    size = float((rest * step).sum())
    for _ in range(SOLVER_STEPS):
        if size <= enough:
            break
        image = whole(step)
        length = size / float((step * image).sum())
        flow, rest = flow + length * step, rest - length * image
        ahead = _apply(inverse, rest)
        size, before = float((rest * ahead).sum()), size
        step = ahead + size / before * step
    return flow


def _to_pixels(flow: Array, shape: tuple[int, ...]) -> Array:
    import cv2

    size = (flow.shape[1] * CELL_PX, flow.shape[0] * CELL_PX)
    return np.asarray(cv2.resize(flow.astype(np.float32), size, interpolation=cv2.INTER_LINEAR))[: shape[0], : shape[1]]
