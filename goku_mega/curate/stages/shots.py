"""Shot boundaries by PySceneDetect (paper 4.2), on frames that our own decoder gives: a damaged one is an error."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from goku_mega.config.curation import ShotsConfig
from goku_mega.curate.clip import Footage
from goku_mega.errors import MissingExtra

SIDE_PX = 256
"""Frames are brought to about this width before they are compared, as PySceneDetect does by itself."""


@dataclass(frozen=True)
class ShotsScore:
    """First frames of all shots but the first one."""

    cuts: tuple[int, ...]


class Shots:
    """PySceneDetect's detector of the configuration."""

    def __init__(self, config: ShotsConfig) -> None:
        try:
            import scenedetect  # noqa: F401
        except ImportError as error:
            raise MissingExtra("PySceneDetect is not installed; pip install goku-mega[curate]") from error
        self.config = config

    def score(self, footage: Footage, frame_rate: float) -> ShotsScore:
        """
        Raises:
            MediaError: a frame of the source is damaged.
        """
        from scenedetect import FrameTimecode

        detector = self._detector()
        cuts: list[int] = []
        height, width = footage.size
        smaller = max(1, width // SIDE_PX)
        for number, frame in enumerate(footage.stream(0, footage.frames, size=(height // smaller, width // smaller))):
            bgr = np.ascontiguousarray(frame[:, :, ::-1])
            found = detector.process_frame(FrameTimecode(number, frame_rate), bgr)
            cuts += [cut.frame_num for cut in found]
        last = FrameTimecode(footage.frames - 1, frame_rate)
        cuts += [cut.frame_num for cut in detector.post_process(last)]
        return ShotsScore(tuple(cuts))

    def _detector(self) -> Any:
        from scenedetect.detectors import AdaptiveDetector, ContentDetector

        shortest = self.config.shortest_frames
        if self.config.detector == "adaptive":
            return AdaptiveDetector(adaptive_threshold=self.config.threshold, min_scene_len=shortest)
        return ContentDetector(threshold=self.config.threshold, min_scene_len=shortest)


def spans(cuts: tuple[int, ...], frames: int) -> list[tuple[int, int]]:
    """(first frame, frames) of every shot."""
    starts = [0, *cuts]
    return [(start, end - start) for start, end in zip(starts, [*cuts, frames], strict=True)]
