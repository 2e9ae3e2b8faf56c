"""Prompts are judged by what the frames show; the table tells rates, margins and chance."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from goku_mega.config.sampling import EvaluateConfig
from goku_mega.data.shapes import Scene, ShapeObject, plain_caption, prompts, render_clip
from goku_mega.errors import CheckpointError, ConfigError, DataError, MediaError, UserError
from goku_mega.evaluate.harness import Judged, format_table, rates, spread
from goku_mega.evaluate.shapes import chance, draws, evaluate_shapes, judge, read_questions, sheet
from goku_mega.media.decode import decode_image

MakeRun = Callable[..., Path]
GRID = (2, 4, 4)
SPLITS = ("seen", "held_out", "seen_two", "held_out_two")
RED_CIRCLE = Scene((ShapeObject("circle", "red", "left"),))


@pytest.fixture(scope="module", params=["one", "two", "mixed"])
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def write_prompts(path: Path, level: str = "mixed") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts(level)))
    return path


def settings(folder: Path, **changes: object) -> EvaluateConfig:
    values = {
        "checkpoint": str(folder / "run"), "prompts": str(folder / "prompts.jsonl"), "steps": 2, "height": 32,
        "width": 32, "frames": 5, "threads": 1, "max_prompts": 2, "batch_samples": 4,
    }  # fmt: skip
    return EvaluateConfig(**{**values, **changes})  # type: ignore[arg-type]


def shown_as_asked(folder: Path, level: str, count: int, frames: int = 9) -> list[Judged]:
    """Items with frames that the corpus's own renderer drew from their truth."""
    questions = read_questions(write_prompts(folder / "prompts.jsonl", level))
    items = draws(questions, settings(folder, max_prompts=count), GRID)
    scenes = {question.prompt: question.scene for question in questions}
    clips = [render_clip(scenes[item.prompt.text], seed=n, frames=frames, height=64, width=64)
             for n, item in enumerate(items)]  # fmt: skip
    return [Judged(item, clip, item.judge(clip)) for item, clip in zip(items, clips, strict=True)]


def test_frames_that_show_the_prompt_score_in_every_task(tmp_path: Path, level: str):
    found = rates(shown_as_asked(tmp_path, level, 8))
    one = {"shape", "color", "motion", "all", "n"}
    two = one | {"count", "two_objects", "position"}
    tasks = {"seen": one, "held_out": one} if level != "two" else {}
    tasks |= {"seen_two": two, "held_out_two": two} if level != "one" else {}
    assert {split: set(row) for split, row in found.items()} == tasks
    for row in found.values():
        assert row.pop("n") == 8
        assert min(row.values()) >= 7 / 8


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (ShapeObject("square", "red", "left"), {"shape", "all"}),
        (ShapeObject("circle", "blue", "left"), {"color", "all"}),
        (ShapeObject("circle", "red", "still"), {"motion", "all"}),
        (ShapeObject("triangle", "cyan", "right"), {"shape", "color", "motion", "all"}),
    ],
)
def test_a_mark_is_lost_for_exactly_what_the_frames_show_otherwise(shown: ShapeObject, wrong: set[str]):
    frames = render_clip(Scene((shown,)), seed=3, frames=9, height=64, width=64)
    assert {task for task, right in judge(RED_CIRCLE, frames).items() if not right} == wrong


def test_empty_frames_score_nothing_and_an_image_is_not_asked_for_motion():
    clip = render_clip(RED_CIRCLE, seed=0, frames=9, height=64, width=64)
    assert not any(judge(RED_CIRCLE, clip * 0 + 128).values())
    assert judge(RED_CIRCLE, clip[:1]) == {"shape": True, "color": True, "all": True}


def test_rates_are_shares_of_each_split(tmp_path: Path):
    questions = read_questions(write_prompts(tmp_path / "prompts.jsonl", "one"))
    items = draws(questions, settings(tmp_path, max_prompts=4), GRID)
    frames = render_clip(RED_CIRCLE, seed=0, frames=9, height=64, width=64)
    marks = [{"shape": item.split == "seen", "all": number % 4 == 0} for number, item in enumerate(items)]
    judged = [Judged(item, frames, scores) for item, scores in zip(items, marks, strict=True)]
    assert rates(judged) == {
        "seen": {"shape": 1.0, "all": 0.25, "n": 4},
        "held_out": {"shape": 0.0, "all": 0.25, "n": 4},
    }


def test_prompts_are_spread_evenly_and_repeats_get_seeds_of_their_own(tmp_path: Path):
    questions = read_questions(write_prompts(tmp_path / "prompts.jsonl", "mixed"))
    every = draws(questions, settings(tmp_path, max_prompts=0, samples_per_prompt=3, seed=50), GRID)
    assert len(every) == 3 * len(questions) == len({(item.prompt.text, item.prompt.seed) for item in every})
    assert {item.prompt.seed for item in every} == {50, 51, 52}

    few = draws(questions, settings(tmp_path, max_prompts=15), GRID)
    assert Counter(item.split for item in few) == dict.fromkeys(SPLITS, 15)


def test_few_prompts_stand_for_the_whole_list():
    for count in (1, 7, 60, 99):
        chosen = spread(range(100), count)
        assert [number * count // 100 for number in chosen] == pytest.approx(range(count), abs=1)
        assert len(set(chosen)) == count and chosen == spread(range(100), count)
    assert spread(range(3), 5) == spread(range(3), 0) == [0, 1, 2]
    # The list counts through shapes, colours and motions: a stride of five would see one motion only.
    objects = [row["truth"]["objects"][0] for row in spread(prompts("one"), 18)]
    assert [len({thing[name] for thing in objects}) for name in ("shape", "color", "motion")] == [3, 6, 5]


def test_chance_is_a_blind_guess_at_one_object():
    assert chance({"seen": {"shape": 1, "color": 1, "motion": 1, "all": 1, "n": 9}}) == {
        "shape": 1 / 3, "color": 1 / 6, "motion": 1 / 5, "all": pytest.approx(1 / 90),
    }  # fmt: skip
    assert chance({"seen": {"shape": 1, "color": 1, "all": 1, "n": 9}})["all"] == pytest.approx(1 / 18)
    assert chance({"seen_two": {"shape": 1, "all": 1, "n": 9}}) == {}


def test_the_table_shows_every_rate_with_a_margin():
    one, both = {"shape": 1.0, "all": 0.5, "n": 100}, {"shape": 0.25, "count": 0.0, "all": 0.0, "n": 4}
    table = format_table({"trained": {"seen": one, "seen_two": both}}, {"shape": 1 / 3})
    header, _, seen, two, guess = table.splitlines()
    assert header.split() == ["model", "prompts", "n", "shape", "count", "all"]
    assert seen.split() == ["trained", "seen", "100", "1.00", "±0.02", "0.50", "±0.10"]
    assert two.split()[:4] == ["trained", "seen_two", "4", "0.25"] and "0.00 ±0.24" in two
    assert guess.split() == ["chance", "0.33"]


def test_the_sheet_has_a_row_for_samples_of_every_split(tmp_path: Path):
    picture = sheet(shown_as_asked(tmp_path, "mixed", 8))
    assert picture.shape[0] >= 16 * 64 and picture.shape[1] >= 9 * 64


def test_a_whole_evaluation_of_a_model_that_learned_nothing(make_run: MakeRun, tmp_path: Path):
    write_prompts(tmp_path / "prompts.jsonl")
    table, picture = tmp_path / "out" / "scores.json", tmp_path / "out" / "sheet.png"
    config = settings(
        tmp_path, checkpoint=str(make_run()), samples_per_prompt=2, untrained=True, sheet=str(picture), table=str(table)
    )
    result = evaluate_shapes(config)

    assert list(result)[-1] == "table" and result["checkpoint_step"] == 7
    for model in ("trained", "untrained"):
        assert {split: row["n"] for split, row in result["scores"][model].items()} == dict.fromkeys(SPLITS, 4)
        assert model in result["table"]
    written = json.loads(table.read_text())
    assert {name: written[name] for name in result} == result
    for model, samples in written["samples"].items():
        assert len(samples) == 16
        right = sum(one["scores"]["color"] for one in samples if one["split"] == "seen")
        assert result["scores"][model]["seen"]["color"] == right / 4
    assert decode_image(picture).shape[2] >= 5 * 32
    again = evaluate_shapes(config)
    assert again["scores"] == result["scores"]


def refusal(error: type[UserError], config: EvaluateConfig, folder: Path) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(error) as caught:
        evaluate_shapes(config)
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


def test_wrong_input_is_refused_before_a_checkpoint_is_looked_for(tmp_path: Path):
    assert "prompts.jsonl" in refusal(DataError, settings(tmp_path), tmp_path)
    path = write_prompts(tmp_path / "prompts.jsonl")
    assert "sheet.jpg" in refusal(ConfigError, settings(tmp_path, sheet=str(tmp_path / "sheet.jpg")), tmp_path)
    assert "folder" in refusal(MediaError, settings(tmp_path, table=str(tmp_path)), tmp_path)
    assert "40" in refusal(UserError, settings(tmp_path, height=40), tmp_path)
    assert "8" in refusal(UserError, settings(tmp_path, frames=8), tmp_path)
    assert "no checkpoint" in refusal(CheckpointError, settings(tmp_path), tmp_path)
    for content in ("", "{}", '{"prompt": "a', '{"prompt": "a", "split": "seen", "truth": {"objects": [{"x": 1}]}}'):
        path.write_text(content)
        assert "prompts.jsonl" in refusal(DataError, settings(tmp_path), tmp_path)


def test_the_prompts_say_what_their_truth_says(tmp_path: Path):
    for question in read_questions(write_prompts(tmp_path / "prompts.jsonl")):
        assert question.prompt == plain_caption(question.scene)
