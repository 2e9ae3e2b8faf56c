"""The resharding table's subset; `reshard.py --all` fills the whole table."""

import json
from pathlib import Path

import pytest
import reshard
import torch
from parity import CHOICES, Cell
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from goku_mega.checkpoint.save import save_checkpoint
from launch import run_ranks

pytestmark = pytest.mark.slow

ONE_PROCESS = Cell()
MIXED = Cell(tp="2", pp="2")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[reshard.Kind]:
    """What every layout of the subset has saved."""
    return reshard.save_all(reshard.subset(), tmp_path_factory.mktemp("saved"))


def saved_by(kinds: list[reshard.Kind], cell: Cell) -> reshard.Kind:
    return next(kind for kind in kinds if cell in kind.cells)


def test_every_layout_loads_what_every_other_has_saved(kinds: list[reshard.Kind]) -> None:
    found = list(reshard.load_all(kinds))
    assert [name for loaded in found for name in loaded.wrong] == []
    assert sum(loaded.checkpoints for loaded in found) == len(reshard.OPTIMIZERS) * len(kinds) ** 2


def test_the_subset_has_every_axis_and_mixes() -> None:
    chosen = reshard.subset()
    axes = {axis: {getattr(cell, axis) for cell in chosen} for axis in CHOICES}
    assert all(len(values) > 1 for axis, values in axes.items() if axis != "recompute")
    assert axes["pp"] == set(CHOICES["pp"])
    assert sum(sum(str(value) not in ("1", "off") for value in vars(cell).values()) > 1 for cell in chosen) >= 2
    assert set(chosen) <= set(reshard.layouts())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_boxes_of_another_dtype_take_the_nearest_values(kinds: list[reshard.Kind], dtype: str) -> None:
    checkpoints = [saved_by(kinds, MIXED).checkpoints]
    for compared, wrong in run_ranks(reshard.load, 2, Cell(shard=2), checkpoints, dtype):
        assert compared > 0
        assert wrong == []


def test_the_table_would_show_two_rows_that_changed_places(tmp_path: Path) -> None:
    run_ranks(save_with_rows_exchanged, 2, str(tmp_path))
    checkpoint = {name: str(tmp_path / name / f"step_{reshard.STEP:08d}") for name in reshard.OPTIMIZERS}
    [(compared, wrong)] = run_ranks(reshard.load, 1, ONE_PROCESS, [checkpoint])
    assert compared > len(wrong) == len(reshard.OPTIMIZERS)
    assert all(f"ema/{EXCHANGED} of rank 0" in name for name in wrong)


EXCHANGED = "blocks.1.mlp.linear_fc1.weight"


def save_with_rows_exchanged(rank: int, folder: str) -> None:
    for optimizer, state in reshard.states(Cell(shard=2)).items():
        reshard.fill(state, reshard.values(state))
        if rank == 1:
            rows = state["ema"][EXCHANGED].tensor
            rows[:2] = rows[:2].flip(0)
        save_checkpoint(f"{folder}/{optimizer}", reshard.STEP, state, {}, keep=1)


@pytest.mark.parametrize("cell", [ONE_PROCESS, MIXED, Cell(shard=2, replicate=2)], ids=str)
def test_torchs_own_tool_reads_the_whole_of_it(kinds: list[reshard.Kind], cell: Cell, tmp_path: Path) -> None:
    for optimizer, checkpoint in saved_by(kinds, cell).checkpoints.items():
        dcp_to_torch_save(checkpoint, tmp_path / "all.pt")
        everything = torch.load(tmp_path / "all.pt")
        one_process = json.loads((Path(checkpoint) / "info.json").read_text())
        assert one_process["layout"] == str(cell)
        expected = run_ranks(whole_values, 1, optimizer)[0]
        assert set(everything) == set(expected)
        assert [name for name in expected if not torch.equal(everything[name], expected[name])] == []


def whole_values(rank: int, optimizer: str) -> dict[str, torch.Tensor]:
    """Every whole tensor by the name it is stored under."""
    from goku_mega.checkpoint.state import stored_under

    whole = reshard.values(reshard.states(ONE_PROCESS)[optimizer])
    return {f"{stored_under(part)}/{name}": tensor for (part, name), tensor in whole.items()}
