"""Clips come in the pieces that the codec takes, cut to its strides; what cannot be decoded says why."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.data.clips import kept_area, kept_frames, read_pieces
from goku_mega.encoders import vae
from goku_mega.encoders.vae import latent_shape
from goku_mega.encoders.vae_stream import time_chunks
from goku_mega.errors import MediaError
from goku_mega.media.decode import decode_media
from goku_mega.media.write import write_image, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0).integers(0, 256, (31, 40, 50, 3), dtype=np.uint8)
    write_video(path / "noise.mp4", noise, 24)
    write_image(path / "noise.png", noise[0])
    write_image(path / "small.png", noise[0, :15])
    return path


def row(file: str, **about: int) -> dict[str, object]:
    return {"key": "k", "file": file, "caption": "noise", **about}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70))
def test_clips_are_cut_to_the_strides_around_their_centre(frames, height, width):
    if min(height, width) < 16:
        with pytest.raises(MediaError, match="too small"):
            kept_area(height, width)
        return
    rows, columns = kept_area(height, width)
    kept_height, kept_width = rows.stop - rows.start, columns.stop - columns.start
    latent_shape(kept_frames(frames), kept_height, kept_width)  # raises where the strides do not divide the clip
    assert frames - 4 < kept_frames(frames) <= frames
    assert height - 16 < kept_height <= height and width - 16 < kept_width <= width
    assert abs(rows.start - (height - rows.stop)) <= 1 and abs(columns.start - (width - columns.stop)) <= 1


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("about", "first", "count"),
    [({}, 0, 29), ({"first_frame": 3}, 3, 25), ({"first_frame": 6, "frames": 25}, 6, 25), ({"frames": 4}, 0, 1)],
)
def test_pieces_are_the_frames_of_the_range(folder, monkeypatch, alone, about, first, count):
    monkeypatch.setattr(vae, "PAIR_BELOW_VOXELS", 0 if alone else 10**9)
    pieces = list(read_pieces(folder, row("noise.mp4", **about), 241))
    assert [len(piece.pixels) for piece in pieces] == (time_chunks(count) if alone else [count])
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert {piece.shape for piece in pieces} == {(count, 32, 48)}
    pixels = decode_media(folder / "noise.mp4")[first : first + count, 4:36, 1:49]
    assert np.array_equal(np.concatenate([piece.pixels for piece in pieces]), pixels)


def test_a_long_range_is_cut_to_the_most_frames(folder):
    [piece] = read_pieces(folder, row("noise.mp4", frames=30), 12)
    assert piece.shape == (9, 32, 48)


def test_an_image_and_a_file_anywhere_are_clips(folder, tmp_path):
    [piece] = read_pieces(tmp_path, row(str(folder / "noise.png"), first_frame=0, frames=1), 241)
    assert np.array_equal(piece.pixels, decode_media(folder / "noise.png")[:, 4:36, 1:49])


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (row("noise.mp4", first_frame=20, frames=12), r"noise\.mp4: has no frame 31; its frames are 0 to 30"),
        (row("noise.mp4", first_frame=31), "has no frame 31; its frames are 0 to 30"),
        (row("noise.png", frames=5), r"noise\.png: is an image, and has no frame 4"),
        (row("small.png"), r"small\.png: 15x50 px is too small; 16 px are needed"),
        (row("none.mp4"), r"none\.mp4: .*no such file"),
    ],
)
def test_what_cannot_be_a_clip_says_why(folder, about, message):
    with pytest.raises(MediaError, match=message):
        list(read_pieces(folder, about, 241))
