"""Motion is the mean length of the flow in px a gap: of pans, turns, zooms and objects, in compressed footage."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from clips import write_and_open
from hypothesis import given
from hypothesis import strategies as st
from made_media import Texture, pan, still

from goku_mega.config.curation import MotionConfig
from goku_mega.curate.clip import Clip
from goku_mega.curate.stages.flow import camera_flow, cell_flow, plain_ground, sum_cells
from goku_mega.curate.stages.motion import Motion, frame_steps, mean_length, pair_starts, steady_mean

SIZE = (480, 854)
GAP = 3
EVERY_GAP = MotionConfig(pairs_per_second=8)


def panned(px_a_gap: float, count: int = 49, turn: float = 0.0, finest_px: float = 12) -> Iterator[np.ndarray]:
    speed = (px_a_gap / GAP * np.sin(turn), px_a_gap / GAP * np.cos(turn))
    return pan(count, SIZE, speed, Texture(seed=3, finest_px=finest_px))


@pytest.mark.slow
@pytest.mark.parametrize("crf", [10, 23])
@pytest.mark.parametrize("px", [0.29, 0.3, 8.1, 20.0, 20.1])
def test_a_pan_in_compressed_footage_scores_its_speed(tmp_path: Path, px: float, crf: int) -> None:
    score = Motion(EVERY_GAP).score(write_and_open(tmp_path / "pan.mp4", panned(px), crf=crf))
    assert abs(score.mean_px - px) <= (0.005 if px < 1 else 0.03)


@pytest.mark.slow
def test_the_direction_of_a_pan_does_not_matter(tmp_path: Path) -> None:
    for number, turn in enumerate((0.5, 2.0, 4.0)):
        clip = write_and_open(tmp_path / f"{number}.mp4", panned(6.0, 13, turn))
        assert abs(Motion(EVERY_GAP).score(clip).mean_px - 6.0) <= 0.03


def test_footage_that_stands_still_scores_nothing(tmp_path: Path) -> None:
    clip = write_and_open(tmp_path / "still.mp4", still(13, Texture(seed=1).at(SIZE)))
    assert Motion(EVERY_GAP).score(clip).mean_px <= 0.01


def test_a_score_is_the_same_bit_for_bit_and_that_of_its_pairs(tmp_path: Path) -> None:
    clip = write_and_open(tmp_path / "pan.mp4", panned(5.0, 25))
    score = Motion(EVERY_GAP).score(clip)
    assert score == Motion(EVERY_GAP).score(clip)
    assert len(score.per_pair) == 8 and score.mean_px == round(steady_mean(score.per_pair), 2)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_motion_that_is_not_steady_keeps_its_mean(lengths: list[float]) -> None:
    mean, largest = sum(lengths) / len(lengths), max(lengths)
    assert abs(steady_mean(lengths) - mean) <= 0.05 + 0.02 * largest + 1e-9
    assert min(lengths) - 1e-9 <= steady_mean(lengths) <= largest + 1e-9


def test_what_a_codec_adds_after_a_key_frame_is_left_out_of_steady_motion_and_a_stop_is_not() -> None:
    assert steady_mean([0.4738, 0.5, 0.5, 0.5, 0.4731, 0.5, 0.5, 0.5]) == pytest.approx(0.5, abs=1e-9)
    assert steady_mean([3.0, 3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0]) == pytest.approx(15 / 8)


def test_a_part_of_a_source_is_scored_by_its_own_frames(tmp_path: Path) -> None:
    moving = list(panned(12.0, 13))
    clip = write_and_open(tmp_path / "both.mp4", iter([moving[0]] * 12 + moving))
    halves = [dataclasses.replace(clip, first=first, frames=12) for first in (0, 12)]
    standing, panning = (Motion(EVERY_GAP).score(half).mean_px for half in halves)
    assert standing <= 0.05 and abs(panning - 12.0) <= 0.1


def test_a_clip_shorter_than_a_gap_is_measured_by_what_it_has(tmp_path: Path) -> None:
    clip = write_and_open(tmp_path / "pan.mp4", panned(9.0, 3))
    assert abs(Motion(EVERY_GAP).score(clip).mean_px - 9.0) <= 0.1
    alone = dataclasses.replace(clip, frames=1)
    assert Motion(EVERY_GAP).score(alone).mean_px == 0


@pytest.mark.parametrize("size", [(480, 854), (854, 480), (720, 1280), (960, 1280)])
def test_px_mean_the_same_in_every_size(size: tuple[int, int]) -> None:
    scale = min(size) / 480
    texture = Texture(seed=5, finest_px=14 * scale)
    length = mean_length(texture.at(size), texture.at(size, (0, -4.0 * scale)), 480)
    assert abs(length - 4.0) <= 0.02


@pytest.mark.parametrize(("turn", "zoom"), [(0.02, 1.0), (0.0, 1.03)])
def test_a_turn_and_a_zoom_score_the_mean_over_the_picture(turn: float, zoom: float) -> None:
    y, x = (axis - (side - 1) / 2 for axis, side in zip(np.mgrid[: SIZE[0], : SIZE[1]], SIZE, strict=True))
    to_x = (np.cos(turn) * x + np.sin(turn) * y) / zoom
    to_y = (np.cos(turn) * y - np.sin(turn) * x) / zoom
    first, second = (waves(*place) for place in ((y, x), (to_y, to_x)))
    truth = float(np.hypot(*(zoom * turned(turn, x, y) - np.stack([x, y]))).mean())
    assert abs(mean_length(first, second, 480) - truth) <= 0.01 * truth


def turned(angle: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y])


def waves(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    picture = np.zeros(y.shape)
    for length, angle, phase in zip(rng.uniform(14, 90, 20), rng.uniform(0, 7, 20), rng.uniform(0, 7, 20), strict=True):
        picture += np.cos(2 * np.pi / length * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    grey = np.clip(128 + 15 * picture, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


@pytest.mark.parametrize("plain", [True, False])
def test_an_object_on_still_ground_scores_its_share_times_its_speed(plain: bool) -> None:
    ground = np.full((*SIZE, 3), 90, np.uint8) if plain else Texture(seed=8, finest_px=30).at(SIZE)
    object_ = Texture(seed=9, finest_px=10, tint=(150, 120, 90)).at((240, 240))
    frames = []
    for left in (200, 212):
        frame = ground.copy()
        frame[120:360, left : left + 240] = object_
        frames.append(frame)
    truth = 12 * 240 * 240 / (SIZE[0] * SIZE[1])
    assert abs(mean_length(*frames, 480) - truth) <= 0.15 * truth


@pytest.mark.parametrize("ground", ["plain", "textured"])
def test_noise_is_no_motion(ground: str) -> None:
    picture = np.full((*SIZE, 3), 90, np.uint8) if ground == "plain" else Texture(seed=1).at(SIZE)
    rng = np.random.default_rng(0)
    noisy = [
        np.clip(np.rint(picture + rng.normal(0, 5, (*SIZE, 1))), 0, 255).astype(np.uint8) for _ in range(2)
    ]  # fmt: skip
    assert mean_length(*noisy, 480) <= 0.2


def test_flow_is_of_every_cell_and_points_where_the_picture_goes() -> None:
    texture = Texture(seed=2, finest_px=10)
    first, second = (texture.at((120, 200), offset)[..., 0].astype(np.float32) for offset in ((0, 0), (-2, 3)))
    flow, pixels = cell_flow(first, second)
    assert flow.shape == (15, 25, 2) and pixels.sum() == 120 * 200
    assert np.abs(flow - (-3, 2)).max() <= 0.2 and np.abs(flow.mean((0, 1)) - (-3, 2)).max() <= 0.02


def test_sums_over_cells_keep_every_pixel() -> None:
    values = np.random.default_rng(0).integers(0, 9, (21, 35))
    sums = sum_cells(values)
    assert sums.shape == (3, 5) and sums.sum() == values.sum() and sums[0, 0] == values[:8, :8].sum()


def test_the_camera_is_told_in_spite_of_objects() -> None:
    y, x = np.mgrid[:20, :30]
    flow = np.stack([2 + 0.1 * x, 0.05 * y - 1], -1)
    with_object = flow.copy()
    with_object[5:12, 5:12] = (-9, 4)
    assert np.abs(camera_flow(with_object, np.ones((20, 30))) - flow).max() <= 0.01


def test_plain_ground_is_what_no_texture_encloses() -> None:
    textured = np.zeros((6, 8), dtype=bool)
    textured[2, 2:5] = textured[4, 2:5] = True
    assert not plain_ground(textured)[2:5, 2:5].any()
    assert plain_ground(textured).sum() == 6 * 8 - 9


@pytest.mark.parametrize("rate", [23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 60.0])
def test_pairs_stand_in_the_middle_of_the_clip_and_leave_no_gap_between(rate: float) -> None:
    gap, stride = frame_steps(rate, 240, 0.125, 0.125)
    starts = pair_starts(240, gap, stride)
    assert gap == stride == round(rate / 8)
    assert all(after - before == gap for before, after in pairwise(starts))
    left, right = starts[0], 239 - starts[-1] - gap
    assert 0 <= right - left <= 1 and left + right < stride


def test_a_gap_that_is_no_whole_number_of_frames_is_made_up_for(tmp_path: Path) -> None:
    clip: Clip = write_and_open(tmp_path / "pan.mp4", panned(6.0, 17))
    longer = Motion(MotionConfig(gap_s=0.15, pairs_per_second=8)).score(clip).mean_px
    assert abs(longer - 6.0 * 0.15 / 0.125) <= 0.03
