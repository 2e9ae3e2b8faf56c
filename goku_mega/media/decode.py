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
            return np.asarray(picture.convert("RGB"))[None]
    except (OSError, SyntaxError) as error:
        raise MediaError(f"{path}: cannot decode the image ({_reason(error, path)})") from error


def decode_video(path: Path, *, max_frames: int | None = None) -> Frames:
    """The first `max_frames` frames (all without it), [frames, height, width, 3].

    Raises:
        MediaError: as `decode_media`; also for a file cut short: it states more frames than it holds.
    """
    import av

    frames: list[Frames] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            stated = stream.frames
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == max_frames:
                    break
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot decode the video ({_reason(error, path)})") from error
    wanted = min(stated, max_frames) if max_frames else stated
    if not frames or len(frames) < wanted:
        raise MediaError(f"{path}: the video is cut short: {len(frames)} of {stated} frames can be decoded")
    return np.stack(frames)


def _reason(error: BaseException, path: Path) -> str:
    return "no such file" if not path.exists() else (str(error).splitlines() or [type(error).__name__])[0]
