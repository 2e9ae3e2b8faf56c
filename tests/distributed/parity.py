"""The parity table: every product of parallel axes trains as one process does, from the start and after a resume.

    python tests/distributed/parity.py            # a covering subset: every pair of choices in some cell
    python tests/distributed/parity.py --all      # every cell that fits 8 processes
    python tests/distributed/parity.py --all --write docs/parity.md

A cell takes three steps from the initial weights and saves; then it loads what the cell before it has saved, in
another layout, and takes three more. Losses and gradient norms of all six are compared with those of one process,
in fp64.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from goku_mega.config.training import DataConfig, FlowRun, LayoutConfig, OptimizerConfig, RecomputeConfig
from goku_mega.data.shards import NULL_TEXT, EncodedSample, write_index, write_shard
from goku_mega.model.sizes import ModelShape
from launch import run_ranks

MOST_PROCESSES = 8
STEPS = 6
SAVED_AFTER = 3
TOLERANCE = 1e-9
SHAPE = ModelShape(layers=4, hidden_size=64, ffn_hidden_size=128, heads=8, text_width=64)
TENSOR: dict[str, dict[str, Any]] = {"1": {}, "2": {"tp": 2}, "2 without sp": {"tp": 2, "sequence_parallel": False}}
CONTEXT = {
    "1": (1, 1),
    "2 ulysses": (2, 1),
    "2 ring": (2, 2),
    "4 ulysses": (4, 1),
    "4 ring": (4, 4),
    "4 hybrid": (4, 2),
}
"""Name -> (cp, cp_ring)."""
PIPELINE: dict[str, dict[str, Any]] = {
    "1": {},
    "2": {"pp": 2, "pp_layers": (3, 1)},
    "2 interleaved": {"pp": 2, "pp_chunks": 2},
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "tp": tuple(TENSOR),
    "cp": tuple(CONTEXT),
    "pp": tuple(PIPELINE),
    "shard": (1, 2),
    "replicate": (1, 2),
    "recompute": ("off", "selective", "full"),
}


@dataclass(frozen=True)
class Cell:
    """One choice of every axis."""

    tp: str = "1"
    cp: str = "1"
    pp: str = "1"
    shard: int = 1
    replicate: int = 1
    recompute: str = "off"

    @property
    def processes(self) -> int:
        layout = self.layout
        return layout.tp * layout.cp * layout.pp * layout.dp_shard * layout.dp_replicate

    @property
    def layout(self) -> LayoutConfig:
        cp, ring = CONTEXT[self.cp]
        return LayoutConfig(
            cp=cp, cp_ring=ring, dp_shard=self.shard, dp_replicate=self.replicate,
            **TENSOR[self.tp], **PIPELINE[self.pp],
        )  # fmt: skip

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items())


@dataclass(frozen=True)
class Difference:
    """The largest relative difference from one process in a cell."""

    loss: float
    gradient_norm: float
    resumed_loss: float
    resumed_gradient_norm: float

    @property
    def largest(self) -> float:
        return max(vars(self).values())


def every_cell() -> list[Cell]:
    """All cells that fit `MOST_PROCESSES`, but for the one that all are compared with."""
    cells = [Cell(*choice) for choice in itertools.product(*CHOICES.values())]
    return [cell for cell in cells if cell.processes <= MOST_PROCESSES and cell != Cell()]


def covering_subset() -> list[Cell]:
    """Few cells in which every pair of choices that fits is met."""
    return _cover(lambda cell: set(itertools.combinations(vars(cell).items(), 2)))


def smallest_subset() -> list[Cell]:
    """Fewer cells, in which every choice is met, and every pair of axes that both divide or change the work."""

    def met(cell: Cell) -> set[Any]:
        at_work = [axis for axis, value in vars(cell).items() if value != CHOICES[axis][0]]
        return {*vars(cell).items(), *itertools.combinations(at_work, 2)}

    return _cover(met)


def _cover(met: Callable[[Cell], set[Any]]) -> list[Cell]:
    """Cells that together meet all that any cell meets; the one that meets most of what is missing first."""
    cells = every_cell()
    missing = set().union(*map(met, cells))
    chosen: list[Cell] = []
    while missing:
        best = max(cells, key=lambda cell: (len(met(cell) & missing), -cell.processes))
        chosen.append(best)
        missing -= met(best)
    return chosen


def write_dataset(folder: Path) -> None:
    """Images and videos of six shapes, whose token counts do not divide evenly."""
    rng = np.random.default_rng(0)
    shapes = itertools.cycle([(1, 8, 8), (3, 8, 8), (2, 6, 10), (1, 2, 2), (3, 6, 6), (1, 10, 6)])
    samples = [
        EncodedSample(
            f"sample-{number:03d}",
            rng.standard_normal((16, *shape)).astype(np.float32),
            rng.standard_normal((3 + number % 5, 64)).astype(np.float32),
            {"caption": ""},
        )
        for number, shape in zip(range(36), shapes, strict=False)
    ]
    write_index(folder / "index.parquet", write_shard(folder / "shards" / "00000.tar", samples))
    np.save(folder / NULL_TEXT, rng.standard_normal((1, 64)).astype(np.float32))
    (folder / "dataset.json").write_text('{"latent_channels": 16, "text_width": 64, "text": "none", "vae": "none"}')


def run_of(cell: Cell, dataset: Path) -> FlowRun:
    return FlowRun(
        run_dir="unused",
        steps=STEPS,
        seed=5,
        precision="fp64",
        layout=cell.layout,
        recompute=RecomputeConfig(policy=cell.recompute),
        # The cap makes two micro-batches a rank of most batches.
        data=DataConfig(path=str(dataset), samples_per_step=9, max_tokens_per_rank=150, prefetch_steps=1),
        # A rate that moves the weights away from their initial zeros within the steps.
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, clip_grad_norm=0.5),
    )


def train_and_resume(rank: int, run: FlowRun, save_to: str, resume_from: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step; the later ones from the checkpoint in `resume_from`, if it is given."""
    import torch
    import torch.distributed as dist

    from goku_mega.checkpoint.load import fill, load_newest
    from goku_mega.checkpoint.save import save_checkpoint
    from goku_mega.data.loader import Loader
    from goku_mega.data.shards import load_index
    from goku_mega.parallel.groups import build_groups, initialise_distributed
    from goku_mega.parallel.layout import resolve
    from goku_mega.parallel.parallelize import build_model
    from goku_mega.train.loop import Trainer

    groups = build_groups(resolve(run.layout, dist.get_world_size(), SHAPE), initialise_distributed(1))

    def trainer() -> Trainer:
        model = build_model(SHAPE, groups, seed=run.seed, dtype=torch.float64, recompute=run.recompute)
        return Trainer(model, groups, run, torch.float64)

    index, training, figures = load_index(Path(run.data.path)), trainer(), []
    with Loader(index, run, SHAPE, groups=groups, start_step=0, dtype=torch.float64) as loader:
        for batch in loader:
            if batch.step == SAVED_AFTER:
                save_checkpoint(Path(save_to), SAVED_AFTER, training.state, {"step": SAVED_AFTER}, keep=1)
                if resume_from:
                    training = trainer()
                    assert load_newest(resume_from, partial(fill, state=training.state)) is not None
                    training.optimizer.resume_at(SAVED_AFTER)
            figures.append(training.step(batch)[:2])
    return figures


def measure(cells: list[Cell], folder: Path) -> Iterator[tuple[Cell, Difference]]:
    """Every cell's difference from one process, as it is known. Raises RankFailed where a rank does."""
    write_dataset(folder)
    previous = folder / "one-process"
    alone = np.array(run_ranks(train_and_resume, 1, run_of(Cell(), folder), str(previous), "")[0])
    for number, cell in enumerate(cells):
        saved = folder / f"cell-{number}"
        found = run_ranks(
            train_and_resume, cell.processes, run_of(cell, folder), str(saved), str(previous), timeout_s=300
        )
        # Every rank reports the global figures.
        apart = np.max([np.abs(np.array(figures) / alone - 1) for figures in found], axis=0)
        yield cell, Difference(*apart[:SAVED_AFTER].max(axis=0).tolist(), *apart[SAVED_AFTER:].max(axis=0).tolist())
        previous = saved


def table(found: list[tuple[Cell, Difference]]) -> str:
    """Markdown, one line a cell."""
    names = [*CHOICES, "processes", "loss", "gradient norm", "loss, resumed", "gradient norm, resumed"]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    for cell, difference in found:
        figures = (f"{value:.0e}" for value in vars(difference).values())
        lines.append(" | ".join([*map(str, vars(cell).values()), str(cell.processes), *figures]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="compare every product of parallel axes with one process")
    parser.add_argument("--all", action="store_true", help="every cell instead of a covering subset")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as a page of the docs")
    options = parser.parse_args()
    cells = every_cell() if options.all else covering_subset()
    found: list[tuple[Cell, Difference]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for cell, difference in measure(cells, Path(folder)):
            found.append((cell, difference))
            print(f"{len(found)}/{len(cells)} {cell}: {difference.largest:.1e}", flush=True)
    apart = [cell for cell, difference in found if not difference.largest <= TOLERANCE]
    if options.write:
        options.write.write_text(page(found))
    largest = max(difference.largest for _, difference in found)
    summary = {"cells": len(found), "apart": [str(cell) for cell in apart], "largest_difference": largest,
               "tolerance": TOLERANCE, "minutes": round((time.monotonic() - began) / 60, 1)}  # fmt: skip
    print(json.dumps(summary))
    return 1 if apart else 0


def page(found: list[tuple[Cell, Difference]]) -> str:
    return f"""# Parity: the layout never changes the run

Largest relative difference of loss and gradient norm from one process, in fp64, over {SAVED_AFTER} steps from the
initial weights and {STEPS - SAVED_AFTER} more from the checkpoint of the line above, which another layout has saved.
Every product of the axes that fits {MOST_PROCESSES} processes over gloo; micro-batches of varying lengths; `pp=2`
splits the four layers 3 + 1. Written by `python tests/distributed/parity.py --all --write docs/parity.md`.

{table(found)}
"""


if __name__ == "__main__":
    sys.exit(main())
