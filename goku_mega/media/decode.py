"""Video and image files to frames, exact to the frame; the door to all decoders."""

from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from goku_mega.errors import ConfigError, MediaError
from goku_mega.media.pyav import PyAvVideo
from goku_mega.media.video import Frames, Video, one_line

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})

Backend = Literal["pyav", "dali", "torchcodec"]


def open_video(path: Path, backend: Backend = "pyav", device: str = "cpu") -> Video:
    """Open a video with one of the decoders. All find the same frames for the same numbers.

    Args:
        backend: "pyav" is the fastest on a CPU (benchmarks/decode.py); "dali" also decodes on a GPU.
        device: "cpu", or for DALI "cuda" or "cuda:0".

    Raises:
        MediaError: the file is missing, damaged, cut short, holds no video, or one that the decoder cannot read.
        MissingExtra: the decoder is not installed.
        ConfigError: there is no such decoder, or it does not decode on this device.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"there is no decoder {backend!r}; use {', '.join(get_args(Backend))}")
    if backend == "dali":
        from goku_mega.media.dali import DaliVideo

        return DaliVideo(path, device=device)
    if device != "cpu":
        raise ConfigError(f"decoder {backend} decodes on the CPU only, not on {device}; use dali")
    if backend == "torchcodec":
        from goku_mega.media.torchcodec import TorchCodecVideo

        return TorchCodecVideo(path)
    return PyAvVideo(path)


def decode_media(path: Path, *, max_frames: int | None = None) -> Frames:
    """An image or a video as [frames, height, width, 3], by suffix; an image is one frame.

    Raises:
        MediaError: the file is missing, damaged or holds no picture.
    """
    return decode_image(path) if is_image(path) else decode_video(path, max_frames=max_frames)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def decode_image(path: Path) -> Frames:
    """[1, height, width, 3], upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot decode the image ({one_line(error, path)})") from error


def decode_video(path: Path, *, max_frames: int | None = None) -> Frames:
    """The first `max_frames` frames (all without it), [frames, height, width, 3].

    Raises:
        MediaError: as `decode_media`; also for a file with damaged pictures, and for one cut short:
            it states more frames than it holds.
    """
    with PyAvVideo(path) as video:
        return np.stack(list(islice(video.stream(), max_frames)))
