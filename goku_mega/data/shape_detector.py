"""Reads shape, colour, count, place and motion back from frames: exact rules, nothing learned.

Grounds are muted and objects saturated, so a pixel's chroma over its object's is how much of the
pixel the object covers. Moments of that cover tell the rest.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from goku_mega.data.shapes import COLORS, DIRECTIONS, Scene

Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]

MIN_CHROMA = 45.0
"""Grounds stay below it, the six colours far above, also after a lossy codec."""
MIN_COVER = 0.35
"""Share of an object's chroma from which a pixel counts as its."""
MIN_AREA_SHARE = 0.006
"""Smallest object, as a share of the picture."""
STILL_SHARE = 0.07
"""Displacement over the clip, as a share of the shorter side, below which an object stands still."""
HARMONICS = {"circle": (0.0, 0.0), "square": (0.0, 0.43), "triangle": (0.42, 0.0)}
"""Strength of the third and fourth angular harmonic of each shape's cover."""


@dataclass(frozen=True)
class DetectedObject:
    """What was read of one object."""

    shape: str
    color: str
    motion: str
    center: tuple[float, float]
    """Mean centre over the clip, as shares (x, y) of width and height."""


@dataclass(frozen=True)
class Detection:
    """Every object found, largest first."""

    objects: tuple[DetectedObject, ...]

    @property
    def count(self) -> int:
        return len(self.objects)


def detect(frames: Frames) -> Detection:
    """Read a clip or image [frames, height, width, 3]. What holds no object gives a count of 0."""
    height, width = frames.shape[1:3]
    pixels = frames.astype(np.float64)
    pixels -= _ground(pixels)
    chroma, nearest = _color_of_pixels(pixels)
    found: list[tuple[float, DetectedObject]] = []
    for number, color in enumerate(COLORS):
        strong = (nearest == number) & (chroma > MIN_CHROMA)
        if strong.sum() < 0.4 * MIN_AREA_SHARE * strong.size:
            continue
        full = np.quantile(chroma[strong], 0.75)
        cover = np.where(nearest == number, np.clip(chroma / full, 0, 1), 0)
        cover[cover < MIN_COVER] = 0
        for piece in _pieces(cover):
            area = piece.sum(axis=(1, 2))
            present = area > MIN_AREA_SHARE * height * width
            if present.mean() < 0.6:
                continue
            centers = _centers(piece[present], area[present])
            shape = _shape(piece[present], centers, area[present])
            motion = _motion(centers, np.flatnonzero(present), min(height, width))
            x, y = centers.mean(axis=0)
            found.append((float(area.mean()), DetectedObject(shape, color, motion, (x / width, y / height))))
    return Detection(tuple(item for _, item in sorted(found, key=lambda pair: -pair[0])))


def score(truth: Scene, detection: Detection, *, is_video: bool) -> dict[str, bool]:
    """Which of the truth's statements the detection bears out, task by task, and `all` of them.

    One object: shape, color, and motion of a video, read from the largest object found. Two objects:
    count, two_objects (both shapes with their colours), position (each where it is said to be), motion.
    """
    judge = _score_one if truth.level == "one" else _score_two
    marks = judge(truth, detection, is_video)
    return {**marks, "all": all(marks.values())}


def _score_one(truth: Scene, detection: Detection, is_video: bool) -> dict[str, bool]:
    wanted = truth.objects[0]
    got = detection.objects[0] if detection.objects else None
    marks = {
        "shape": got is not None and got.shape == wanted.shape,
        "color": got is not None and got.color == wanted.color,
    }
    if is_video:
        marks["motion"] = got is not None and got.motion == wanted.motion
    return marks


def _score_two(truth: Scene, detection: Detection, is_video: bool) -> dict[str, bool]:
    by_color = {item.color: item for item in reversed(detection.objects)}
    pairs = [(wanted, by_color.get(wanted.color)) for wanted in truth.objects]
    marks = {
        "count": detection.count == len(truth.objects),
        "shape": all(got is not None and got.shape == wanted.shape for wanted, got in pairs),
        "color": all(got is not None for _, got in pairs),
        "two_objects": all(got is not None and got.shape == wanted.shape for wanted, got in pairs),
        "position": all(got is not None and _is_at(got, wanted.position) for wanted, got in pairs),
    }
    if is_video:
        marks["motion"] = all(got is not None and got.motion == wanted.motion for wanted, got in pairs)
    return marks


def _is_at(item: DetectedObject, position: str | None) -> bool:
    x, y = item.center
    return {"left": x < 0.5, "right": x > 0.5, "top": y < 0.5, "bottom": y > 0.5}.get(position or "", True)


def _ground(pixels: Floats) -> Floats:
    """The ground's tint: the median colour of a frame's border, without its brightness, [frames, 1, 1, 3]."""
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    tint = np.median(border, axis=1)
    return (tint - tint.mean(axis=-1, keepdims=True))[:, None, None]


def _color_of_pixels(pixels: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Chroma of every pixel and the number of the colour whose hue is nearest, both [frames, height, width]."""
    hue = pixels - pixels.mean(axis=-1, keepdims=True)
    chroma = np.linalg.norm(hue, axis=-1)
    palette = np.array(list(COLORS.values()), dtype=np.float64)
    palette -= palette.mean(axis=-1, keepdims=True)
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    return chroma, np.argmax(hue @ palette.T, axis=-1)


def _pieces(cover: Floats) -> list[Floats]:
    """The cover of each connected object: what stands apart in most frames is another object."""
    seen = cover.max(axis=0) > 0
    pieces = []
    for mask in _components(seen):
        piece = cover * mask
        if (piece > 0).any():
            pieces.append(piece)
    return pieces


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected parts of a mask [height, width] by spreading labels until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.pad(labels, 1)
        spread = np.maximum.reduce(
            [spread[1:-1, 1:-1], spread[:-2, 1:-1], spread[2:, 1:-1], spread[1:-1, :-2], spread[1:-1, 2:]]
        )
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels[labels > 0])]
        labels = spread


def _centers(cover: Floats, area: Floats) -> Floats:
    """Centre of mass (x, y) in every frame, [frames, 2]."""
    y, x = np.mgrid[0 : cover.shape[1], 0 : cover.shape[2]] + 0.5
    return np.stack([(cover * x).sum(axis=(1, 2)) / area, (cover * y).sum(axis=(1, 2)) / area], axis=1)


def _shape(cover: Floats, centers: Floats, area: Floats) -> str:
    """The shape whose angular harmonics are nearest, by the mean over the frames."""
    y, x = np.mgrid[0 : cover.shape[1], 0 : cover.shape[2]] + 0.5
    harmonics = []
    for frame, (cx, cy) in zip(cover, centers, strict=True):
        z = (x - cx) + 1j * (y - cy)
        radius = np.abs(z)
        unit = np.where(radius > 0, z / np.maximum(radius, 1e-9), 0)
        third = abs((frame * radius**3 * unit**3).sum()) / max((frame * radius**3).sum(), 1e-9)
        fourth = abs((frame * radius**4 * unit**4).sum()) / max((frame * radius**4).sum(), 1e-9)
        harmonics.append((third, fourth))
    measured = np.mean(harmonics, axis=0)
    return min(HARMONICS, key=lambda shape: float(np.abs(measured - HARMONICS[shape]).sum()))


def _motion(centers: Floats, frames: NDArray[np.int64], side: int) -> str:
    """The direction of the straight line through the centres."""
    if len(centers) < 2:
        return "still"
    slope = np.polyfit(frames, centers, 1)[0] * (frames[-1] - frames[0])  # (x, y) over the clip
    if np.abs(slope).max() < STILL_SHARE * side:
        return "still"
    return max(DIRECTIONS, key=lambda motion: float(np.dot(DIRECTIONS[motion], slope)))
