"""Does a sample show what its prompt says? Prompts of the corpus of shapes, judged by the exact detector.

In the manner of GenEval (arXiv 2310.11513): one mark a task, and all of them together. Prompts with
combinations that were never trained on are a split of their own.
"""

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from goku_mega.config.sampling import EvaluateConfig
from goku_mega.data.shape_detector import detect, score
from goku_mega.data.shapes import COLORS, MOTIONS, SHAPES, Scene
from goku_mega.encoders.vae import latent_shape
from goku_mega.errors import ConfigError, DataError
from goku_mega.evaluate.harness import (
    Frames,
    Item,
    Judged,
    Rates,
    Scores,
    draw_and_judge,
    format_table,
    rates,
    spread,
    write_json,
)
from goku_mega.media.write import contact_sheet, write_image
from goku_mega.sample.sampler import Drawing, Pipeline, Prompt, check_place

SHEET_ROWS = 16
GUESS = {"shape": 1 / len(SHAPES), "color": 1 / len(COLORS), "motion": 1 / len(MOTIONS)}
"""What a blind guess at one object's tasks reaches."""


class Question(NamedTuple):
    """A line of prompts.jsonl."""

    prompt: str
    split: str
    """seen or held_out; of scenes with two objects, seen_two or held_out_two."""
    scene: Scene


def evaluate_shapes(config: EvaluateConfig) -> dict[str, Any]:
    """Sample the prompts with new seeds and score them.

    Returns:
        `scores`, the rates by model (trained, untrained), split and task with the number of samples `n`,
        and a `table` of them to read. The file `config.table` also has the marks of every sample.

    Raises:
        UserError: the sizes, the prompts, the outputs or the checkpoint cannot be used; nothing is written then.
    """
    began = time.monotonic()
    _check_outputs(config)
    grid = latent_shape(config.frames, config.height, config.width)
    items = draws(read_questions(Path(config.prompts)), config, grid)
    torch.set_num_threads(config.threads)
    drawing = Drawing(config.steps, config.guidance, config.solver)
    trained = Pipeline.from_checkpoint(Path(config.checkpoint), weights=config.weights)
    judged = {"trained": draw_and_judge(trained, items, drawing, config.batch_samples)}
    if config.untrained:
        fresh = Pipeline.from_checkpoint(Path(config.checkpoint), weights=config.weights, untrained=True)
        judged["untrained"] = draw_and_judge(fresh, items, drawing, config.batch_samples)
    scores = {model: rates(samples) for model, samples in judged.items()}
    result = {
        "checkpoint_step": trained.step,
        "seconds": round(time.monotonic() - began, 1),
        "scores": scores,
        "table": format_table(scores, chance(scores["trained"])),
    }
    if config.sheet:
        write_image(Path(config.sheet), sheet(judged["trained"]))
    if config.table:
        samples = {model: [_marks(one) for one in samples] for model, samples in judged.items()}
        write_json(Path(config.table), {**result, "samples": samples})
    return result


def read_questions(path: Path) -> list[Question]:
    """The lines of prompts.jsonl.

    Raises:
        DataError: the file is missing or not what `goku-mega corpus shapes` writes.
    """
    try:
        questions = [_question(json.loads(line)) for line in path.read_text().splitlines()]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); `goku-mega corpus shapes` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a prompts file of `goku-mega corpus shapes` ({error!r})") from error
    if not questions:
        raise DataError(f"{path} is empty; `goku-mega corpus shapes` writes it")
    return questions


def draws(questions: list[Question], config: EvaluateConfig, grid: tuple[int, int, int]) -> list[Item]:
    """`max_prompts` questions of every split, each `samples_per_prompt` times with seeds of its own.

    Args:
        grid: (t, h, w) of the latents to draw.
    """
    splits = sorted({question.split for question in questions}, key=lambda split: (_is_two(split), "held_out" in split))
    chosen = [
        question
        for split in splits
        for question in spread([question for question in questions if question.split == split], config.max_prompts)
    ]
    return [
        Item(Prompt(question.prompt, config.seed + number, grid), question.split, partial(judge, question.scene))
        for question in chosen
        for number in range(config.samples_per_prompt)
    ]


def judge(scene: Scene, frames: Frames) -> Scores:
    """The marks of one sample, a clip or (one frame) an image."""
    return score(scene, detect(frames), is_video=len(frames) > 1)


def chance(found: Rates) -> dict[str, float]:
    """What guessing reaches in the tasks that prompts of one object were marked for."""
    tasks = next((row for split, row in found.items() if not _is_two(split)), {})
    guesses = {task: rate for task, rate in GUESS.items() if task in tasks}
    return {**guesses, "all": math.prod(guesses.values())} if guesses else {}


def sheet(judged: list[Judged]) -> Frames:
    """A contact sheet of some samples of every split, with what the detector found wrong."""
    splits = dict.fromkeys(one.item.split for one in judged)
    rows = []
    for split in splits:
        for one in spread([one for one in judged if one.item.split == split], max(1, SHEET_ROWS // len(splits))):
            wrong = [task for task, right in one.scores.items() if not right and task != "all"]
            mark = f"wrong: {', '.join(wrong)}" if wrong else "right"
            rows.append((f"{one.item.prompt.text} [{split.replace('_', ' ')}] {mark}", one.frames))
    return contact_sheet(rows)


def _question(row: dict[str, Any]) -> Question:
    scene = Scene.from_json(row["truth"])
    return Question(row["prompt"], row["split"] if scene.level == "one" else f"{row['split']}_two", scene)


def _is_two(split: str) -> bool:
    return split.endswith("_two")


def _marks(one: Judged) -> dict[str, Any]:
    prompt = one.item.prompt
    return {"prompt": prompt.text, "seed": prompt.seed, "split": one.item.split, "scores": one.scores}


def _check_outputs(config: EvaluateConfig) -> None:
    if config.sheet and Path(config.sheet).suffix != ".png":
        raise ConfigError(f"sheet is {config.sheet!r}; give a file that ends in .png")
    for output in filter(None, (config.sheet, config.table)):
        check_place(Path(output))
