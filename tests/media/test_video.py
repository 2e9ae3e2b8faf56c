"""Every frame is found by its number, wherever it is in whatever file; the picture itself says its number."""

import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from made_media import (
    MIRRORED,
    QUARTER_TURNS,
    Encoding,
    copy_of,
    corrupt,
    counting,
    is_upright,
    number_in,
    numbers_in,
    pan,
    remux,
    retime,
    set_display_matrix,
    shift_times,
    truncate,
    turned_for,
    write_clip,
)

from goku_mega.errors import MediaError
from goku_mega.media.decode import decode_video, open_video
from goku_mega.media.pyav import PyAvVideo

FRAMES, SIZE = 70, (96, 128)
QUIET = "log-level=none"

FILES = {
    "gop12.mp4": Encoding(gop=12, b_frames=2),
    "gop48.mp4": Encoding(gop=48, b_frames=3, options={"preset": "fast"}),
    "gop250.mkv": Encoding(gop=250, b_frames=3),
    "open_gop.mp4": Encoding(gop=12, b_frames=3, options={"preset": "fast", "x264-params": "open-gop=1"}),
    "intra_refresh.mp4": Encoding(gop=20, options={"preset": "fast", "x264-params": "intra-refresh=1"}),
    "with_sound.mp4": Encoding(gop=24, b_frames=2, sound=True),
    "fragments.mp4": Encoding(gop=24, b_frames=2, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "index_first.mov": Encoding(gop=24, b_frames=2, container_options={"movflags": "faststart"}),
    "no_times.avi": Encoding(gop=24, b_frames=3),
    "raw.h264": Encoding(gop=24, b_frames=3),
    "transport.ts": Encoding(gop=24, b_frames=3),
    "hevc.mp4": Encoding("libx265", gop=24, options={"x265-params": QUIET}),
    "hevc_open.mp4": Encoding("libx265", options={"x265-params": f"open-gop=1:bframes=4:keyint=24:{QUIET}"}),
    "hevc_short.mkv": Encoding("libx265", options={"x265-params": f"open-gop=1:bframes=4:keyint=5:{QUIET}"}),
    "hevc_10bit.mp4": Encoding("libx265", pixel_format="yuv420p10le", options={"x265-params": QUIET}),
    "h264_10bit.mkv": Encoding(gop=24, b_frames=2, pixel_format="yuv420p10le"),
    "vp9.webm": Encoding("libvpx-vp9", gop=40),
    "vp9_sound.webm": Encoding("libvpx-vp9", gop=24, sound=True),
    "av1.mp4": Encoding("libsvtav1", gop=40),
    "av1.mkv": Encoding("libsvtav1", gop=40),
    "mpeg4.mp4": Encoding("mpeg4", gop=12, b_frames=2),
    "mpeg4.avi": Encoding("mpeg4", gop=12, b_frames=2),
    "mjpeg.mov": Encoding("mjpeg", pixel_format="yuvj420p"),
    "mjpeg.avi": Encoding("mjpeg", pixel_format="yuvj420p"),
    "mpeg2.mpg": Encoding("mpeg2video", gop=12, b_frames=2),
    "ffv1.mkv": Encoding("ffv1"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("files")

    def made(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_clip(path, counting(FRAMES, SIZE), FILES[name])

    return made


@pytest.mark.parametrize("name", FILES)
def test_frames_are_found_by_number_from_any_place_in_any_order(files: Callable[[str], Path], name: str) -> None:
    with PyAvVideo(files(name)) as video:
        assert (video.frames, video.size) == (FRAMES, SIZE)
        assert video.times_s[0] == 0 and (np.diff(video.times_s) > 0).all()
        order = [int(number) for number in np.random.default_rng(0).permutation(FRAMES)]
        assert [number_in(video.read([number])[0]) for number in order[:25]] == order[:25]
        assert numbers_in(video.read([*order, 3, 3])) == [*order, 3, 3]
        assert numbers_in(video.stream()) == list(range(FRAMES))
        assert numbers_in(video.stream(5, 60, step=7)) == list(range(5, 65, 7))


def test_a_frame_is_the_same_however_it_is_reached(files: Callable[[str], Path]) -> None:
    for name in ("gop48.mp4", "hevc_open.mp4", "vp9.webm", "av1.mp4"):
        with PyAvVideo(files(name)) as video:
            whole = np.stack(list(video.stream()))
            for number in (69, 30, 47, 48, 49, 0):
                assert np.array_equal(video.read([number])[0], whole[number]), (name, number)


def test_a_scaled_frame_has_the_size_asked_for_and_the_same_content(files: Callable[[str], Path]) -> None:
    with PyAvVideo(files("gop48.mp4")) as video:
        small = video.read([40, 2], size=(61, 83))
        assert small.shape == (2, 61, 83, 3) and numbers_in(small) == [40, 2]
        assert video.read([], size=(61, 83)).shape == (0, 61, 83, 3)


def test_streams_of_one_video_do_not_disturb_each_other(files: Callable[[str], Path]) -> None:
    with PyAvVideo(files("gop12.mp4")) as video:
        ahead, behind = video.stream(30), video.stream(0, 40)
        for step in range(40):
            assert (number_in(next(ahead)), number_in(next(behind))) == (30 + step, step)
            if step % 9 == 0:
                assert numbers_in(video.read([60, step])) == [60, step]


@pytest.mark.parametrize("name", ["gop250.mkv", "no_times.avi"])
def test_a_stream_holds_one_frame_at_a_time(files: Callable[[str], Path], name: str) -> None:
    with PyAvVideo(files(name)) as video:
        frames = video.stream()
        next(frames)
        tracemalloc.start()
        held = [next(frames).sum() for _ in range(60)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(held) == 60 and peak < 8 * 3 * SIZE[0] * SIZE[1]


@pytest.mark.parametrize("numbers", [[-1], [FRAMES], [3, 999]])
def test_a_number_that_is_not_there_is_refused_with_those_that_are(
    files: Callable[[str], Path], numbers: list[int]
) -> None:
    with PyAvVideo(files("gop12.mp4")) as video:
        with pytest.raises(MediaError, match=r"gop12\.mp4: has no frame .*; its frames are 0 to 69"):
            video.read(numbers)
        with pytest.raises(MediaError, match="has no frame 70"):
            video.stream(60, 11)
        with pytest.raises(MediaError, match="use 1 or more"):
            video.stream(step=0)


@pytest.mark.parametrize("degrees", QUARTER_TURNS)
def test_turned_pictures_are_shown_upright(tmp_path: Path, degrees: int) -> None:
    path = write_clip(tmp_path / "phone.mp4", turned_for(counting(9, SIZE), degrees), Encoding(gop=4, b_frames=2))
    with PyAvVideo(set_display_matrix(path, QUARTER_TURNS[degrees])) as video:
        assert video.size == SIZE
        for size in (None, (60, 100)):
            frames = video.read([7, 2], size)
            assert frames.shape[1:3] == (size or SIZE)
            assert numbers_in(frames) == [7, 2] and all(map(is_upright, frames))


@pytest.mark.parametrize("degrees", [0, 90])
def test_mirrored_pictures_are_shown_the_right_way_round(tmp_path: Path, degrees: int) -> None:
    """As front cameras store them; with a turn, the matrix exchanges rows and columns."""
    matrix = {0: MIRRORED, 90: (0, 1, 1, 0)}[degrees]
    stored = (picture[:, ::-1] if degrees == 0 else picture.swapaxes(0, 1) for picture in counting(5, SIZE))
    path = set_display_matrix(write_clip(tmp_path / "front.mp4", stored), matrix)
    frames = decode_video(path)
    assert numbers_in(frames) == list(range(5)) and all(map(is_upright, frames))


@pytest.mark.parametrize(("name", "coding"), [
    ("h264.mp4", Encoding(pixel_format="yuv444p")), ("vp9.webm", Encoding("libvpx-vp9")),
    ("mjpeg.avi", Encoding("mjpeg", pixel_format="yuvj420p")),
])  # fmt: skip
def test_odd_sizes_come_back_whole(tmp_path: Path, name: str, coding: Encoding) -> None:
    with PyAvVideo(write_clip(tmp_path / name, counting(5, (97, 129)), coding)) as video:
        assert video.size == (97, 129) and numbers_in(video.stream()) == list(range(5))


def test_ten_bits_become_eight_with_the_same_brightness(tmp_path: Path) -> None:
    levels = (10, 128, 245)
    frames = [np.full((*SIZE, 3), level, dtype=np.uint8) for level in levels]
    for bits in ("yuv420p", "yuv420p10le"):
        back = decode_video(write_clip(tmp_path / f"{bits}.mp4", frames, Encoding(pixel_format=bits)))
        assert np.abs(back.mean(axis=(1, 2, 3)) - levels).max() < 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_of_a_variable_rate_keep_number_and_time(tmp_path: Path, suffix: str) -> None:
    ticks = [0, 10, 400, 410, 420, 900, 1000, 1001, 1002, 1300, 1500, 5000]
    path = write_clip(tmp_path / f"vfr{suffix}", counting(12, SIZE), Encoding(gop=5, b_frames=2), ticks=ticks)
    with PyAvVideo(path) as video:
        np.testing.assert_allclose(video.times_s, np.array(ticks) / 1000, atol=1e-3)
        assert [number_in(video.read([number])[0]) for number in (11, 0, 7, 8, 3)] == [11, 0, 7, 8, 3]


def test_frames_that_share_a_time_are_all_there(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "own.mkv", counting(8, SIZE), Encoding("mjpeg", pixel_format="yuvj420p"))
    ticks = [0, 40, 80, 80, 80, 200, 240, 240]
    with PyAvVideo(retime(path, tmp_path / "shared.mkv", ticks)) as video:
        assert video.frames == 8 and numbers_in(video.read([4, 2, 3, 7, 0])) == [4, 2, 3, 7, 0]
        assert [round(1000 * time) for time in video.times_s] == ticks


@pytest.mark.parametrize(("name", "shift_frames", "options"), [
    ("late.mp4", 60, {}), ("late.mkv", 60, {}), ("early.mkv", -7, {"avoid_negative_ts": "disabled"}),
])  # fmt: skip
def test_where_time_begins_does_not_matter(
    tmp_path: Path, name: str, shift_frames: int, options: dict[str, str]
) -> None:
    path = write_clip(tmp_path / "zero.mp4", counting(30, SIZE), Encoding(gop=10, b_frames=2))
    moved = shift_times(path, tmp_path / name, Fraction(shift_frames, 24), container_options=options)
    with PyAvVideo(moved) as video:
        assert video.frames == 30 and video.times_s[0] == 0
        assert [number_in(video.read([number])[0]) for number in (29, 3, 11, 0)] == [29, 3, 11, 0]


@pytest.mark.parametrize("cut", [1, 7, 10, 19])
def test_frames_that_an_edit_list_hides_have_no_number(tmp_path: Path, cut: int) -> None:
    path = write_clip(tmp_path / "whole.mp4", counting(30, SIZE), Encoding(gop=10, b_frames=2))
    with PyAvVideo(shift_times(path, tmp_path / "cut.mp4", Fraction(-cut, 24))) as video:
        assert video.frames == 30 - cut
        order = [29 - cut, 0, 3, 15 - cut // 2]
        assert [number_in(video.read([number])[0]) for number in order] == [number + cut for number in order]
        assert numbers_in(video.stream()) == list(range(cut, 30))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="PyAV writes no VP8 in two passes; ffmpeg does")
def test_packets_that_show_nothing_are_no_frames(tmp_path: Path) -> None:
    """VP8 in two passes stores pictures that others refer to and that are never shown."""
    source = write_clip(tmp_path / "source.mkv", counting(100, SIZE), Encoding("ffv1"))
    path = tmp_path / "hidden.webm"
    coding = ["-c:v", "libvpx", "-b:v", "300k", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-deadline", "good"]
    quick = ["-cpu-used", "4", "-threads", "1", "-loglevel", "error", "-y"]  # libvpx's threads spin
    for number in ("1", "2"):
        passes = ["-pass", number, "-passlogfile", str(tmp_path / "log")]
        subprocess.run(["ffmpeg", "-i", str(source), *coding, *quick, *passes, str(path)], check=True)
    with av.open(str(path)) as container:
        assert sum(1 for packet in container.demux(video=0) if packet.size) > 100
    with PyAvVideo(path) as video:
        assert video.frames == 100 and numbers_in(video.stream()) == list(range(100))
        assert numbers_in(video.read([90, 3, 41])) == [90, 3, 41]
        np.testing.assert_allclose(video.times_s, np.arange(100) / 24, atol=1e-3)


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    for name, coding in {"a.mp4": Encoding(), "a.webm": Encoding("libvpx-vp9"), "a.avi": Encoding("mpeg4")}.items():
        with PyAvVideo(write_clip(tmp_path / name, counting(1, SIZE, first=9), coding)) as video:
            assert (video.frames, list(video.times_s)) == (1, [0.0])
            assert numbers_in(video.read([0, 0])) == [9, 9] and numbers_in(video.stream()) == [9]


def test_the_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=48000, layout="mono")
        cover = container.add_stream("mjpeg")
        cover.height, cover.width, cover.pix_fmt = *SIZE, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 48000
        container.mux(cover.encode(av.VideoFrame.from_ndarray(next(counting(1, SIZE)), format="rgb24")))
        container.mux(cover.encode())
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    with pytest.raises(MediaError, match=r"song\.mp4: has no video stream"):
        PyAvVideo(path)


def test_a_video_that_changes_its_size_needs_one_to_be_read_in(tmp_path: Path) -> None:
    parts = [write_clip(tmp_path / f"{height}.h264", counting(6, (height, 128)), Encoding()) for height in (96, 64)]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with PyAvVideo(path) as video:
        assert video.frames == 12
        with pytest.raises(MediaError, match=r"both\.h264: the video's size changes at frame 6"):
            list(video.stream())
        assert numbers_in(video.stream(size=(60, 80))) == [*range(6), *range(6)]


@pytest.mark.parametrize("name", ["gop12.mp4", "index_first.mov", "mpeg4.avi", "gop250.mkv", "vp9.webm", "av1.mkv"])
def test_a_file_cut_short_is_refused_in_one_line_that_names_it(
    files: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    for share in (0.02, 0.3, 0.6, 0.85):
        with (
            pytest.raises(MediaError, match=name) as refused,
            PyAvVideo(truncate(copy_of(files(name), tmp_path / name), share)) as video,
        ):
            video.read(range(video.frames))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", FILES)
def test_damage_never_ends_in_another_error(files: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    for seed in range(8):
        damaged = corrupt(copy_of(files(name), tmp_path / name), seed, (1, 6, 60)[seed % 3], after=0.3 * (seed % 2))
        try:
            with PyAvVideo(damaged) as video:
                assert len(video.read([video.frames - 1, 0])) == 2
                assert sum(1 for _ in video.stream()) == video.frames
        except MediaError as error:
            assert name in str(error) and "\n" not in str(error)


def test_a_video_goes_on_after_a_read_that_failed(files: Callable[[str], Path], tmp_path: Path) -> None:
    """Damage in one group of pictures leaves the others readable."""
    path = copy_of(files("gop12.mp4"), tmp_path / "gop12.mp4")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[place + 8 : place + size] = bytes(size - 8)
    path.write_bytes(content)
    with PyAvVideo(path) as video:
        with pytest.raises(MediaError, match=r"gop12\.mp4"):
            video.read([35])
        assert numbers_in(video.read([5, 50])) == [5, 50]


def test_a_remuxed_video_has_the_same_frames(files: Callable[[str], Path], tmp_path: Path) -> None:
    with PyAvVideo(files("gop12.mp4")) as one, PyAvVideo(remux(files("gop12.mp4"), tmp_path / "a.mkv")) as other:
        assert np.array_equal(one.read([3, 60]), other.read([3, 60]))


def test_open_video_is_pyav_unless_told_otherwise(tmp_path: Path) -> None:
    with open_video(write_clip(tmp_path / "a.mp4", pan(3, SIZE, (0, 1)))) as video:
        assert isinstance(video, PyAvVideo) and video.frames == 3
