"""Checkpoints on the nodes' own disks: committed there, copied to another node, and read back without the store."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoint_cases import differences, names_in, state

from goku_mega.checkpoint.load import fill, load_newest
from goku_mega.checkpoint.save import Saver
from launch import run_ranks

pytestmark = pytest.mark.slow

NODES = (0, 1, 2)


def node(folder: Path, rank: int, nodes: tuple[int, ...] = NODES) -> str:
    """Two ranks a node; each node's disk is a folder here."""
    return str(folder / f"node{nodes[rank // 2]}")


def save_on_nodes(rank: int, world: int, folder: Path, store_every: int) -> list[str]:
    paths = []
    mine = state("rows", rank, world, step=0)
    with Saver(folder / "store", mine, keep=5, node_folder=node(folder, rank), store_every=store_every) as saver:
        for step in (1, 2, 3):
            for part, shards in state("rows", rank, world, step=step).items():
                for name, shard in shards.items():
                    mine[part][name].tensor.copy_(shard.tensor)
            saver.save(step, {"layout": "rows"})
            saver.fence()
            outcome = saver.wait()
            assert outcome is not None
            paths.append(outcome.path or outcome.fault)
    return paths


def load_on_nodes(
    rank: int, world: int, folder: Path, kind: str, nodes: tuple[int, ...] = NODES
) -> tuple[int, list[str], str]:
    mine = state(kind, rank, world, step=None)
    own = node(folder, rank, nodes)
    loaded = load_newest(folder / "store", lambda stored: fill(stored, mine), node_folder=own)
    assert loaded is not None
    step = loaded[0].info["step"]
    return step, differences(mine, step), str(loaded[0].folder)


def test_each_node_has_its_own_files_and_a_copy_of_another_nodes(tmp_path: Path) -> None:
    run_ranks(save_on_nodes, 6, 6, tmp_path, 3)
    for number in range(3):
        own, kept = {2 * number, 2 * number + 1}, {(2 * number - 2) % 6, (2 * number - 1) % 6}
        files = set(names_in(tmp_path / f"node{number}" / "step_00000003"))
        assert {name for name in files if name.endswith(".distcp")} == {f"__{rank}_0.distcp" for rank in own | kept}
        assert {"index.safetensors", "info.json", "manifest.json"} <= files
        assert names_in(tmp_path / f"node{number}") == ["step_00000002", "step_00000003"]
    assert names_in(tmp_path / "store") == ["step_00000003"]  # every third save goes on into the store


@pytest.mark.parametrize("lost", [None, 0, 2])
def test_a_restart_after_the_loss_of_a_node_reads_nothing_from_the_store(tmp_path: Path, lost: int | None) -> None:
    run_ranks(save_on_nodes, 6, 6, tmp_path, 1)
    if lost is not None:
        shutil.rmtree(tmp_path / f"node{lost}")
    shutil.rmtree(tmp_path / "store")  # nothing can be read from it
    left = tuple(number for number in NODES if number != lost)
    for nodes, kind in ((NODES, "columns"), (left, "grid")):  # with another node in its place, and without
        for step, wrong, where in run_ranks(load_on_nodes, 2 * len(nodes), 2 * len(nodes), tmp_path, kind, nodes):
            assert (step, wrong) == (3, [])
            assert "node" in where


def test_when_two_neighbours_are_lost_the_store_is_read(tmp_path: Path) -> None:
    run_ranks(save_on_nodes, 6, 6, tmp_path, 2)
    for number in (0, 1):
        shutil.rmtree(tmp_path / f"node{number}")
    for step, wrong, where in run_ranks(load_on_nodes, 6, 6, tmp_path, "rows"):
        assert (step, wrong) == (2, [])
        assert "store" in where


def test_damage_on_a_node_falls_back_to_the_store(tmp_path: Path) -> None:
    run_ranks(save_on_nodes, 4, 4, tmp_path, 1)
    for copy in tmp_path.glob("node*/step_00000003/__1_0.distcp"):
        content = bytearray(copy.read_bytes())
        content[5000] ^= 1
        copy.write_bytes(content)
    for step, wrong, where in run_ranks(load_on_nodes, 4, 4, tmp_path, "rows"):
        assert (step, wrong) == (3, [])
        assert "store" in where


def save_with_a_full_node(rank: int, world: int, folder: Path) -> list[tuple[str, str]]:
    mine, seen = state("rows", rank, world, step=0), []
    own = node(folder, rank)
    with Saver(folder / "store", mine, keep=5, node_folder=own, store_every=1) as saver:
        if rank == 2:  # its node's folder can hold nothing more
            shutil.rmtree(own)
            Path(own).write_text("a file is in the way")
        dist.barrier()
        for step in (1, 2):
            saver.save(step, {})
            outcome = saver.wait()
            assert outcome is not None
            seen.append((Path(outcome.path).parent.name, outcome.fault))
    return seen


def test_what_the_nodes_cannot_take_goes_into_the_store(tmp_path: Path) -> None:
    assert run_ranks(save_with_a_full_node, 4, 4, tmp_path) == [[("store", "")] * 2] * 4
    assert names_in(tmp_path / "store") == ["step_00000001", "step_00000002"]
