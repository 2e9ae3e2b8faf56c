"""The corpus tells the truth: its detector reads back what its captions say, also through a lossy codec."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from goku_mega.config import CorpusConfig
from goku_mega.data.shape_detector import detect, score
from goku_mega.data.shapes import Scene, ShapeObject, all_objects, draw_scene, is_held_out, render_clip, write_corpus
from goku_mega.errors import ConfigError, DataError
from goku_mega.media.decode import decode_media


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_corpus(CorpusConfig(output=str(folder), videos=120, images=40, level="mixed", varied_fraction=0.4, workers=2))
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def rates(clips) -> dict[str, float]:
    """Share of right readings by task over (scene, frames) pairs."""
    right, seen = Counter(), Counter()
    for scene, frames in clips:
        for task, mark in score(scene, detect(frames), is_video=len(frames) > 1).items():
            right[task] += mark
            seen[task] += 1
    return {task: right[task] / seen[task] for task in seen}


def blurred(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a small codec does: soft edges, grain, a colour cast, less contrast."""
    soft = frames.astype(float)
    for axis in (1, 2):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    soft = 0.9 * soft + 12 + rng.uniform(-6, 6, 3) + 4 * rng.standard_normal(soft.shape)
    return soft.clip(0, 255).astype(np.uint8)


def test_the_detector_reads_the_decoded_files(corpus):
    found = rates((Scene.from_json(row["truth"]), decode_media(corpus / row["file"])) for row in rows(corpus))
    assert min(found.values()) >= 0.99, found


@pytest.mark.parametrize("level", ["one", "two"])
def test_the_detector_reads_through_a_lossy_codec(level):
    rng = np.random.default_rng(0)
    clips = []
    for number in range(60):
        scene = draw_scene(level, True, rng)
        clips.append((scene, blurred(render_clip(scene, seed=number, frames=9, height=64, width=64), rng)))
    found = rates(clips)
    assert min(found.values()) >= 0.95, found


def test_the_detector_is_not_fooled_by_the_truth_of_another_clip():
    """Marks follow the pixels: scored against another object, what differs is wrong."""
    drawn = ShapeObject("circle", "red", "left")
    seen = detect(render_clip(Scene((drawn,)), seed=0, frames=9, height=64, width=64))
    marks = score(Scene((ShapeObject("square", "red", "up"),)), seen, is_video=True)
    assert marks == {"shape": False, "color": True, "motion": False, "all": False}


@pytest.mark.parametrize("frames", [np.zeros((9, 64, 64, 3)), np.full((1, 48, 80, 3), 200.0)])
def test_an_empty_picture_has_no_object(frames):
    assert detect(frames.astype(np.uint8)).count == 0


def test_noise_does_not_break_the_detector():
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    assert not score(Scene((ShapeObject("circle", "red", "left"),)), detect(noise), is_video=True)["all"]


def test_the_same_settings_write_the_same_bytes(tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        write_corpus(CorpusConfig(output=str(tmp_path / name), videos=6, images=4, workers=workers))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 13
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_held_out_triples_never_occur_in_training_and_every_pair_does(corpus):
    held_out = {item for item in all_objects() if is_held_out(item)}
    assert len(held_out) == 15
    trained = set(all_objects()) - held_out
    for first, second in combinations(("shape", "color", "motion"), 2):
        pairs = {(getattr(item, first), getattr(item, second)) for item in trained}
        assert pairs == {(getattr(item, first), getattr(item, second)) for item in all_objects()}
    rng = np.random.default_rng(0)
    assert not any(draw_scene("one", True, rng).objects[0] in held_out for _ in range(500))
    prompts = [json.loads(line) for line in (corpus / "prompts.jsonl").read_text().splitlines()]
    one = [row for row in prompts if row["level"] == "one"]
    assert {row["prompt"] for row in one if row["split"] == "held_out"} & {row["caption"] for row in rows(corpus)} == set()
    assert len(one) == 90


def test_captions_say_the_truth_and_images_do_not_speak_of_motion(corpus):
    for row in rows(corpus):
        for item in row["truth"]["objects"]:
            assert item["color"] in row["caption"] and item["shape"] in row["caption"]
            if row["kind"] == "video" and item["motion"] != "still":
                assert item["motion"] in row["caption"]
        if row["kind"] == "image":
            assert not any(word in row["caption"] for word in ("moving", "moves", "drifting", "still"))


def test_sizes_and_lengths_are_mixed(corpus):
    shapes = {decode_media(corpus / row["file"]).shape for row in rows(corpus)}
    assert len({shape[1:3] for shape in shapes}) >= 4 and {shape[0] for shape in shapes} >= {1, 5, 9, 13}


def test_bad_settings_and_a_foreign_folder_are_refused(corpus):
    with pytest.raises(ConfigError, match="height is 50"):
        write_corpus(CorpusConfig(output="unused", height=50))
    with pytest.raises(DataError, match="other settings"):
        write_corpus(CorpusConfig(output=str(corpus), videos=3))
