"""Does a sample show what its prompt says? Prompts of the corpus of shapes, judged by the exact detector.

In the manner of GenEval (arXiv 2310.11513): one mark a task, and all of them together. Prompts with
combinations that were never trained on are a split of their own.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from goku_mega.config import EvaluateConfig
from goku_mega.data.shape_detector import detect, score
from goku_mega.data.shapes import COLORS, MOTIONS, SHAPES, Scene
from goku_mega.encoders.vae import latent_shape
from goku_mega.errors import DataError
from goku_mega.evaluate.harness import (
    Frames,
    Item,
    Judged,
    Scores,
    draw_and_judge,
    format_table,
    rates,
    spread,
    write_table,
)
from goku_mega.media.write import contact_sheet, write_image
from goku_mega.sample.sampler import Drawing, Pipeline, Prompt

SHEET_ROWS = 16
CHANCE = {
    "shape": 1 / len(SHAPES),
    "color": 1 / len(COLORS),
    "motion": 1 / len(MOTIONS),
    "all": 1 / (len(SHAPES) * len(COLORS) * len(MOTIONS)),
}


def evaluate_shapes(config: EvaluateConfig) -> dict[str, Any]:
    """Sample the prompts with new seeds and score them; the rates by model, split and task, and a table.

    Raises:
        UserError: the prompts or the checkpoint cannot be used.
    """
    began = time.monotonic()
    torch.set_num_threads(config.threads)
    items = read_prompts(config)
    drawing = Drawing(config.steps, config.guidance, config.solver)
    pipelines: dict[str, Callable[[], Pipeline]] = {"trained": _loader(config, untrained=False)}
    if config.untrained:
        pipelines["untrained"] = _loader(config, untrained=True)
    scores = {}
    step = 0
    for model, load in pipelines.items():
        pipeline = load()
        step = max(step, pipeline.step)
        judged = draw_and_judge(pipeline, items, drawing, config.batch_samples)
        scores[model] = rates(judged)
        if model == "trained" and config.sheet:
            write_image(Path(config.sheet), sheet(judged))
    result = {
        "checkpoint_step": step,
        "scores": scores,
        "seconds": round(time.monotonic() - began, 1),
        "table": format_table(scores, CHANCE),
    }
    if config.table:
        write_table(Path(config.table), result)
    return result


def read_prompts(config: EvaluateConfig) -> list[Item]:
    """The prompts of prompts.jsonl, each `samples_per_prompt` times with seeds of its own.

    Raises:
        DataError: the file is missing or not what `goku-mega corpus shapes` writes.
    """
    path = Path(config.prompts)
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        splits = {split: [row for row in rows if row["split"] == split] for split in ("seen", "held_out")}
        chosen = [row for split in splits.values() for row in spread(split, config.max_prompts)]
        scenes = [(row, Scene.from_json(row["truth"])) for row in chosen]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); `goku-mega corpus shapes` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a prompts file of `goku-mega corpus shapes` ({error})") from error
    grid = latent_shape(config.frames, config.height, config.width)
    return [
        Item(Prompt(row["prompt"], config.seed + number, grid), row["split"], partial(judge, scene))
        for row, scene in scenes
        for number in range(config.samples_per_prompt)
    ]


def judge(scene: Scene, frames: Frames) -> Scores:
    """The marks of one sample."""
    return score(scene, detect(frames), is_video=len(frames) > 1)


def sheet(judged: list[Judged]) -> Frames:
    """A contact sheet of some samples of every split, with what the detector found wrong."""
    splits = dict.fromkeys(one.item.split for one in judged)
    rows = []
    for split in splits:
        for one in spread([one for one in judged if one.item.split == split], SHEET_ROWS // len(splits)):
            wrong = [task for task, right in one.scores.items() if not right and task != "all"]
            mark = f"wrong: {', '.join(wrong)}" if wrong else "right"
            rows.append((f"{one.item.prompt.text} [{split.replace('_', ' ')}] {mark}", one.frames))
    return contact_sheet(rows)


def _loader(config: EvaluateConfig, *, untrained: bool) -> Callable[[], Pipeline]:
    return partial(
        Pipeline.from_checkpoint, Path(config.checkpoint), weights=config.weights, untrained=untrained
    )
