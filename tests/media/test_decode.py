"""Decoding is exact to the frame, and a file that cannot be trusted is refused with one line that names it."""

import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from goku_mega.data.shapes import Scene, ShapeObject, render_clip
from goku_mega.errors import MediaError
from goku_mega.media.decode import decode_image, decode_media, decode_video
from goku_mega.media.write import write_image, write_video


def counting_clip(frames: int = 12) -> np.ndarray:
    """Frame n is grey with brightness 10 + 15 n, so a frame tells its number."""
    levels = (10 + 15 * np.arange(frames)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels[:, None, None, None], (frames, 32, 48, 3)))


def numbers(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 10) / 15) for frame in frames]


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, counting_clip(), 8)
    return path


def test_every_frame_comes_back_once_and_in_order(clip_file: Path) -> None:
    frames = decode_video(clip_file)
    assert frames.shape == (12, 32, 48, 3) and frames.dtype == np.uint8
    assert numbers(frames) == list(range(12))


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (5, 5), (12, 12), (99, 12)])
def test_max_frames_takes_the_first_ones(clip_file: Path, limit: int, expected: int) -> None:
    assert numbers(decode_video(clip_file, max_frames=limit)) == list(range(expected))


def test_an_image_is_one_writable_frame_with_the_exact_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", pixels)
    image = decode_media(tmp_path / "a.png", max_frames=9)
    assert np.array_equal(image, pixels[None]) and image.flags.writeable


def test_frames_before_the_cut_of_a_clip_cut_without_encoding_anew_are_not_missed(tmp_path: Path) -> None:
    """Such a file still holds the frames back to the key frame; an edit list hides them."""
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    write_video(whole, counting_clip(), 8)
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        video = source.streams.video[0]
        copy = target.add_stream_from_template(video)
        assert video.time_base is not None
        shift = int(Fraction(5, 8) / video.time_base)
        for packet in source.demux(video):
            if packet.dts is not None and packet.pts is not None:
                packet.stream, packet.pts, packet.dts = copy, packet.pts - shift, packet.dts - shift
                target.mux(packet)
    assert numbers(decode_video(cut)) == list(range(5, 12))


@pytest.mark.parametrize("name", ["gone.mp4", "gone.png"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError, match=rf"{name}.*no such file"):
        decode_media(tmp_path / name)


@pytest.mark.parametrize("name", ["bad.mp4", "bad.png", "bad.webm", "bad"])
@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"not a picture at all"])
def test_a_file_that_is_no_media_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=name) as caught:
        decode_media(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(MediaError):
        decode_media(tmp_path)


def test_a_file_with_sound_only_has_no_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        decode_video(path)


def test_a_video_cut_anywhere_is_refused_or_whole(clip_file: Path, tmp_path: Path) -> None:
    content, cut = clip_file.read_bytes(), tmp_path / "cut.mp4"
    whole = decode_video(clip_file)
    for length in range(0, len(content), 61):
        cut.write_bytes(content[:length])
        assert refused_or_equal(cut, whole)


def test_a_video_whose_index_comes_first_and_whose_end_is_missing_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), dtype=np.uint8)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"clip\.mp4"):
        decode_video(path)


def test_damage_inside_the_pictures_is_refused_wherever_the_decoder_notices_it(tmp_path: Path) -> None:
    """FFmpeg paints over what it cannot read, and only flags it. H.264 has no checksums: some damage passes."""
    path, damaged = tmp_path / "clip.mp4", tmp_path / "damaged.mp4"
    scene = Scene((ShapeObject("circle", "red", "left"),))
    write_video(path, render_clip(scene, seed=1, frames=9, height=64, width=64), 8)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    first, last = content.index(b"mdat") + 800, content.index(b"moov")
    whole, passed = decode_video(path), 0
    for place in rng.integers(first, last, 40):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        damaged.write_bytes(bytes(changed))
        passed += not refused_or_equal(damaged, whole)
    assert passed <= 4


def test_damaged_files_never_end_in_another_error(clip_file: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "whole.png", counting_clip(1)[0])
    rng = np.random.default_rng(1)
    for source in (clip_file, tmp_path / "whole.png"):
        content, damaged = source.read_bytes(), tmp_path / f"damaged{source.suffix}"
        for _ in range(60):
            changed = bytearray(content)
            for place in rng.integers(0, len(changed), 4):
                changed[place] ^= int(rng.integers(1, 256))
            damaged.write_bytes(bytes(changed))
            try:
                assert decode_media(damaged).ndim == 4
            except MediaError as error:
                assert damaged.name in str(error)


def test_an_image_larger_than_pillow_trusts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png", counting_clip()[0])
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 32)
    with pytest.raises(MediaError, match=r"a\.png: cannot decode the image \(Image size"):
        decode_image(tmp_path / "a.png")


def test_a_cut_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_image(path, np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:1500])
    with warnings.catch_warnings(), pytest.raises(MediaError, match=r"a\.png"):
        warnings.simplefilter("error")
        decode_image(path)


def refused_or_equal(path: Path, whole: np.ndarray) -> bool:
    try:
        return np.array_equal(decode_video(path), whole)
    except MediaError:
        return True
