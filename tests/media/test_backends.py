"""Whichever library decodes, the same number is the same frame, or the file is refused in words."""

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_media import (
    MIRRORED,
    QUARTER_TURNS,
    Encoding,
    counting,
    is_upright,
    number_in,
    numbers_in,
    pan,
    set_display_matrix,
    shift_times,
    turned_for,
    write_clip,
)

from goku_mega.errors import ConfigError, MediaError, MissingExtra
from goku_mega.media.decode import open_video
from goku_mega.media.video import BACKEND_TOLERANCE, Video

FRAMES, SIZE = 70, (96, 128)
FILES = {
    "gop12.mp4": Encoding(gop=12, b_frames=2),
    "gop250.mkv": Encoding(gop=250, b_frames=3),
    "open_gop.mp4": Encoding(gop=12, b_frames=3, options={"preset": "fast", "x264-params": "open-gop=1"}),
    "with_sound.mp4": Encoding(gop=24, b_frames=2, sound=True),
    "no_times.avi": Encoding(gop=24, b_frames=3),
    "transport.ts": Encoding(gop=24, b_frames=3),
    "intra_refresh.mp4": Encoding(gop=20, options={"preset": "fast", "x264-params": "intra-refresh=1"}),
    "hevc_open.mp4": Encoding("libx265", options={"x265-params": "open-gop=1:bframes=4:keyint=24:log-level=none"}),
    "h264_10bit.mkv": Encoding(gop=24, b_frames=2, pixel_format="yuv420p10le"),
    "vp9.webm": Encoding("libvpx-vp9", gop=40),
    "av1.mp4": Encoding("libsvtav1", gop=40),
    "mpeg4.mp4": Encoding("mpeg4", gop=12, b_frames=2),
    "mjpeg.mov": Encoding("mjpeg", pixel_format="yuvj420p"),
}
REFUSED = {
    "dali": {"av1.mp4", "mpeg4.mp4"},
    "torchcodec": {"no_times.avi", "transport.ts", "intra_refresh.mp4"},
}
"""What each decodes not at all, or not exactly, on a CPU."""

OTHERS = [pytest.param("dali", "cpu"), pytest.param("torchcodec", "cpu"), pytest.param("dali", "cuda")]


def opened(path: Path, backend: Any, device: str) -> Video:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    try:
        return open_video(path, backend, device)
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("files")

    def made(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_clip(path, counting(FRAMES, SIZE), FILES[name])

    return made


@pytest.mark.parametrize(("backend", "device"), OTHERS)
@pytest.mark.parametrize("name", FILES)
def test_a_number_is_the_same_frame_in_every_backend(
    files: Callable[[str], Path], name: str, backend: str, device: str
) -> None:
    if device == "cpu" and name in REFUSED[backend]:
        with (
            pytest.raises(MediaError, match=rf"{name}: .*use backend pyav"),
            opened(files(name), backend, device) as video,
        ):
            for number in reversed(range(FRAMES)):
                assert number_in(video.read([number])[0]) == number
        return
    with opened(files(name), backend, device) as video, open_video(files(name)) as expected:
        assert (video.frames, video.size) == (FRAMES, SIZE)
        assert np.array_equal(video.times_s, expected.times_s)
        order = [int(number) for number in np.random.default_rng(0).permutation(FRAMES)[:30]]
        assert numbers_in(video.read([*order, 3, 3])) == [*order, 3, 3]
        assert [number_in(video.read([number], (61, 83))[0]) for number in order[:4]] == order[:4]
        assert numbers_in(video.stream(5, 60, step=7)) == list(range(5, 65, 7))
        assert video.read([]).shape == (0, *SIZE, 3)
        with pytest.raises(MediaError, match=rf"{name}: has no frame 70; its frames are 0 to 69"):
            video.read([3, 70])


@pytest.mark.parametrize(("backend", "device"), OTHERS)
def test_the_nearest_of_all_frames_is_the_one_asked_for(tmp_path: Path, backend: str, device: str) -> None:
    """Of a texture that moves by less than a pixel, nothing but its place tells frames apart."""
    path = write_clip(tmp_path / "pan.mp4", pan(40, SIZE, (0.3, 0.6)), Encoding(gop=16, options={"crf": "12"}))
    with opened(path, backend, device) as video, open_video(path) as expected:
        for size in (None, (72, 96)):
            all_frames = expected.read(range(40), size).astype(int)
            for number in (0, 15, 16, 17, 33, 39):
                away = np.abs(all_frames - video.read([number], size)).mean(axis=(1, 2, 3))
                assert away.argmin() == number


@pytest.mark.parametrize(("backend", "device"), OTHERS)
def test_backends_stay_within_the_stated_tolerance_of_pyav(tmp_path: Path, backend: str, device: str) -> None:
    size = (240, 426)
    path = write_clip(tmp_path / "pan.mp4", pan(8, size, (1, 3)))
    with opened(path, backend, device) as video, open_video(path) as expected:
        for scaled in (None, (144, 256), (288, 512)):
            off = np.abs(video.read(range(8), scaled) - expected.read(range(8), scaled).astype(int))
            assert off.mean(axis=(1, 2, 3)).max() <= BACKEND_TOLERANCE


@pytest.mark.parametrize(("backend", "device"), OTHERS)
@pytest.mark.parametrize("degrees", QUARTER_TURNS)
def test_turned_pictures_are_upright_in_every_backend(tmp_path: Path, degrees: int, backend: str, device: str) -> None:
    path = write_clip(tmp_path / "phone.mp4", turned_for(counting(9, SIZE), degrees), Encoding(gop=4))
    with opened(set_display_matrix(path, QUARTER_TURNS[degrees]), backend, device) as video:
        for size in (None, (60, 100)):
            frames = video.read([7, 2], size)
            assert frames.shape[1:3] == (size or SIZE)
            assert numbers_in(frames) == [7, 2] and all(map(is_upright, frames))


@pytest.mark.parametrize(("backend", "device"), OTHERS)
@pytest.mark.parametrize("kind", ["cut", "deep cut", "late", "mirrored"])
def test_odd_files_are_read_right_or_refused(tmp_path: Path, kind: str, backend: str, device: str) -> None:
    path = write_clip(tmp_path / "whole.mp4", counting(30, SIZE), Encoding(gop=10, b_frames=2))
    if kind == "mirrored":
        mirrored = (picture[:, ::-1] for picture in counting(30, SIZE))
        path = set_display_matrix(write_clip(tmp_path / "odd.mp4", mirrored), MIRRORED)
    else:
        shift = {"cut": -7, "deep cut": -13, "late": 50}[kind]
        path = shift_times(path, tmp_path / "odd.mp4", Fraction(shift, 24))
    with open_video(path) as known:
        expected = numbers_in(known.stream())
    try:
        with opened(path, backend, device) as video:
            assert numbers_in(video.stream()) == expected
            assert numbers_in(video.read([9, 2])) == [expected[9], expected[2]]
    except MediaError as error:
        assert backend == "torchcodec" and kind != "late" and "use backend pyav" in str(error)


@pytest.mark.parametrize(("backend", "device"), OTHERS)
def test_a_backend_goes_on_after_a_file_that_it_refused(tmp_path: Path, backend: str, device: str) -> None:
    good = write_clip(tmp_path / "good.mp4", counting(9, SIZE))
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 999)
    opened(good, backend, device).close()
    for _ in range(2):
        with pytest.raises(MediaError, match=r"bad\.mp4"):
            open_video(tmp_path / "bad.mp4", backend, device)  # type: ignore[arg-type]
        with opened(good, backend, device) as video:
            assert numbers_in(video.read([8, 1])) == [8, 1]


@pytest.mark.parametrize(("backend", "module", "remedy"), [
    ("dali", "nvidia.dali", r"pip install goku-mega\[dali\]"),
    ("torchcodec", "torchcodec.decoders", "pip install torchcodec"),
])  # fmt: skip
def test_a_backend_that_is_not_installed_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, module: str, remedy: str
) -> None:
    path = write_clip(tmp_path / "a.mp4", counting(2, SIZE))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=remedy):
        open_video(path, backend)


def test_decoders_and_devices_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", counting(2, SIZE))
    with pytest.raises(ConfigError, match="no decoder 'decord'; use pyav, dali, torchcodec"):
        open_video(path, "decord")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pyav decodes on the CPU only"):
        open_video(path, "pyav", "cuda")
    with pytest.raises(ConfigError, match="use cpu, cuda or cuda:N"):
        open_video(path, "dali", "tpu")
    with pytest.raises(ConfigError, match="cuda:99: this machine has"):
        open_video(path, "dali", "cuda:99")
