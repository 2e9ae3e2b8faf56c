"""A checkpoint does not remember who wrote which piece: any layout loads what any other saved, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import KINDS, PARTS, SHAPES, differences, find_latest, names_in, state, whole
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from goku_mega.checkpoint.load import Stored, load_info, load_into
from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.errors import CheckpointError
from goku_mega.parallel.shards import Copies, Shard
from launch import run_ranks

TINY = {"size": "tiny", "layers": 2, "hidden_size": 6}
LARGE = {"size": "1b", "layers": 28, "hidden_size": 1152}


def save_every_kind(rank: int, world: int, root: Path) -> None:
    for kind in KINDS:
        save_checkpoint(root / f"{world}-{kind}", 1, state(kind, rank, world), {}, keep=1)


def load_every_kind(rank: int, world: int, root: Path) -> list[str]:
    wrong = []
    for folder in sorted(root.iterdir()):
        path = find_latest(folder)
        assert path is not None
        for kind in KINDS:
            mine = state(kind, rank, world, step=None)
            load_into(path, mine)
            wrong += [f"{folder.name} -> {world}-{kind}: {name}" for name in differences(mine)]
    return wrong


def test_saved_under_any_layout_equals_loaded_under_any_other(tmp_path: Path) -> None:
    for world in (1, 2, 3, 4):
        run_ranks(save_every_kind, world, world, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 * len(KINDS)
    for world in (1, 2, 3):
        assert run_ranks(load_every_kind, world, world, tmp_path) == [[]] * world


def test_a_rank_left_without_rows_writes_and_reads_nothing() -> None:
    shards = [state("rows", rank, 4)["model"]["final.weight"] for rank in range(4)]
    assert [shard.tensor.numel() for shard in shards] == [7, 0, 0, 0]


def save_a_replica(rank: int, world: int, folder: Path) -> None:
    weight = torch.arange(1000 * 7, dtype=torch.float32).view(1000, 7)
    copies = Copies(rank, world, ("replicate",))
    shards = {name: Shard(weight, (1000, 7), (0, 0), copies) for name in ("a", "b", "c")}
    save_checkpoint(folder, 1, {"model": shards}, {}, keep=1)


def test_replicated_boxes_are_written_once_by_all_alike(tmp_path: Path) -> None:
    run_ranks(save_a_replica, 4, 4, tmp_path)
    index = Stored.open(tmp_path / "step_00000001").index
    written = np.bincount(index.chunks.file, index.chunk_bytes)
    assert written.sum() == 3 * 1000 * 7 * 4  # and check_complete has seen that every number is there
    assert written.max() - written.min() <= 2 * 7 * 4  # a cut is between two rows


def test_sampling_reads_ema_weights_into_the_model_without_the_optimizer(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state("rows"), {}, keep=1)
    mine = state("rows", step=None, parts=("model", "ema"))
    load_into(path, {"ema": mine["model"]})
    assert differences({"model": mine["model"]}, stored="ema") == []
    assert all(shard.tensor.isnan().all() for shard in mine["ema"].values())
    load_into(path, mine, parts=("ema",))
    assert differences({"ema": mine["ema"]}) == []


def test_another_dtype_is_converted(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {"w": Shard(torch.tensor([1.5, 2.5]), (2,), (0,))}}, {}, keep=1)
    target = torch.zeros(2, dtype=torch.bfloat16)
    load_into(path, {"model": {"w": Shard(target, (2,), (0,))}})
    assert target.tolist() == [1.5, 2.5]


def test_torchs_own_tool_reads_it(tmp_path: Path) -> None:
    run_ranks(save_every_kind, 2, 2, tmp_path)
    for kind in KINDS:
        dcp_to_torch_save(tmp_path / f"2-{kind}" / "step_00000001", tmp_path / "all.pt")
        everything = torch.load(tmp_path / "all.pt")
        stored_under = ("model", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq")
        assert set(everything) == {f"{prefix}/{name}" for prefix in stored_under for name in SHAPES}
        for part, prefix in zip(PARTS, stored_under, strict=True):
            for name in SHAPES:
                assert torch.equal(everything[f"{prefix}/{name}"], whole(part, name))


def test_info_is_kept_beside_the_tensors(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 12, state("rows"), {"model": TINY, "layout": {"tp": 1}}, keep=1)
    info = load_info(path)
    assert info["model"] == TINY
    assert (info["step"], info["format"], info["world"], info["torch"]) == (12, 2, 1, torch.__version__)


def model(shape: tuple[int, ...], *more: str) -> dict[str, dict[str, Shard]]:
    return {"model": {name: Shard(torch.zeros(shape), shape, (0,) * len(shape)) for name in ("a.weight", *more)}}


def test_another_model_size_is_named_with_both_shapes_and_sizes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, model((4, 6)), {"model": TINY}, keep=1)
    with pytest.raises(CheckpointError) as wider:
        load_into(path, model((8, 6)), model=LARGE)
    assert "a.weight is 4x6 in the checkpoint and 8x6 here" in str(wider.value)
    assert "size tiny, layers 2" in str(wider.value)
    assert "size 1b, layers 28" in str(wider.value)
    with pytest.raises(CheckpointError, match=r"it has no model/b\.weight"):
        load_into(path, model((4, 6), "b.weight"), model=LARGE)


def test_a_deeper_model_in_the_checkpoint_is_refused_though_all_names_are_there(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, model((4, 6), "b.weight"), {"model": TINY}, keep=1)
    with pytest.raises(CheckpointError, match=r"it has model/b\.weight and 0 more tensors that this model has not"):
        load_into(path, model((4, 6)))


def stages(rank: int, folder: Path) -> str:
    """Each rank holds another parameter, as pipeline stages do; then one is missing on both."""
    own = {"model": {f"layer.{rank}": Shard(torch.full((3,), float(rank)), (3,), (0,))}}
    path = save_checkpoint(folder, 1, own, {}, keep=1)
    own["model"][f"layer.{rank}"].tensor.zero_()
    load_into(path, own)
    assert own["model"][f"layer.{rank}"].tensor.tolist() == [float(rank)] * 3
    try:
        load_into(path, {"model": {"layer.0": Shard(torch.zeros(3), (3,), (0,))}})
    except CheckpointError as error:
        return str(error)
    return ""


def test_ranks_may_hold_different_parameters(tmp_path: Path) -> None:
    messages = run_ranks(stages, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "it has model/layer.1" in messages[0]


def unowned(rank: int, folder: Path) -> list[str]:
    said = []
    # a third copy has the last third; the two halves are the same half
    for copies, size in ((Copies(rank, 3, ("replicate",)), 4), (Copies(), 2)):
        shards = {"model": {"w": Shard(torch.zeros(size), (4,), (0,), copies)}}
        try:
            save_checkpoint(folder, 1, shards, {}, keep=1)
        except RuntimeError as error:
            said.append(str(error).splitlines()[-1])
    return said


def test_a_tensor_that_the_boxes_do_not_fill_is_never_published(tmp_path: Path) -> None:
    said = run_ranks(unowned, 2, tmp_path)
    assert said[0] == said[1]
    assert all("the chunks of model/w do not cover each of its elements exactly once" in one for one in said[0])
    with pytest.raises(RuntimeError, match="the chunks of model/w do not cover"):
        save_checkpoint(tmp_path, 1, {"model": {"w": Shard(torch.zeros(2), (4,), (0,))}}, {}, keep=1)
    assert names_in(tmp_path) == []
