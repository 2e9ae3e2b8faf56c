"""Video and image files to frames, exact to the frame, on the CPU (PyAV)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from goku_mega.errors import MediaError

Frames = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def decode_media(path: Path, *, max_frames: int | None = None) -> Frames:
    """An image or a video as [frames, height, width, 3], by suffix; an image is one frame.

    Raises:
        MediaError: the file is missing, damaged or holds no picture.
    """
    return decode_image(path) if path.suffix.lower() in IMAGE_SUFFIXES else decode_video(path, max_frames=max_frames)


def decode_image(path: Path) -> Frames:
    """[1, height, width, 3]."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))[None]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot decode the image ({_reason(error, path)})") from error


def decode_video(path: Path, *, max_frames: int | None = None) -> Frames:
    """The first `max_frames` frames (all without it), [frames, height, width, 3].

    Raises:
        MediaError: as `decode_media`; also for a file with damaged pictures, and for one cut short:
            it states more frames than it holds.
    """
    import av

    frames: list[Frames] = []
    hidden = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            stated = stream.frames
            for packet in container.demux(stream):
                hidden += packet.is_discard  # by an edit list: before the point where the clip was cut out
                for frame in packet.decode():
                    if frame.is_corrupt:  # FFmpeg guesses what it cannot decode
                        raise MediaError(f"{path}: frame {len(frames)} of the video is damaged")
                    frames.append(frame.to_ndarray(format="rgb24"))
                if max_frames and len(frames) >= max_frames:
                    break
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot decode the video ({_reason(error, path)})") from error
    shown = stated - hidden
    if not frames or len(frames) < min(shown, max_frames or shown):
        raise MediaError(f"{path}: the video is cut short: {len(frames)} of {shown} frames can be decoded")
    return np.stack(frames[:max_frames])


def _reason(error: BaseException, path: Path) -> str:
    return "no such file" if not path.exists() else (str(error).splitlines() or [type(error).__name__])[0]
