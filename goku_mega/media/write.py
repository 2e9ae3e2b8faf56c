"""Frames to files people can open: mp4, PNG, GIF, and contact sheets. Every file appears whole, by a rename."""

import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from goku_mega.errors import MediaError

Frames = NDArray[np.uint8]

SUFFIXES = (".mp4", ".gif", ".png")
LABEL_WIDTH_PX = 280
GAP_PX = 4
PAPER = 250
INK = 30


def write_video(path: Path, frames: Frames, fps: int, *, crf: int = 10) -> None:
    """H.264 in mp4, the same bytes for the same frames [frames, height, width, 3].

    Raises:
        MediaError: as `write_h264`.
    """
    write_h264(path, frames, Fraction(fps), crf=crf)


def write_h264(
    path: Path, frames: Iterable[Frames], rate: Fraction, *, crf: int, gop_frames: int = 48, preset: str = "medium"
) -> None:
    """H.264 in mp4 of frames [height, width, 3] as they come, the same bytes for the same frames.

    Args:
        rate: frames a second.
        crf: x264's quality, lower is better.
        gop_frames: largest distance of key frames.

    Raises:
        MediaError: an odd height or width, which yuv420p cannot hold; no frame at all; an unknown preset.
    """
    import av

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = None
            for frame in frames:
                if stream is None:
                    stream = container.add_stream("libx264", rate=rate)
                    stream.height, stream.width = _even(path, frame)
                    stream.pix_fmt = "yuv420p"
                    # x264's macroblock tree gives other bits now and then, even on one thread.
                    stream.options = {
                        "crf": str(crf), "g": str(gop_frames), "preset": preset, "threads": "1", "mbtree": "0",
                        "flags": "+bitexact",
                    }  # fmt: skip
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if stream is None:
                raise MediaError(f"{path}: there is no frame to write")
            container.mux(stream.encode())

    try:
        _by_rename(path, write)
    except av.FFmpegError as error:
        raise MediaError(f"{path}: cannot write the video ({error})") from error


def _even(path: Path, frame: Frames) -> tuple[int, int]:
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        raise MediaError(f"{path}: mp4 needs an even height and width, not {height}x{width}; write .gif or .png")
    return height, width


def write_image(path: Path, frame: Frames) -> None:
    """One frame [height, width, 3] as PNG."""
    from PIL import Image

    _by_rename(path, lambda temporary: Image.fromarray(frame).save(temporary, format="PNG"))


def write_gif(path: Path, frames: Frames, fps: int) -> None:
    """An endless GIF of [frames, height, width, 3]."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]

    def write(temporary: Path) -> None:
        rest = pictures[1:]
        pictures[0].save(temporary, format="GIF", save_all=True, append_images=rest, duration=1000 // fps, loop=0)

    _by_rename(path, write)


def write_media(path: Path, frames: Frames, fps: int) -> None:
    """Write by suffix: .mp4, .gif, or .png (the image, or a video's frames side by side).

    Raises:
        MediaError: another suffix.
    """
    check_suffix(path)
    if path.suffix == ".mp4":
        write_video(path, frames, fps)
    elif path.suffix == ".gif":
        write_gif(path, frames, fps)
    else:
        write_image(path, frames[0] if len(frames) == 1 else contact_sheet([("", frames)]))


def check_suffix(path: Path) -> None:
    """Refuse a file name that says nothing about its format."""
    if path.suffix not in SUFFIXES:
        raise MediaError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")


def contact_sheet(clips: Sequence[tuple[str, Frames]]) -> Frames:
    """One row a clip: its caption on the left, its frames side by side; [height, width, 3]."""
    from PIL import Image, ImageDraw

    label = LABEL_WIDTH_PX if any(caption for caption, _ in clips) else 0
    heights = [frames.shape[1] for _, frames in clips]
    width = label + GAP_PX + max(len(frames) * (frames.shape[2] + GAP_PX) for _, frames in clips)
    sheet = np.full((sum(heights) + GAP_PX * (len(clips) + 1), width, 3), PAPER, dtype=np.uint8)
    tops, top = [], GAP_PX
    for _, frames in clips:
        left = label + GAP_PX
        for frame in frames:
            sheet[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
            left += frame.shape[1] + GAP_PX
        tops.append(top)
        top += frames.shape[1] + GAP_PX
    picture = Image.fromarray(sheet)
    draw = ImageDraw.Draw(picture)
    for (caption, _), row_top, height in zip(clips, tops, heights, strict=True):
        text = _wrap(caption, lambda line: draw.textlength(line), LABEL_WIDTH_PX - 2 * GAP_PX)
        draw.multiline_text((2 * GAP_PX, row_top + height // 2), text, fill=(INK, INK, INK), anchor="lm")
    return np.asarray(picture)


def _wrap(caption: str, length: Callable[[str], float], limit: float) -> str:
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or length(longer) <= limit:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _by_rename(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
