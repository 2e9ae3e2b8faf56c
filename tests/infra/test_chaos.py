"""Random faults from a seed on a run of several nodes on this machine: the whole of what must hold, after all of them.

GOKU_CHAOS_FAULTS and GOKU_CHAOS_SEED change how many and which; the seed is printed first.
"""

import os
from pathlib import Path

import pytest
from chaos import soak
from parity import write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FAULTS = int(os.environ.get("GOKU_CHAOS_FAULTS", "100"))
SEED = int(os.environ.get("GOKU_CHAOS_SEED", "20"))
BLAMED_RIGHTLY = 0.95


def test_random_faults_cost_no_step_beyond_a_commit_and_the_right_one_is_blamed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_dataset(data)
    report = soak(tmp_path, data, seed=SEED, faults=FAULTS)
    print(report)
    blamed = report.blamed_rightly + len(report.wrongly)
    assert report.blamed_rightly >= BLAMED_RIGHTLY * blamed > 0, report.wrongly
    assert not report.missed, report.missed
