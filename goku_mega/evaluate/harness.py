"""Prompts to samples to scores to a table; what a score is, the benchmark's own file says."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from goku_mega.sample.sampler import Drawing, Pipeline, Prompt
from goku_mega.seeding import derive_seed

logger = logging.getLogger(__name__)

Thing = TypeVar("Thing")
Frames = NDArray[np.uint8]
Scores = dict[str, bool]
Rates = dict[str, dict[str, float]]
"""Share of right marks by split and task; the number of samples is the task `n`."""


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
    """Sample every item, `batch_samples` in a pack, and judge it."""
    judged: list[Judged] = []
    began = time.monotonic()
    for batch in _batches(items, batch_samples):
        clips = pipeline.frames([item.prompt for item in batch], drawing)
        judged += [Judged(item, clip, item.judge(clip)) for item, clip in zip(batch, clips, strict=True)]
        logger.info("judged %d of %d samples, %.0f s", len(judged), len(items), time.monotonic() - began)
    return judged


def rates(judged: Sequence[Judged]) -> Rates:
    """Share of right marks by split and task. All samples of a split are marked for the same tasks."""
    table: Rates = {}
    for split in dict.fromkeys(one.item.split for one in judged):
        marks = [one.scores for one in judged if one.item.split == split]
        shares = {task: sum(scores[task] for scores in marks) / len(marks) for task in marks[0]}
        table[split] = {**shares, "n": len(marks)}
    return table


def format_table(models: dict[str, Rates], chance: dict[str, float]) -> str:
    """Models and splits down, tasks across; each rate with its 95% margin, and what guessing would reach."""
    tasks = list(dict.fromkeys(task for splits in models.values() for row in splits.values() for task in row))
    tasks = [task for task in tasks if task not in ("all", "n")] + ["all"]
    rows = [["model", "prompts", "n", *tasks]]
    for model, splits in models.items():
        for split, row in splits.items():
            n = int(row["n"])
            cells = [f"{row[task]:.2f} ±{_margin(row[task], n):.2f}" if task in row else "" for task in tasks]
            rows.append([model, split, str(n), *cells])
    if chance:
        rows.append(["chance", "", "", *(f"{chance[task]:.2f}" if task in chance else "" for task in tasks)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def write_json(path: Path, result: dict[str, Any]) -> None:
    """The whole result, by a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def spread(things: Sequence[Thing], count: int) -> list[Thing]:
    """`count` of the things, one from each of as many equal parts of their order; all of them for 0.

    Which one of a part is drawn: equal strides would resonate with lists that count through colours and motions.
    """
    if not count or count >= len(things):
        return list(things)
    edges = [number * len(things) // count for number in range(count + 1)]
    return [things[start + derive_seed("spread", start, end) % (end - start)] for start, end in pairwise(edges)]


def _margin(rate: float, n: int) -> float:
    """Half of the Wilson 95% interval: it does not vanish at rates of 0 and 1."""
    z = 1.96
    return z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
