"""Rows of a corpus to pixels: a clip in pieces that the codec takes one after the other, cut to its strides."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from goku_mega.data.captions import Row
from goku_mega.encoders.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, group_size
from goku_mega.encoders.vae_stream import time_chunks
from goku_mega.errors import MediaError
from goku_mega.media.decode import PyAvVideo, decode_image, is_image

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Piece:
    """Some frames of a clip: all of them where clips of its shape go through the codec in groups, else a chunk."""

    row: Row
    pixels: Frames  # [frames, height, width, 3]
    shape: tuple[int, int, int]
    """Of the clip: frames, height, width."""
    is_last: bool


def read_pieces(corpus: Path, row: Row, max_frames: int) -> Iterator[Piece]:
    """A row's clip, of at most `max_frames` frames, cut to 4n + 1 and around its centre to multiples of 16 px.

    Raises:
        MediaError: the file cannot be decoded, is too small, or does not have the row's range.
    """
    path = corpus / row["file"]
    first = row.get("first_frame", 0)
    if is_image(path):
        if first or row.get("frames", 1) > 1:
            raise MediaError(f"{path}: is an image, and has no frame {first + row.get('frames', 1) - 1}")
        yield from _pieces(path, row, iter(decode_image(path)), 1)
        return
    with PyAvVideo(path) as video:
        count = row.get("frames", video.frames - first)
        if count < 1 or first + count > video.frames:
            last = first + max(count, 1) - 1
            raise MediaError(f"{path}: has no frame {last}; its frames are 0 to {video.frames - 1}")
        count = kept_frames(min(count, max_frames))
        yield from _pieces(path, row, video.stream(first, count), count)


def kept_frames(count: int) -> int:
    """The largest 4n + 1 that is not above."""
    return count - (count - 1) % TEMPORAL_STRIDE


def kept_area(height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of a picture that are multiples of 16 px around its centre.

    Raises:
        MediaError: the picture is smaller than 16 px.
    """
    multiple = 2 * SPATIAL_STRIDE
    kept_height, kept_width = height - height % multiple, width - width % multiple
    if not kept_height or not kept_width:
        raise MediaError(f"{height}x{width} px is too small; {multiple} px are needed")
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return slice(top, top + kept_height), slice(left, left + kept_width)


def _pieces(path: Path, row: Row, frames: Iterator[Frames], count: int) -> Iterator[Piece]:
    head = next(frames)
    try:
        rows, columns = kept_area(*head.shape[:2])
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from error
    shape = (count, rows.stop - rows.start, columns.stop - columns.start)
    frames = chain((head,), frames)
    chunks = time_chunks(count) if group_size(*shape) == 1 else [count]
    for number, length in enumerate(chunks, start=1):
        pixels = np.empty((length, *shape[1:], 3), np.uint8)
        for place in range(length):
            frame = next(frames)
            if frame.shape != head.shape:
                raise MediaError(f"{path}: the size of its pictures changes on the way")
            pixels[place] = frame[rows, columns]
        yield Piece(row, pixels, shape, number == len(chunks))
