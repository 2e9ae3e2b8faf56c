"""What a source is: probed to the unit, standardised without losing a frame, cut at the exact frames."""

import os
from dataclasses import replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_media import (
    Encoding,
    Texture,
    counting,
    numbers_in,
    pad_to_bitrate,
    pan,
    set_display_matrix,
    solid,
    truncate,
    turned_for,
    write_clip,
)

from goku_mega.config.curation import DedupConfig, ShotsConfig, StandardiseConfig
from goku_mega.curate.clip import Clip, Footage
from goku_mega.curate.sources import content_of, find_sources, is_unchanged, unhashed
from goku_mega.curate.stages.hashes import Hashes, alike
from goku_mega.curate.stages.length import key_frame_numbers, windows
from goku_mega.curate.stages.probe import average_rate, probe
from goku_mega.curate.stages.shots import Shots, spans
from goku_mega.curate.stages.standardise import is_standard, standardise
from goku_mega.errors import DataError, MediaError
from goku_mega.media.decode import PyAvVideo
from goku_mega.media.write import write_image

NTSC = Fraction(24000, 1001)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("bitrate", [499_999, 500_000])
def test_the_bit_rate_is_that_of_the_video_stream_to_the_bit(tmp_path, suffix, bitrate):
    """Whatever else is in the file: 8 seconds, so that a bit a second is a byte."""
    path = write_clip(tmp_path / f"clip{suffix}", solid(192, (64, 96)), Encoding())
    assert probe(pad_to_bitrate(path, bitrate, 8)).bitrate_bps == bitrate


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".mov"])
@pytest.mark.parametrize("rate", [24, NTSC, Fraction(2397, 100), 25, Fraction(30000, 1001)])
def test_rate_and_duration_are_exact_in_every_container(tmp_path, suffix, rate):
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    facts = probe(write_clip(tmp_path / f"clip{suffix}", counting(100, (48, 64)), Encoding(codec=codec, rate=rate)))
    assert facts.frames == 100 and not facts.varying_rate
    assert facts.frame_rate == pytest.approx(float(rate), abs=2e-4)
    assert facts.duration_s == pytest.approx(100 / rate, abs=1e-4)


def test_sound_is_no_part_of_the_videos_bit_rate(tmp_path):
    encoding = Encoding()
    silent = probe(write_clip(tmp_path / "silent.mp4", counting(48), encoding))
    sounding = probe(write_clip(tmp_path / "sound.mp4", counting(48), replace(encoding, sound=True)))
    assert silent.bitrate_bps == sounding.bitrate_bps and silent.file_bytes < sounding.file_bytes


def test_a_turned_video_is_as_it_is_shown(tmp_path):
    path = write_clip(tmp_path / "turned.mp4", turned_for(counting(12, (64, 48)), 90), Encoding())
    facts = probe(set_display_matrix(path, (0, 1, -1, 0)))
    assert (facts.height, facts.width, facts.turned) == (64, 48, True)


def test_a_rate_that_varies_is_seen(tmp_path):
    ticks = np.cumsum([0, *([30, 50] * 30)]).tolist()
    facts = probe(write_clip(tmp_path / "clip.mkv", counting(61), Encoding(), ticks=ticks))
    assert facts.varying_rate and facts.frame_rate == pytest.approx(25, rel=1e-6)


@given(st.integers(2, 2000), st.sampled_from([24, NTSC, Fraction(2397, 100), 60]), st.sampled_from([1e-3, 1e-6]))
def test_time_stamps_that_are_rounded_leave_the_declared_rate(frames, rate, tick_s):
    times_s = np.floor(np.arange(frames) / float(rate) / tick_s + 0.5) * tick_s
    assert average_rate(times_s, Fraction(rate), tick_s) == rate
    assert float(average_rate(times_s, Fraction(rate) * 2, tick_s)) == pytest.approx(float(rate), rel=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_what_is_broken_is_said_in_one_line_that_names_it(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"nothing of the kind" * 50)
    with pytest.raises(MediaError, match=f"broken{suffix}"):
        probe(path)


def test_a_video_cut_short_is_broken(tmp_path):
    moov_first = Encoding(container_options={"movflags": "faststart"})
    with pytest.raises(MediaError, match="cut short"):
        probe(truncate(write_clip(tmp_path / "clip.mp4", counting(60), moov_first), 0.6))


def test_what_is_standard_is_taken_as_it_is(tmp_path):
    source = write_clip(tmp_path / "clip.mp4", counting(24), Encoding(gop=12))
    made = standardise(source, tmp_path / "out.mp4", probe(source), StandardiseConfig())
    assert made.as_it_is and not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("clip.mp4", Encoding(codec="libx265")),
        ("clip.webm", Encoding(codec="libvpx-vp9")),
        ("clip.mp4", Encoding(gop=250)),
        ("clip.mkv", Encoding(codec="libx265", pixel_format="yuv420p10le")),
        ("clip.avi", Encoding(codec="mjpeg", pixel_format="yuvj420p")),
    ],
)
def test_everything_else_becomes_h264_frame_by_frame(tmp_path, name, encoding):
    source = write_clip(tmp_path / name, counting(60, (96, 128)), replace(encoding, rate=NTSC))
    facts = probe(source)
    assert not is_standard(facts, StandardiseConfig())
    made = standardise(source, tmp_path / "out.mp4", facts, StandardiseConfig(gop_frames=20))
    again = probe(tmp_path / "out.mp4")
    assert (again.codec, again.pixel_format, again.frames) == (
        "h264",
        "yuv420p",
        made.frames,
    ) and again.gop_frames <= 20
    assert is_standard(again, StandardiseConfig(gop_frames=20)) and again.frame_rate == made.frame_rate
    with PyAvVideo(tmp_path / "out.mp4") as video:
        assert numbers_in(video.stream()) == list(range(60))


def test_the_same_source_becomes_the_same_bytes(tmp_path):
    source = write_clip(tmp_path / "clip.mp4", counting(30, (96, 128)), Encoding(gop=250))
    for name in ("a.mp4", "b.mp4"):
        standardise(source, tmp_path / name, probe(source), StandardiseConfig(gop_frames=12))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_varying_rate_becomes_the_frames_that_are_shown_at_every_tick(tmp_path):
    ticks = [0, 40, 80, 200, 240, 280, 400, 440]  # 40 ms frames, two of which are shown for 120 ms
    source = write_clip(tmp_path / "clip.mkv", counting(8, (48, 64)), Encoding(), ticks=ticks)
    facts = replace(probe(source), rate_numerator=25, rate_denominator=1)
    made = standardise(source, tmp_path / "out.mp4", facts, StandardiseConfig())
    with PyAvVideo(tmp_path / "out.mp4") as video:
        assert numbers_in(video.stream()) == [0, 1, 2, 2, 2, 3, 4, 5, 5, 5, 6, 7]
    assert made.frames == 12


def test_odd_sizes_lose_one_line(tmp_path):
    source = write_clip(tmp_path / "clip.mkv", counting(6, (49, 65)), Encoding(codec="ffv1", pixel_format="yuv444p"))
    made = standardise(source, tmp_path / "out.mp4", probe(source), StandardiseConfig())
    assert (made.height, made.width) == (48, 64)


def scenes(*lengths: int, speed: float = 1.0, size: tuple[int, int] = (120, 212)):
    return chain.from_iterable(
        pan(length, size, (0.0, speed), Texture(seed=seed)) for seed, length in enumerate(lengths)
    )


@pytest.mark.parametrize(("detector", "threshold"), [("adaptive", 3.0), ("content", 27.0)])
@pytest.mark.parametrize("lengths", [(40, 31, 50), (100,), (25, 25, 25, 25)])
def test_cuts_are_found_at_the_exact_frames(tmp_path, detector, threshold, lengths):
    path = write_clip(tmp_path / "clip.mp4", scenes(*lengths), Encoding())
    found = Shots(ShotsConfig(detector=detector, threshold=threshold)).score(Footage(path), 24.0)
    assert found.cuts == tuple(np.cumsum(lengths)[:-1].tolist())
    assert [length for _, length in spans(found.cuts, sum(lengths))] == list(lengths)


@pytest.mark.parametrize("speed", [0.0, 3.0, 10.0])
def test_a_pan_of_any_speed_is_no_cut(tmp_path, speed):
    path = write_clip(tmp_path / "clip.mp4", scenes(72, speed=speed), Encoding())
    assert Shots(ShotsConfig()).score(Footage(path), 24.0).cuts == ()


def test_a_damaged_frame_is_an_error_and_no_cut(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", scenes(60), Encoding())
    with av.open(str(path)) as container:
        packets = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    content[packets[30] + 40 : packets[31]] = bytes(packets[31] - packets[30] - 40)
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"clip\.mp4"):
        Shots(ShotsConfig()).score(Footage(path), 24.0)


@given(st.integers(0, 1000), st.integers(1, 3000), st.sampled_from([24.0, float(NTSC), 60.0]), st.floats(0.1, 9.9))
def test_windows_tile_a_span_and_only_a_short_rest_is_dropped(first, frames, rate, min_s):
    found = windows(first, frames, rate, max_s=10.0, min_s=min_s)
    ends = [first, *(start + length for start, length in found)]
    assert [start for start, _ in found] == ends[:-1]
    assert all(min_s - 1e-6 <= length / rate <= 10 + 1e-6 for _, length in found)
    assert (first + frames - ends[-1]) / rate < min_s


def test_a_whole_window_is_kept_where_no_number_of_frames_lasts_from_the_least_to_the_most():
    assert windows(0, 480, float(NTSC), max_s=10, min_s=10) == [(0, 239), (239, 239)]


def test_ten_seconds_are_one_clip_and_a_frame_more_is_a_rest():
    assert windows(5, 240, 24.0, max_s=10, min_s=2) == [(5, 240)]
    assert windows(5, 241, 24.0, max_s=10, min_s=2) == [(5, 240)]
    assert windows(0, 600, 24.0, max_s=10, min_s=2) == [(0, 240), (240, 240), (480, 120)]


@given(st.integers(0, 500), st.integers(1, 2000), st.floats(10, 60), st.floats(0.2, 4))
def test_key_frames_are_frames_of_the_clip_each_once_evenly_spread(first, frames, rate, per_second):
    numbers = key_frame_numbers(first, frames, rate, per_second)
    assert len(numbers) == min(frames, max(1, round(frames / rate * per_second)))
    assert first <= numbers[0] and numbers[-1] < first + frames
    gaps = np.diff(numbers)
    assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def clip(path: Path) -> Clip:
    footage = Footage(path)
    return Clip("key", footage, 0, footage.frames, 24.0, key_frame_numbers(0, footage.frames, 24.0, 1.0))


def test_a_clip_encoded_anew_and_scaled_is_alike_and_another_scene_is_not(tmp_path):
    size = (240, 424)
    pictures = list(islice(pan(72, size, (0, 1.0), Texture(seed=3, finest_px=40)), 72))
    write_clip(tmp_path / "one.mp4", pictures, Encoding())
    write_clip(tmp_path / "again.mp4", (picture[::2, ::2] for picture in pictures), Encoding(options={"crf": "33"}))
    write_clip(tmp_path / "other.mp4", pan(72, size, (0, 1.0), Texture(seed=4, finest_px=40)), Encoding())
    hashes = [Hashes().score(clip(tmp_path / name)).hashes for name in ("one.mp4", "again.mp4", "other.mp4")]
    assert alike(hashes, DedupConfig()) == [(0, 1)]


def test_alike_means_a_share_of_the_shorter_clips_frames():
    same, other = "0" * 16, "f" * 16
    near = "00000000000000ff"  # 8 bits away
    far = "00000000000001ff"
    assert alike([[same], [near]], DedupConfig()) == [(0, 1)] and alike([[same], [far]], DedupConfig()) == []
    assert alike([[same, other, other, other], [same, far]], DedupConfig()) == [(0, 1)]
    assert alike([[same, far, far], [same] * 6], DedupConfig()) == []
    assert alike([[same, far, far], [same] * 6], DedupConfig(min_share=0.3)) == [(0, 1)]


def test_sources_are_found_by_folder_and_by_list_and_dealt_to_parts_without_loss(tmp_path):
    for name in ("b.mp4", "deep/a.MKV", "deep/er/c.webm", "d.png", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = [os.path.relpath(path, tmp_path) for path in find_sources(tmp_path, (0, 1))]
    assert found == ["b.mp4", "d.png", "deep/a.MKV", "deep/er/c.webm"]
    parts = [find_sources(tmp_path, (number, 3)) for number in range(3)]
    assert sorted(chain(*parts)) == find_sources(tmp_path, (0, 1))
    (tmp_path / "list.txt").write_text("b.mp4\n\ndeep/a.MKV\nb.mp4\n")
    assert find_sources(tmp_path / "list.txt", (0, 1)) == [str(tmp_path / "b.mp4"), str(tmp_path / "deep/a.MKV")]


def test_no_sources_are_one_line(tmp_path):
    with pytest.raises(DataError, match="no such folder or list"):
        find_sources(tmp_path / "nowhere", (0, 1))
    with pytest.raises(DataError, match="holds no video and no image"):
        find_sources(tmp_path, (0, 1))


def test_content_is_known_until_the_file_changes(tmp_path):
    one, two = str(tmp_path / "one.mp4"), str(tmp_path / "two.mp4")
    Path(one).write_bytes(b"abc" * 10)
    Path(two).write_bytes(b"abc" * 10)
    known = {one: content_of(one)}
    assert known[one].content == content_of(two).content
    assert unhashed([one, two], known) == [two]
    Path(one).write_bytes(b"abd" * 10 + b"x")
    assert not is_unchanged(one, known[one]) and content_of(one).content != content_of(two).content
    Path(one).unlink()
    assert unhashed([one], known) == [one]
    with pytest.raises(MediaError, match=r"one\.mp4: cannot be read"):
        content_of(one)


def test_images_are_probed_for_their_size(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((48, 64, 3), dtype=np.uint8))
    facts = probe(tmp_path / "a.png")
    assert (facts.kind, facts.height, facts.width, facts.frames) == ("image", 48, 64, 1)
