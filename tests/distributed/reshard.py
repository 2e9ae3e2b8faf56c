"""The resharding table: every layout loads what every layout has saved, each number of every tensor as it was.

    python tests/distributed/reshard.py            # a subset with each axis and their mixes
    python tests/distributed/reshard.py --all      # every layout of the parity table
    python tests/distributed/reshard.py --all --write docs/reshard.md

In each layout the real model, its average and its optimizer are filled with values that follow from their names, and
saved. Then each layout loads every checkpoint over NaNs, and compares each box bitwise. Layouts that give every rank
the same boxes have written the same files, which is checked; one of them loads for all.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parity import SHAPE, Cell, every_cell, run_of

from launch import run_ranks

OPTIMIZERS = ("adamw", "muon")
STEP = 7


@dataclass(frozen=True)
class Kind:
    """Layouts that differ in nothing that a checkpoint could see."""

    cells: tuple[Cell, ...]
    """All of them; the first one saves and loads for the others."""
    checkpoints: Mapping[str, str]
    """Optimizer -> the folder that it has saved into."""

    @property
    def processes(self) -> int:
        return self.cells[0].processes


@dataclass(frozen=True)
class Loaded:
    """What the layouts of one kind have loaded."""

    kind: Kind
    checkpoints: int
    tensors: int
    """Boxes compared, over all ranks and checkpoints."""
    wrong: tuple[str, ...]
    """Those that differ."""


def layouts() -> list[Cell]:
    """Every layout of the parity table; recomputation keeps nothing that could be saved."""
    return [cell for cell in (Cell(), *every_cell()) if cell.recompute == "off"]


def subset() -> list[Cell]:
    """Each axis by itself, and mixes of them."""
    return [
        Cell(), Cell(tp="2"), Cell(cp="2 ulysses"), Cell(pp="2"), Cell(pp="2 interleaved"), Cell(replicate=2),
        Cell(shard=2, replicate=2), Cell(tp="2", pp="2"),
    ]  # fmt: skip


def states(cell: Cell, dtype: str = "float32") -> dict[str, Any]:
    """This rank's boxes of everything that training would save, by optimizer."""
    import torch
    import torch.distributed as dist

    from goku_mega.parallel.groups import build_groups, initialise_distributed
    from goku_mega.parallel.layout import resolve
    from goku_mega.parallel.parallelize import build_model
    from goku_mega.train.loop import Trainer

    run, stored = run_of(cell, Path("unused")), getattr(torch, dtype)
    groups = build_groups(resolve(run.layout, dist.get_world_size(), SHAPE), initialise_distributed(1))
    model = build_model(SHAPE, groups, seed=run.seed, dtype=stored)
    runs = {name: replace(run, optimizer=replace(run.optimizer, name=name)) for name in OPTIMIZERS}
    return {name: Trainer(model, groups, with_it, stored).state for name, with_it in runs.items()}


def values(state: Any, dtype: str = "float32") -> dict[tuple[str, str], Any]:
    """(part, name) -> this rank's box of a tensor that follows from the two names, and from no layout."""
    import torch

    from goku_mega.seeding import derive_seed

    expected = {}
    for part, shards in state.items():
        for name, shard in shards.items():
            generator = torch.Generator().manual_seed(derive_seed("reshard", part, name))
            whole = torch.randn(shard.global_shape, generator=generator, dtype=torch.float32)
            expected[part, name] = shard.take(whole.to(getattr(torch, dtype))).clone()
    return expected


def fill(state: Any, value: Any) -> None:
    """Set every number of every box: to what `value` has for it, or to one number."""
    for part, shards in state.items():
        for name, shard in shards.items():
            shard.tensor.detach().copy_(value[part, name]) if isinstance(value, dict) else shard.tensor.fill_(value)


def differences(state: Any, expected: Mapping[tuple[str, str], Any]) -> list[str]:
    """The boxes that are not, bit for bit, what they should be."""
    import torch

    return [
        f"{part}/{name}"
        for part, shards in state.items()
        for name, shard in shards.items()
        if not torch.equal(shard.tensor.detach(), expected[part, name])
    ]


def save(rank: int, cell: Cell, folder: str) -> str:
    """Save with each optimizer; what tells this rank's boxes from any others."""
    from goku_mega.checkpoint.save import save_checkpoint
    from goku_mega.checkpoint.state import box_of

    boxes = []
    for optimizer, state in states(cell).items():
        fill(state, values(state))
        save_checkpoint(f"{folder}/{optimizer}", STEP, state, {"layout": str(cell)}, keep=1)
        boxes += [(part, box_of(name, shard)) for part, shards in state.items() for name, shard in shards.items()]
    return hashlib.sha256(repr(boxes).encode()).hexdigest()


def load(
    rank: int, cell: Cell, checkpoints: Sequence[Mapping[str, str]], dtype: str = "float32"
) -> tuple[int, list[str]]:
    """Load each of the checkpoints, by optimizer; how many boxes were compared, and those that are wrong."""
    from goku_mega.checkpoint.load import load_into

    compared, wrong = 0, []
    for optimizer, state in states(cell, dtype).items():
        expected = values(state, dtype)
        for checkpoint in checkpoints:
            fill(state, float("nan"))
            load_into(checkpoint[optimizer], state)
            wrong += [f"{checkpoint[optimizer]} in {cell}: {n} of rank {rank}" for n in differences(state, expected)]
            compared += len(expected)
    return compared, wrong


def save_all(cells: Sequence[Cell], folder: Path) -> list[Kind]:
    """Have every layout save; the kinds of layouts there are.

    Raises:
        AssertionError: layouts with the same boxes have written different files.
    """
    kinds: dict[tuple[str, ...], list[Cell]] = {}
    places: dict[Cell, Path] = {}
    for number, cell in enumerate(cells):
        places[cell] = folder / f"layout-{number}"
        prints = tuple(run_ranks(save, cell.processes, cell, str(places[cell]), timeout_s=300))
        alike = kinds.setdefault(prints, [])
        alike.append(cell)
        for optimizer in OPTIMIZERS:
            files, first = (_files(places[one] / optimizer) for one in (cell, alike[0]))
            assert files == first, f"{cell} and {alike[0]} have the same boxes and saved different files"
        print(f"saved {number + 1}/{len(cells)}, {len(kinds)} kinds: {cell}", file=sys.stderr, flush=True)
    return [
        Kind(tuple(alike), {name: str(places[alike[0]] / name / f"step_{STEP:08d}") for name in OPTIMIZERS})
        for alike in kinds.values()
    ]


def load_all(kinds: Sequence[Kind]) -> Iterator[Loaded]:
    """Have every kind load what every kind has saved, as it is known."""
    checkpoints = [kind.checkpoints for kind in kinds]
    for kind in kinds:
        found = run_ranks(load, kind.processes, kind.cells[0], checkpoints, timeout_s=900)
        wrong = tuple(name for _, names in found for name in names)
        yield Loaded(kind, len(OPTIMIZERS) * len(kinds), sum(compared for compared, _ in found), wrong)


def _files(folder: Path) -> dict[str, Any]:
    """The ranks' files by their checksums."""
    manifest = json.loads((folder / f"step_{STEP:08d}" / "manifest.json").read_text())
    return {name: record for name, record in manifest["files"].items() if name.endswith(".distcp")}


def table(found: Sequence[Loaded]) -> str:
    """Markdown, one line a kind."""
    head = ["tp", "cp", "pp", "shard", "replicate", "processes", "other layouts with the same boxes",
            "checkpoints loaded", "boxes compared", "boxes that differ"]  # fmt: skip
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for loaded in found:
        cell, *others = loaded.kind.cells
        lines.append(
            " | ".join(
                map(str, (cell.tp, cell.cp, cell.pp, cell.shard, cell.replicate, cell.processes,
                          "; ".join(_named(other) for other in others) or "none",
                          loaded.checkpoints, loaded.tensors, len(loaded.wrong)))
            )
        )  # fmt: skip
    return "\n".join(f"| {line} |" for line in lines)


def _named(cell: Cell) -> str:
    """Only what is not 1."""
    chosen = {name: value for name, value in vars(cell).items() if name != "recompute" and str(value) != "1"}
    return " ".join(f"{name}={value}" for name, value in chosen.items()) or "one process"


def page(found: Sequence[Loaded]) -> str:
    count = sum(len(loaded.kind.cells) for loaded in found)
    return f"""# Resharding: any layout loads what any other has saved

Model, average and optimizer (AdamW, and Muon) of the parity table's model, in fp32, filled with values that follow
from the names of the tensors, saved over gloo in each of its {count} layouts, and loaded over NaNs in each of them:
all {count} x {count} pairs with each optimizer, every box of every rank compared bitwise. Layouts in one line give
every rank the same boxes and have written the same files, which is checked; one of them loads for all. `pp=2` splits
the four layers 3 + 1. Written by `python tests/distributed/reshard.py --all --write docs/reshard.md`.

{table(found)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="load in every layout what every layout has saved")
    parser.add_argument("--all", action="store_true", help="every layout instead of a subset")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as a page of the docs")
    options = parser.parse_args()
    began = time.monotonic()
    found: list[Loaded] = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = save_all(layouts() if options.all else subset(), Path(folder))
        for loaded in load_all(kinds):
            found.append(loaded)
            print(f"{len(found)}/{len(kinds)} {loaded.kind.cells[0]}: {len(loaded.wrong)} of {loaded.tensors} differ",
                  flush=True)  # fmt: skip
    count = sum(len(kind.cells) for kind in kinds)
    wrong = [name for loaded in found for name in loaded.wrong]
    if options.write:
        options.write.write_text(page(found))
    summary = {"layouts": count, "kinds": len(kinds), "pairs": len(OPTIMIZERS) * count**2,
               "loads": sum(loaded.checkpoints for loaded in found), "boxes": sum(loaded.tensors for loaded in found),
               "wrong": wrong[:10], "minutes": round((time.monotonic() - began) / 60, 1)}  # fmt: skip
    print(json.dumps(summary))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
