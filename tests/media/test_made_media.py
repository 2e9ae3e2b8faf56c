"""What tests are measured by is itself right: made media are what they say."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from made_media import (
    NTSC_FILM,
    Encoding,
    Texture,
    counting,
    cross_fade,
    lettering,
    number_in,
    numbered,
    numbers_in,
    pad_to_bitrate,
    pan,
    solid,
    still,
    test_pattern,
    write_clip,
)

from goku_mega.media.decode import decode_video

SIZE = (96, 128)


def test_every_number_is_read_back_at_any_size() -> None:
    for size in ((48, 64), (97, 129), (480, 854)):
        assert [number_in(numbered(number, size)) for number in range(0, 4096, 37)] == list(range(0, 4096, 37))
    assert number_in(np.full((96, 128, 3), 120, dtype=np.uint8)) == -1


def test_a_pan_moves_by_exactly_its_speed() -> None:
    first, second, third = (frame.astype(int) for frame in pan(3, SIZE, (2, 3)))
    for before, after in ((first, second), (second, third)):
        assert np.abs(after[2:, 3:] - before[:-2, :-3]).max() <= 1
        assert np.abs(after - before).mean() > 5


def test_twice_half_a_pixel_is_one_pixel() -> None:
    frames = [frame.astype(int) for frame in pan(3, SIZE, (0, 0.5), Texture(seed=3))]
    assert np.abs(frames[2][:, 1:] - frames[0][:, :-1]).max() <= 1
    between = (frames[0] + frames[2]) / 2
    assert np.abs(frames[1] - between).mean() < 2 < np.abs(frames[1] - frames[0]).mean()


def test_textures_of_other_seeds_are_other_scenes() -> None:
    one, other = Texture(seed=1).at(SIZE).astype(int), Texture(seed=2).at(SIZE).astype(int)
    assert np.abs(one - other).mean() > 20


def test_no_two_frames_of_the_pattern_are_alike() -> None:
    frames = [frame.astype(int) for frame in test_pattern(6, SIZE)]
    assert min(np.abs(a - b).mean() for place, a in enumerate(frames) for b in frames[:place]) > 5


def test_a_cross_fade_leads_from_one_scene_to_the_other() -> None:
    dark, light = np.zeros((*SIZE, 3), np.uint8), np.full((*SIZE, 3), 200, np.uint8)
    levels = [frame.mean() for frame in cross_fade(still(9, dark), still(9, light), 3)]
    assert levels == [50, 100, 150]


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.1])
def test_lettering_covers_the_share_that_it_states(share: float) -> None:
    text = lettering((480, 854), share)
    assert text.box_share == pytest.approx(share, rel=0.1)
    inked = np.asarray(text.mask) > 0
    rows, columns = inked.any(axis=1), inked.any(axis=0)
    assert 0.1 * text.box_share < inked.mean() < text.box_share  # letters fill a part of their boxes
    lines = rows.astype(int)
    width = np.flatnonzero(columns)[-1] - np.flatnonzero(columns)[0] + 1
    assert lines.sum() * width == pytest.approx(text.box_share * 480 * 854, rel=0.1)
    picture = next(text.over(solid(1, (480, 854))))
    assert ((picture != (90, 120, 150)).any(axis=-1) == inked).mean() > 0.999


@pytest.mark.parametrize("bits_per_second", [499_999, 500_000, 1_234_567])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_bitrate_is_hit_to_the_bit(tmp_path: Path, bits_per_second: int, suffix: str) -> None:
    path = write_clip(tmp_path / f"a{suffix}", counting(192, SIZE), Encoding(gop=48, b_frames=2))
    before = decode_video(path)
    pad_to_bitrate(path, bits_per_second, 8)
    with av.open(str(path)) as container:
        assert sum(packet.size for packet in container.demux(video=0)) * 8 == bits_per_second * 8
    with av.open(str(path)) as container:
        if suffix == ".mp4":
            assert container.streams.video[0].bit_rate == bits_per_second
            assert container.streams.video[0].duration * container.streams.video[0].time_base == 8
    assert np.array_equal(decode_video(path), before)


def test_a_bitrate_below_what_the_pictures_take_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", test_pattern(24, SIZE))
    with pytest.raises(ValueError, match="bytes more than"):
        pad_to_bitrate(path, 8000, 1)
    with pytest.raises(ValueError, match="whole number"):
        pad_to_bitrate(path, 999_999, 1)


@pytest.mark.parametrize("rate", [24, NTSC_FILM, Fraction(2397, 100), 25, 30])
def test_a_rate_is_stored_exactly(tmp_path: Path, rate: Fraction | int) -> None:
    path = write_clip(tmp_path / "a.mp4", counting(48, SIZE), Encoding(rate=rate))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == rate


def test_the_same_call_makes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.mp4", pan(12, SIZE, (0, 1.5)), Encoding(b_frames=2))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_pictures_follow_one_another_as_given(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", (frame for part in (3, 90, 7) for frame in counting(2, SIZE, first=part)))
    assert numbers_in(decode_video(path)) == [3, 4, 90, 91, 7, 8]
