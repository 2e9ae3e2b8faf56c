"""Prompts to samples to scores to a table; what a score is, the benchmark's own file says."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.sample.sampler import Drawing, Pipeline, Prompt

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]
Scores = dict[str, bool]


@dataclass(frozen=True)
class Item:
    """One sample to draw and judge."""

    prompt: Prompt
    split: str
    judge: Callable[[Frames], Scores]


@dataclass(frozen=True)
class Judged:
    """A drawn sample with its marks."""

    item: Item
    frames: Frames
    scores: Scores


def draw_and_judge(pipeline: Pipeline, items: Sequence[Item], drawing: Drawing, batch_samples: int) -> list[Judged]:
    """Sample every item, some at a time, and judge it."""
    judged: list[Judged] = []
    began = time.monotonic()
    for batch in _batches(items, batch_samples):
        clips = pipeline.frames([item.prompt for item in batch], drawing)
        judged += [Judged(item, clip, item.judge(clip)) for item, clip in zip(batch, clips, strict=True)]
        logger.info("judged %d of %d samples, %.0f s", len(judged), len(items), time.monotonic() - began)
    return judged


def rates(judged: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """Share of right marks by split and task, with the number of samples as `n`."""
    table: dict[str, dict[str, float]] = {}
    for split in dict.fromkeys(one.item.split for one in judged):
        marks = [one.scores for one in judged if one.item.split == split]
        tasks = dict.fromkeys(task for scores in marks for task in scores)
        table[split] = {
            task: float(np.mean([scores[task] for scores in marks if task in scores])) for task in tasks
        } | {"n": len(marks)}
    return table


def format_table(models: dict[str, dict[str, dict[str, float]]], chance: dict[str, float]) -> str:
    """Models and splits down, tasks across; each rate with its 95% margin."""
    tasks = list(dict.fromkeys(t for splits in models.values() for row in splits.values() for t in row if t != "n"))
    rows = [["model", "prompts", "n", *tasks]]
    for model, splits in models.items():
        for split, row in splits.items():
            n = int(row["n"])
            cells = [f"{row[task]:.2f} ±{_margin(row[task], n):.2f}" if task in row else "" for task in tasks]
            rows.append([model, split, str(n), *cells])
    rows.append(["chance", "", "", *(f"{chance[task]:.2f}" if task in chance else "" for task in tasks)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_table(path: Path, result: dict[str, Any]) -> None:
    """The whole result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def spread(things: Sequence[Any], count: int) -> list[Any]:
    """`count` of the things, evenly over their order; all of them for 0."""
    if not count or count >= len(things):
        return list(things)
    return [things[(2 * number + 1) * len(things) // (2 * count)] for number in range(count)]


def _margin(rate: float, n: int) -> float:
    """Half of the Wilson 95% interval: it does not vanish at rates of 0 and 1."""
    z = 1.96
    return z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
