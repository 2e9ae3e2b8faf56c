"""The parity table's smallest subset. `GOKU_ALL_LAYOUTS=1` takes the subset with every pair of choices, which needs
minutes: eight processes a cell. `parity.py --all` fills the whole table.
"""

import itertools
import os
from dataclasses import replace

import numpy as np
import parity
import pytest
import torch

from launch import run_ranks

CELLS = parity.covering_subset() if os.environ.get("GOKU_ALL_LAYOUTS") else parity.smallest_subset()

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # up to eight processes at a time, beside other tests


def test_every_pair_of_axes_trains_and_resumes_as_one_process_does(tmp_path):
    apart = {
        str(cell): difference
        for cell, difference in parity.measure(CELLS, tmp_path)
        if not difference.largest <= parity.TOLERANCE
    }
    assert not apart


@pytest.mark.parametrize("subset", [parity.smallest_subset, parity.covering_subset])
def test_the_subsets_cover_every_choice_and_every_pair_of_axes(subset):
    chosen = subset()
    for axis, values in parity.CHOICES.items():
        assert {getattr(cell, axis) for cell in chosen} == set(values)
    for pair in itertools.combinations(parity.CHOICES, 2):
        assert any(all(getattr(cell, axis) != parity.CHOICES[axis][0] for axis in pair) for cell in chosen), pair
    assert len(chosen) < len(parity.every_cell()) / 5


def test_offloaded_shards_change_nothing(tmp_path):
    parity.write_dataset(tmp_path)
    run = parity.run_of(parity.Cell(shard=2), tmp_path)
    offloaded = replace(run, layout=replace(run.layout, cpu_offload=True))
    kept, moved = (
        run_ranks(parity.train_and_resume, 2, each, str(tmp_path / name), "")
        for name, each in (("kept", run), ("moved", offloaded))
    )
    assert kept == moved


def test_the_table_would_show_a_key_that_a_ring_lost(tmp_path):
    parity.write_dataset(tmp_path)
    alone = np.array(
        run_ranks(parity.train_and_resume, 1, parity.run_of(parity.Cell(), tmp_path), str(tmp_path / "a"), "")
    )
    run = parity.run_of(parity.Cell(cp="2 ring"), tmp_path)
    wrong = np.array(run_ranks(train_with_a_lost_key, 2, run, str(tmp_path / "b")))
    assert np.abs(wrong / alone - 1).max() > 1e3 * parity.TOLERANCE


def train_with_a_lost_key(rank: int, run, save_to: str) -> list[tuple[float, float]]:
    from goku_mega.parallel import context

    def attend_to_all_but_one(query, key, value, segments, scale, attend=context.attend):
        value = torch.cat((torch.zeros_like(value[:1]), value[1:]))
        return attend(query, key, value, segments, scale)

    context.attend = attend_to_all_but_one
    return parity.train_and_resume(rank, run, save_to, "")
