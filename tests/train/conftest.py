"""A small dataset that the tests of whole runs share."""

from pathlib import Path

import pytest
from parity import write_dataset


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small-data")
    write_dataset(folder)
    return folder
