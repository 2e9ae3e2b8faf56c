"""A cluster for the tests of this folder."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, available

ROOT = Path(__file__).parents[2]
COMMANDS = {"goku-mega": "goku_mega.cli", "goku-ops": "goku_infra.cli"}


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    """Four idle nodes; what a test does to them is undone."""
    yield started_cluster
    started_cluster.restore()


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = available()
    if reason:
        pytest.skip(reason)
    programs = tmp_path_factory.mktemp("bin")
    for name, module in COMMANDS.items():  # the checkout's, installed or not
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT}/infra"}
    with Cluster(4, environment=environment) as running:
        yield running
