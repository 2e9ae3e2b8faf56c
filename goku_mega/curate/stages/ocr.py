"""Text in the picture: area of the largest text box over the key frame's, by RapidOCR's detector (paper 4.2)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.curation import OcrConfig
from goku_mega.curate.clip import Clip, Frames
from goku_mega.curate.stages.ink import Box, ink_box
from goku_mega.errors import MissingExtra

UNCLIP = 0.6
"""How far the detector's cores of text are widened: its own 1.6 gives boxes of 1.7 times the text's area."""


class Scale(NamedTuple):
    """A size at which text is looked for, and the heights of lines, of the short side, that it is asked about."""

    short_side_px: int
    least_height: float
    most_height: float


SCALES = (Scale(736, 0.0, 0.07), Scale(352, 0.05, 0.26), Scale(224, 0.2, 1.0))
"""The detector sees lines of 20 to 80 px whole: it overlooks larger letters, and gives smaller ones too much room."""
DETECTION_ONLY = {
    "Global.log_level": "error",
    "Det.limit_type": "min",
    "Det.limit_side_len": SCALES[-1].short_side_px,
    # One thread: sums are in the same order on every machine.
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}


@dataclass(frozen=True)
class OcrScore:
    """Share of the picture that its largest text box covers: of every key frame, and the highest."""

    coverage: float
    per_frame: tuple[float, ...]


class Ocr:
    def __init__(self, config: OcrConfig) -> None:
        """
        Raises:
            MissingExtra: RapidOCR or onnxruntime is not installed.
        """
        self._min_confidence = config.min_confidence
        try:
            import onnxruntime  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise MissingExtra("RapidOCR is not installed; pip install goku-mega[curate]") from error
        self._detector: Any = RapidOCR(params=DETECTION_ONLY)

    def score(self, clip: Clip) -> OcrScore:
        """
        Raises:
            MediaError: a key frame cannot be decoded.
        """
        per_frame = tuple(self.coverage(frame) for frame in clip.key_frames)
        return OcrScore(max(per_frame), per_frame)

    def coverage(self, frame: Frames) -> float:
        """Share of a frame [height, width, 3] that its largest box of text covers that can be read."""
        pixels = frame.shape[0] * frame.shape[1]
        boxes = [(ink_box(frame, box).area, box) for box in self.boxes(frame)]
        return next((area / pixels for area, box in sorted(boxes, reverse=True) if self.can_read(frame, box)), 0.0)

    def can_read(self, frame: Frames, box: Box) -> bool:
        """Whether there are letters in a box: the detector takes waves and leaves for text, too."""
        crop = np.ascontiguousarray(frame[box.top : box.bottom, box.left : box.right, ::-1])
        read = self._detector(crop, use_det=False, use_cls=False, use_rec=True)
        return bool(read.txts) and bool(read.txts[0].strip()) and read.scores[0] >= self._min_confidence

    def boxes(self, frame: Frames) -> list[Box]:
        """Where the detector sees text in a frame [height, width, 3], by boxes about as large as it."""
        return [box for scale in SCALES for box in self._boxes_at(scale, frame)]

    def _boxes_at(self, scale: Scale, frame: Frames) -> list[Box]:
        scaled = _scaled(frame, scale.short_side_px)
        # RapidOCR takes arrays as OpenCV has them, blue first.
        found = self._detector(
            np.ascontiguousarray(scaled[..., ::-1]), use_det=True, use_cls=False, use_rec=False,
            box_thresh=self._min_confidence, unclip_ratio=UNCLIP,
        )  # fmt: skip
        if found.boxes is None:
            return []
        to_frame = np.array(frame.shape[1::-1]) / scaled.shape[1::-1]
        boxes = [bounding_box(corners * to_frame, frame.shape[:2]) for corners in found.boxes]
        heights = [min(box.right - box.left, box.bottom - box.top) / min(frame.shape[:2]) for box in boxes]
        return [
            box for box, height in zip(boxes, heights, strict=True) if scale.least_height <= height <= scale.most_height
        ]


def bounding_box(corners: NDArray[Any], size: tuple[int, ...]) -> Box:
    """Of corners [corners, 2] (x, y), inside a frame of (height, width)."""
    limit = np.array(size[::-1])
    left, top = np.clip(np.floor(corners.min(0)), 0, limit).astype(int).tolist()
    right, bottom = np.clip(np.ceil(corners.max(0)), 0, limit).astype(int).tolist()
    return Box(left, top, right, bottom)


def _scaled(frame: Frames, short_side_px: int) -> Frames:
    import cv2

    scale = short_side_px / min(frame.shape[:2])
    size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR))
