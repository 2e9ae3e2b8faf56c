"""Video frames by number through torchcodec, on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from goku_mega.errors import MediaError, MissingExtra
from goku_mega.media.indexed import IndexedVideo
from goku_mega.media.video import Frames, one_line

SAME_TIME_S = 1e-4


class TorchCodecVideo(IndexedVideo):
    """One open video file. Where torchcodec would answer other frames than were asked for, it is refused:

    AVI, transport and raw streams, edit lists, times before 0, mirrored pictures, packets that show nothing.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            MediaError: as `PyAvVideo`; or torchcodec does not find every frame of the file.
            MissingExtra: torchcodec or the FFmpeg that it needs is not installed.
        """
        self._decoder_of = _torchcodec()
        super().__init__(path)
        if not self._known.is_plain:
            self.close()
            raise MediaError(f"{path}: torchcodec does not find every frame of it exactly; use backend pyav")
        self._decoders: dict[tuple[int, int] | None, Any] = {}

    def close(self) -> None:
        self._decoders = {}
        super().close()

    def _decode(self, numbers: Sequence[int], size: tuple[int, int] | None) -> Frames:
        try:
            if size not in self._decoders:
                self._decoders = {size: self._open(size)}  # one is kept: each holds the file open
            answer = self._decoders[size].get_frames_at(list(numbers))
        except (RuntimeError, ValueError, IndexError) as error:
            raise MediaError(
                f"{self.path}: torchcodec cannot decode the video ({one_line(error, self.path)})"
            ) from error
        asked_s = self._known.start_s + self.times_s[list(numbers)]
        for number, off_s in zip(numbers, np.abs(answer.pts_seconds.numpy() - asked_s), strict=True):
            if off_s > SAME_TIME_S:  # intra refresh, for one: it decodes on from a key frame that is not enough
                raise MediaError(f"{self.path}: torchcodec does not find frame {number}; use backend pyav")
        frames: Frames = answer.data.numpy()
        return frames

    def _open(self, size: tuple[int, int] | None) -> Any:
        from torchcodec.transforms import Resize

        scaling = [] if size is None else [Resize(size)]
        decoder = self._decoder_of(str(self.path), dimension_order="NHWC", num_ffmpeg_threads=1, transforms=scaling)
        if len(decoder) != self.frames:
            raise ValueError(f"it counts {len(decoder)} frames, not {self.frames}")
        return decoder


def _torchcodec() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:  # where FFmpeg's libraries are missing it is a RuntimeError
        raise MissingExtra(
            "decoder torchcodec needs torchcodec and FFmpeg's libraries; pip install torchcodec==0.13.0, and FFmpeg "
            "from the system's packages"
        ) from error
    return VideoDecoder
