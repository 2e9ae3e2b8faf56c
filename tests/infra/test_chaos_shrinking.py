"""Random faults on a run that has no spare: it shrinks to the nodes that are left and grows again, and stays the run
that it was.

GOKU_CHAOS_SHRINKING_FAULTS and GOKU_CHAOS_SEED change how many and which.
"""

import itertools
import os
from pathlib import Path

import pytest
from chaos import SHRINKING, soak
from parity import write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FAULTS = int(os.environ.get("GOKU_CHAOS_SHRINKING_FAULTS", "10"))
SEED = int(os.environ.get("GOKU_CHAOS_SEED", "22"))


def test_a_run_that_shrinks_and_grows_again_takes_every_step_once_with_the_same_loss(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_dataset(data)
    report = soak(tmp_path, data, seed=SEED, faults=FAULTS, ground=SHRINKING)
    print(report)
    changes = [later - earlier for earlier, later in itertools.pairwise(report.worlds)]
    assert min(changes) < 0 < max(changes), report.worlds
    assert not report.wrongly and not report.missed, report
