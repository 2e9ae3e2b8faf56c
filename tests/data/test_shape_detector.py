"""The detector reads the truth back from clean, coded and codec-like damaged frames, and is never thrown by garbage."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from goku_mega.data.shape_detector import detect, score
from goku_mega.data.shape_drawing import draw_ground
from goku_mega.data.shapes import Scene, ShapeObject, draw_scene, render_clip
from goku_mega.media.decode import decode_video
from goku_mega.media.write import write_video
from goku_mega.seeding import derive_seed

LEVELS = ("one", "two")
SIZES = ((64, 64), (48, 80), (96, 64), (64, 64), (80, 80))


def drawn(level: str, count: int) -> list[tuple[Scene, np.ndarray]]:
    """Scenes of the training distribution, every third an image, sizes and lengths mixed."""
    pairs = []
    for number in range(count):
        scene = draw_scene(level, number % 3 > 0, np.random.default_rng(derive_seed("scene", level, number)))
        height, width = SIZES[number % len(SIZES)]
        frames = (5, 9, 13)[number // 3 % 3] if number % 3 else 1
        seed = derive_seed("clip", level, number)
        pairs.append((scene, render_clip(scene, seed=seed, frames=frames, height=height, width=width)))
    return pairs


def like_a_small_codec(frames: np.ndarray, seed: int) -> np.ndarray:
    """Blur (sigma 1 px), weaker contrast, a colour cast and noise."""
    rng = np.random.default_rng(seed)
    weights = np.exp(-(np.arange(-3.0, 4.0) ** 2) / 2)
    weights /= weights.sum()
    blurred = frames.astype(float)
    for axis in (1, 2):
        edges = [(0, 0)] * 4
        edges[axis] = (3, 3)
        padded, size = np.pad(blurred, edges, mode="edge"), frames.shape[axis]
        blurred = sum(w * padded.take(range(n, n + size), axis) for n, w in enumerate(weights))  # type: ignore[assignment]
    cast = rng.uniform(-6, 6, 3)
    return np.clip(128 + 0.9 * (blurred - 128) + cast + rng.normal(0, 6, frames.shape), 0, 255).astype(np.uint8)


def rates(pairs: list[tuple[Scene, np.ndarray]]) -> dict[str, float]:
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for scene, frames in pairs:
        marks = score(scene, detect(frames), is_video=len(frames) > 1)
        right.update(task for task, mark in marks.items() if mark)
        asked.update(marks)
    return {task: right[task] / asked[task] for task in asked}


@pytest.mark.parametrize("level", LEVELS)
def test_the_truth_is_read_from_clips_through_h264(level: str, tmp_path: Path) -> None:
    pairs = []
    for scene, frames in drawn(level, 90):
        if len(frames) > 1:
            write_video(tmp_path / "a.mp4", frames, 8)
            frames = decode_video(tmp_path / "a.mp4")
        pairs.append((scene, frames))
    assert min(rates(pairs).values()) >= 0.99


@pytest.mark.parametrize("level", LEVELS)
def test_the_truth_is_read_from_what_a_small_codec_leaves(level: str) -> None:
    pairs = [(scene, like_a_small_codec(frames, number)) for number, (scene, frames) in enumerate(drawn(level, 60))]
    assert min(rates(pairs).values()) >= 0.97


@pytest.mark.parametrize("side", [128, 256])
def test_the_truth_is_read_at_larger_sizes(side: int) -> None:
    for seed in range(6):
        scene = draw_scene("one", True, np.random.default_rng(seed))
        clip = render_clip(scene, seed=seed, frames=9, height=side, width=side)
        assert score(scene, detect(clip), is_video=True)["all"]


def test_a_wrong_statement_is_marked_wrong_and_only_that() -> None:
    truth = ShapeObject("circle", "red", "left")
    clip = render_clip(Scene((truth,)), seed=1, frames=9, height=64, width=64)
    for task, said in {
        "shape": ShapeObject("square", "red", "left"),
        "color": ShapeObject("circle", "blue", "left"),
        "motion": ShapeObject("circle", "red", "right"),
    }.items():
        marks = score(Scene((said,)), detect(clip), is_video=True)
        assert {name for name, mark in marks.items() if not mark} == {task, "all"}


def test_two_objects_that_changed_places_fail_on_position_alone() -> None:
    left, right = ShapeObject("circle", "red", "still", "left"), ShapeObject("square", "blue", "up", "right")
    clip = render_clip(Scene((left, right)), seed=2, frames=9, height=64, width=64)
    swapped = Scene((ShapeObject("square", "blue", "up", "left"), ShapeObject("circle", "red", "still", "right")))
    marks = score(swapped, detect(clip), is_video=True)
    assert {name for name, mark in marks.items() if not mark} == {"position", "all"}


def test_one_object_where_two_were_asked_for_fails_on_count() -> None:
    one = ShapeObject("circle", "red", "still", "left")
    clip = render_clip(Scene((one,)), seed=2, frames=9, height=64, width=64)
    asked = Scene((one, ShapeObject("square", "blue", "still", "right")))
    marks = score(asked, detect(clip), is_video=True)
    assert not marks["count"] and not marks["two_objects"] and not marks["all"]


def test_an_image_is_not_asked_for_motion() -> None:
    scene = Scene((ShapeObject("triangle", "green", "still"),))
    clip = render_clip(scene, seed=1, frames=1, height=64, width=64)
    assert set(score(scene, detect(clip), is_video=False)) == {"shape", "color", "all"}


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_picture_holds_nothing(value: int) -> None:
    assert detect(np.full((9, 64, 64, 3), value, dtype=np.uint8)).count == 0


@pytest.mark.parametrize("textured", [False, True])
def test_a_ground_alone_holds_nothing(textured: bool) -> None:
    for seed in range(20):
        ground = draw_ground(np.random.default_rng(seed), 64, 64, textured=textured)
        assert detect(like_a_small_codec(np.repeat(ground[None], 3, axis=0), seed)).count == 0


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 8, 8, 3), (9, 64, 64, 3), (1, 16, 200, 3)])
def test_garbage_is_judged_without_a_crash(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    flicker = np.where(rng.random((shape[0], 1, 1, 1)) < 0.5, noise, 0).astype(np.uint8)
    for frames in (noise, flicker, np.full(shape, (255, 0, 0), dtype=np.uint8)):
        assert detect(frames).count >= 0
        for level in LEVELS:
            marks = score(draw_scene(level, True, rng), detect(frames), is_video=True)
            assert set(marks.values()) <= {True, False}
