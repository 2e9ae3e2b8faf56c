"""The corpus shows what it says, depends on its settings alone, and keeps its held-out triples apart."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from goku_mega.config.data import CorpusConfig
from goku_mega.data.shapes import (
    COLORS,
    MOTIONS,
    SHAPES,
    Scene,
    ShapeObject,
    all_objects,
    caption,
    draw_scene,
    is_held_out,
    plain_caption,
    prompts,
    render_clip,
    write_corpus,
)
from goku_mega.errors import ConfigError, DataError
from goku_mega.media.decode import decode_media

LEVELS = ("one", "two")


def scenes(level: str, is_video: bool, count: int) -> list[Scene]:
    return [draw_scene(level, is_video, np.random.default_rng(number)) for number in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fifteen_triples_are_held_out_and_every_pair_is_still_seen() -> None:
    seen = [item for item in all_objects() if not is_held_out(item)]
    assert (len(all_objects()), len(seen)) == (90, 75)
    names = {"shape": SHAPES, "color": tuple(COLORS), "motion": MOTIONS}
    for one, other in combinations(names, 2):
        pairs = {(getattr(item, one), getattr(item, other)) for item in seen}
        assert len(pairs) == len(names[one]) * len(names[other])


@pytest.mark.parametrize("level", LEVELS)
def test_no_video_of_the_training_distribution_shows_a_held_out_triple(level: str) -> None:
    drawn = scenes(level, True, 500)
    assert not any(is_held_out(item) for scene in drawn for item in scene.objects)
    assert {item.color for scene in drawn for item in scene.objects} == set(COLORS)
    assert {item.shape for scene in drawn for item in scene.objects} == set(SHAPES)
    assert {item.motion for scene in drawn for item in scene.objects} == set(MOTIONS)


@pytest.mark.parametrize(("level", "held_out", "seen"), [("one", 15, 75), ("two", 8, 30), ("mixed", 23, 105)])
def test_prompts_hold_both_splits_once_each_and_mark_them_by_their_triples(
    level: str, held_out: int, seen: int
) -> None:
    drawn = prompts(level)
    splits = [row["split"] for row in drawn]
    assert splits.count("held_out") >= held_out and splits.count("seen") >= seen
    assert len({row["prompt"] for row in drawn}) == len(drawn)
    for row in drawn:
        scene = Scene.from_json(row["truth"])
        assert (row["split"] == "held_out") == any(map(is_held_out, scene.objects))
        assert row["prompt"] == plain_caption(scene) and row["level"] == scene.level


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_video", [True, False])
def test_captions_state_the_whole_truth_in_several_wordings_and_images_none_of_motion(
    level: str, is_video: bool
) -> None:
    for scene in scenes(level, is_video, 10):
        wordings = {caption(scene, seed, is_video=is_video) for seed in range(60)}
        assert len(wordings) >= 4
        for text in wordings:
            words = text.replace(",", "").split()
            assert all(item.color in words and item.shape in words for item in scene.objects)
            moving = [item.motion for item in scene.objects if item.motion != "still"]
            assert all(motion in words for motion in moving)
            if not is_video:
                assert not {"moving", "moves", "going", "drifting", "still", "rest", "move"} & set(words)


def test_relations_in_captions_agree_with_the_places() -> None:
    for scene in scenes("two", True, 20):
        upper_or_left, other = (f"a {item.color} {item.shape}" for item in scene.objects)
        for seed in range(20):
            text = caption(scene, seed, is_video=True)
            named_first = text.find(upper_or_left) < text.find(other)
            if ", left of" in text or ", above" in text:
                assert named_first
            if ", right of" in text or ", below" in text:
                assert not named_first


def test_a_scene_survives_json() -> None:
    for level in LEVELS:
        for scene in scenes(level, True, 20):
            assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


@pytest.mark.parametrize(("height", "width", "frames"), [(64, 64, 9), (48, 80, 13), (96, 64, 5), (128, 128, 9)])
def test_an_object_never_touches_the_edge_nor_leaves_its_half(height: int, width: int, frames: int) -> None:
    for level in LEVELS:
        for seed, scene in enumerate(scenes(level, True, 12)):
            clip = render_clip(scene, seed=seed, frames=frames, height=height, width=width)
            edge = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1).astype(int)
            assert np.ptp(edge, axis=-1).max() < 40, "a saturated pixel at the edge"
            assert np.array_equal(edge, np.broadcast_to(edge[:1], edge.shape))
            if scene.objects[0].position == "left":
                assert np.array_equal(
                    clip[:, :, width // 2], np.broadcast_to(clip[:1, :, width // 2], (frames, height, 3))
                )


@pytest.mark.parametrize("side", [48, 64, 256])
def test_what_moves_moves_far_enough_to_see_at_any_size_and_what_stands_is_the_same_picture(side: int) -> None:
    for motion in MOTIONS:
        scene = Scene((ShapeObject("square", "red", motion),))
        for seed in range(4):
            clip = render_clip(scene, seed=seed, frames=9, height=side, width=side).astype(int)
            change = np.abs(clip[-1] - clip[0]).max(axis=-1).sum(axis=0 if motion in ("left", "right") else 1) > 0
            if motion == "still":
                assert not change.any()
            else:
                assert change.sum() > 0.25 * side


def test_the_three_shapes_cover_the_same_area() -> None:
    def area(shape: str) -> float:
        clip = render_clip(Scene((ShapeObject(shape, "red", "still"),)), seed=5, frames=1, height=256, width=256)
        return float((np.ptp(clip[0].astype(int), axis=-1) > 100).sum())

    areas = [area(shape) for shape in SHAPES]
    assert max(areas) < 1.12 * min(areas)


def test_a_clip_depends_on_its_seed_alone() -> None:
    scene = Scene((ShapeObject("circle", "cyan", "up"),))
    first, again, other = (render_clip(scene, seed=seed, frames=5, height=64, width=64) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusConfig, Path]:
    folder = tmp_path_factory.mktemp("corpus") / "shapes"
    config = CorpusConfig(output=str(folder), videos=24, images=12, level="mixed", varied_fraction=0.5, workers=2)
    assert write_corpus(config) == {"output": str(folder), "videos": 24, "images": 12}
    return config, folder


def test_workers_and_place_never_change_a_byte_and_the_seed_does(
    corpus: tuple[CorpusConfig, Path], tmp_path: Path
) -> None:
    config, folder = corpus
    write_corpus(replace(config, output=str(tmp_path / "alone"), workers=1))
    assert contents(tmp_path / "alone") == contents(folder)
    write_corpus(replace(config, output=str(tmp_path / "other"), workers=1, seed=1))
    assert contents(tmp_path / "other") != contents(folder)


def test_a_larger_corpus_begins_with_the_smaller_one(corpus: tuple[CorpusConfig, Path], tmp_path: Path) -> None:
    config, folder = corpus
    write_corpus(replace(config, output=str(tmp_path / "more"), videos=26, workers=1))
    more = contents(tmp_path / "more")
    assert all(more[name] == content for name, content in contents(folder).items() if name.endswith((".mp4", ".png")))


def test_every_file_is_listed_once_and_decodes_to_a_size_the_codec_takes(corpus: tuple[CorpusConfig, Path]) -> None:
    _, folder = corpus
    listed = rows(folder / "captions.jsonl")
    keys = [row["key"] for row in listed]
    assert keys == sorted(set(keys)) and len(keys) == 36
    on_disk = {name for name in contents(folder) if name.endswith((".mp4", ".png"))}
    assert {row["file"] for row in listed} == on_disk
    sizes = set()
    for row in listed:
        frames, height, width, _ = decode_media(folder / row["file"]).shape
        assert height % 16 == 0 and width % 16 == 0 and frames % 4 == 1
        assert (frames == 1) == (row["kind"] == "image")
        sizes.add((height, width, frames))
    assert len(sizes) >= 5 and (64, 64, 9) in sizes
    assert {Scene.from_json(row["truth"]).level for row in listed} == {"one", "two"}


def test_writing_again_changes_nothing_and_other_settings_are_refused(corpus: tuple[CorpusConfig, Path]) -> None:
    config, folder = corpus
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_corpus(replace(config, workers=1))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(DataError, match="other settings"):
        write_corpus(replace(config, seed=9))


def test_a_corpus_broken_off_before_its_captions_is_made_again(
    corpus: tuple[CorpusConfig, Path], tmp_path: Path
) -> None:
    config, folder = corpus
    config = replace(config, output=str(tmp_path), workers=1)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "000000.mp4").write_bytes(b"half")
    write_corpus(config)
    assert contents(tmp_path) == contents(folder)


def test_an_output_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        write_corpus(CorpusConfig(output=str(tmp_path / "file"), videos=1, images=0, workers=1))


@pytest.mark.parametrize(
    "change", [{"height": 60}, {"width": 32}, {"frames": 8}, {"frames": 1}, {"videos": 0, "images": 0}]
)
def test_sizes_the_codec_cannot_take_are_refused_before_any_file(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        write_corpus(replace(CorpusConfig(output=str(tmp_path / "new"), workers=1), **change))  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
