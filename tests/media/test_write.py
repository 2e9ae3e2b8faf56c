"""Written files hold the frames given, are the same bytes every time, and appear whole or not at all."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from goku_mega.data.shapes import COLORS, Scene, ShapeObject, render_clip
from goku_mega.errors import MediaError
from goku_mega.media.decode import decode_media
from goku_mega.media.write import check_suffix, contact_sheet, write_gif, write_image, write_media, write_video


def shapes_clip(frames: int = 5, height: int = 64, width: int = 64, color: str = "red") -> np.ndarray:
    scene = Scene((ShapeObject("square", color, "left"),))
    return render_clip(scene, seed=3, frames=frames, height=height, width=width)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (96, 64), (50, 34)])
def test_a_video_keeps_length_size_and_rate_and_stays_close(tmp_path: Path, height: int, width: int) -> None:
    clip = shapes_clip(9, height, width)
    write_video(tmp_path / "a.mp4", clip, 8)
    back = decode_media(tmp_path / "a.mp4")
    assert back.shape == clip.shape
    assert np.abs(back.astype(int) - clip).mean() < 6
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p" and stream.average_rate == 8


@pytest.mark.parametrize("color", COLORS)
def test_colors_survive_the_codec(tmp_path: Path, color: str) -> None:
    clip = shapes_clip(color=color)
    write_video(tmp_path / "a.mp4", clip, 8)
    back = decode_media(tmp_path / "a.mp4").astype(int)
    inside = np.abs(clip.astype(int) - COLORS[color]).max(axis=-1) <= 10
    eroded = inside & np.roll(inside, 2, 1) & np.roll(inside, -2, 1) & np.roll(inside, 2, 2) & np.roll(inside, -2, 2)
    assert eroded.any() and np.abs(back - clip)[eroded].mean() < 8


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    clip = shapes_clip()
    for name in ("a", "b"):
        write_media(tmp_path / f"{name}{suffix}", clip, 8)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_textured_motion_gives_the_same_bytes_every_time(tmp_path: Path) -> None:
    """x264 with its defaults gives several files for some of these clips."""
    scene = Scene((ShapeObject("square", "red", "up", "left"), ShapeObject("circle", "blue", "down", "right")))
    for seed in range(16):
        clip = render_clip(scene, seed=seed, frames=9, height=64, width=64)
        contents = set()
        for _ in range(8):
            write_video(tmp_path / "a.mp4", clip, 8)
            contents.add((tmp_path / "a.mp4").read_bytes())
        assert len(contents) == 1, f"seed {seed}"


def test_a_gif_plays_every_frame_for_ever_at_the_stated_rate(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", shapes_clip(9), 10)
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.n_frames, picture.info["duration"], picture.info["loop"]) == (9, 100, 0)  # type: ignore[attr-defined]


def test_a_png_of_one_frame_is_that_frame_and_of_a_video_its_frames_side_by_side(tmp_path: Path) -> None:
    clip = shapes_clip()
    write_media(tmp_path / "one.png", clip[:1], 8)
    assert np.array_equal(decode_media(tmp_path / "one.png"), clip[:1])
    write_media(tmp_path / "all.png", clip, 8)
    assert frames_within(decode_media(tmp_path / "all.png")[0], clip) == 5


@pytest.mark.parametrize("name", ["clip", "clip.avi", "clip.mp4.part"])
def test_a_suffix_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError, match=r"\.mp4, \.gif, \.png"):
        check_suffix(tmp_path / name)
    with pytest.raises(MediaError, match=name):
        write_media(tmp_path / name, shapes_clip(), 8)
    assert list(tmp_path.iterdir()) == []


def test_an_odd_size_is_refused_for_mp4_in_words(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="even height and width, not 63x64"):
        write_video(tmp_path / "a.mp4", shapes_clip()[:, :63], 8)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_image(path, shapes_clip()[0])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_image(path, np.zeros((4, 4, 7)))  # type: ignore[arg-type]
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_image(tmp_path / "x" / "y" / "a.png", shapes_clip()[0])
    assert (tmp_path / "x" / "y" / "a.png").exists()


def test_a_contact_sheet_holds_every_frame_untouched_and_a_label_beside_it() -> None:
    clips = [
        ("a red square moving left", shapes_clip()),
        ("a wide one", shapes_clip(9, 48, 80)),
        ("image", shapes_clip(1)),
    ]
    sheet = contact_sheet(clips)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    assert [frames_within(sheet, clip) for _, clip in clips] == [5, 9, 1]
    first = frame_columns(sheet, clips[0][1][0])
    assert (sheet[:, : first - 8] < 128).any(), "no label was drawn"


def test_a_long_caption_stays_left_of_the_frames() -> None:
    clip = shapes_clip()
    plain = contact_sheet([("a", clip)])
    left = frame_columns(plain, clip[0])
    for caption in ("a red square " * 12, "w" * 30, "two\nlines", "ein Kreis — 红色"):
        sheet = contact_sheet([(caption, clip)])
        assert sheet.shape == plain.shape and np.array_equal(sheet[:, left:], plain[:, left:])


def frame_columns(sheet: np.ndarray, frame: np.ndarray) -> int:
    """The column where a frame begins in a sheet; -1 where it is not in it."""
    height, width = frame.shape[:2]
    for top in range(sheet.shape[0] - height + 1):
        row = (sheet[top, :, None] == frame[0, 0]).all(-1).ravel()
        for left in np.flatnonzero(row[: sheet.shape[1] - width + 1]):
            if np.array_equal(sheet[top : top + height, left : left + width], frame):
                return int(left)
    return -1


def frames_within(sheet: np.ndarray, frames: np.ndarray) -> int:
    return sum(frame_columns(sheet, frame) >= 0 for frame in frames)
