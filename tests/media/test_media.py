"""Media files: what is written comes back, and what is broken is named in one line."""

import numpy as np
import pytest

from goku_mega.errors import MediaError
from goku_mega.media.decode import decode_image, decode_media, decode_video
from goku_mega.media.write import contact_sheet, write_gif, write_image, write_media, write_video


def moving_bar(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """Every frame is another picture: a bar at its own place."""
    clip = np.full((frames, height, width, 3), 60, dtype=np.uint8)
    for number, frame in enumerate(clip):
        frame[:, 4 * number : 4 * number + 8] = (200, 180, 40)
    return clip


def test_a_video_comes_back_frame_by_frame(tmp_path):
    clip = moving_bar()
    write_video(tmp_path / "a.mp4", clip, 8)
    decoded = decode_video(tmp_path / "a.mp4")
    assert decoded.shape == clip.shape
    distance = np.abs(decoded[:, None].astype(int) - clip[None]).mean(axis=(2, 3, 4))  # [decoded, written]
    assert (distance.argmin(axis=1) == np.arange(len(clip))).all()
    assert distance.diagonal().max() < 4


def test_the_same_frames_are_the_same_file(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, moving_bar(), 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_only_the_frames_asked_for_are_decoded(tmp_path):
    write_video(tmp_path / "a.mp4", moving_bar(), 8)
    assert np.array_equal(decode_media(tmp_path / "a.mp4", max_frames=5), decode_video(tmp_path / "a.mp4")[:5])


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    frame = moving_bar(1)[0]
    write_image(tmp_path / "a.png", frame)
    assert np.array_equal(decode_image(tmp_path / "a.png"), frame[None])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("gone.mp4", None),
        ("empty.mp4", lambda data: b""),
        ("garbage.mp4", lambda data: b"not a video" * 100),
        ("cut.mp4", lambda data: data[: len(data) // 2]),
        ("head.mp4", lambda data: data[len(data) // 2 :]),
        ("text.png", lambda data: b"not an image"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, spoil):
    write_video(tmp_path / "whole.mp4", moving_bar(), 8)
    if spoil is not None:
        (tmp_path / name).write_bytes(spoil((tmp_path / "whole.mp4").read_bytes()))
    with pytest.raises(MediaError, match=name) as caught:
        decode_media(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_the_suffix_decides_what_is_written(tmp_path):
    from PIL import Image

    clip = moving_bar()
    for name in ("a.mp4", "a.gif", "a.png"):
        write_media(tmp_path / name, clip, 8)
    assert len(decode_video(tmp_path / "a.mp4")) == 9
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 9
    assert decode_image(tmp_path / "a.png").shape[2] > 9 * 64  # a video as a picture is its frames side by side
    with pytest.raises(MediaError, match=r"a\.avi.*use \.mp4, \.gif, \.png"):
        write_media(tmp_path / "a.avi", clip, 8)
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.gif", "a.png"}


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises((OSError, ValueError, TypeError, IndexError)):
        write_gif(tmp_path / "a.gif", np.zeros((2, 4, 4, 5), dtype=np.uint8), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_contact_sheet_holds_every_frame(tmp_path):
    clip = moving_bar(3)
    sheet = contact_sheet([("a caption that is long enough to need a second line on the sheet", clip), ("b", clip)])
    found = sum(
        np.array_equal(sheet[y : y + 48, x : x + 64], clip[1])
        for y in range(sheet.shape[0] - 47)
        for x in range(280, sheet.shape[1] - 63)
    )
    assert found == 2
