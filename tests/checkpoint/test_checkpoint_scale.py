"""The benchmark's simulated ranks hold what real ones do."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.checkpoint_scale import plan_bytes, rank_boxes, whole_parameters
from goku_mega.checkpoint.commit import joined
from goku_mega.checkpoint.index import Index
from goku_mega.checkpoint.save_plan import Box
from goku_mega.checkpoint.state import STORED_UNDER, box_of
from goku_mega.model.sizes import model_shape
from goku_mega.parallel.groups import build_groups, support_megatron_on_host
from goku_mega.parallel.layout import Layout
from goku_mega.parallel.parallelize import build_model
from launch import run_ranks

SHAPE = model_shape("tiny")
# Uneven rows; copies over replicas, over tensor-parallel ranks and over both; ranks that get no rows.
LAYOUTS = (
    Layout(tp=4, dp_shard=3, dp_replicate=2),
    Layout(dp_shard=7),
    Layout(tp=2, dp_shard=100),
    Layout(dp_replicate=5),
)


def real_boxes(process: int, layout: Layout, ranks: list[int]) -> dict[str, Box]:
    """What `build_model` gives one rank of a job whose other ranks are not there. torch caches a rank's meshes."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=ranks[process], world_size=layout.world_size)
    support_megatron_on_host()
    model = build_model(SHAPE, build_groups(layout, torch.device("cpu")), seed=0)
    dist.destroy_process_group()
    return {
        f"{part}/{name}": box_of(f"{part}/{name}", shard)
        for part in STORED_UNDER.values()
        for name, shard in model.shards.items()
        if not shard.empty
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_simulated_ranks_hold_what_real_ones_do(layout: Layout) -> None:
    parameters = whole_parameters(SHAPE)
    ranks = sorted({0, 1, layout.tp, layout.world_size // 2 + 1, layout.world_size - 1})
    for rank, real in zip(ranks, run_ranks(real_boxes, len(ranks), layout, ranks), strict=True):
        simulated = {box.name: box for box in rank_boxes(parameters, layout, rank) if box.bytes}
        assert simulated == real
        assert list(simulated) == list(real)  # copies are shared out in this order


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_ranks_together_write_every_number_once(layout: Layout) -> None:
    parameters = whole_parameters(SHAPE)
    parts = [Index.from_bytes(plan_bytes(parameters, layout, rank)) for rank in range(layout.world_size)]
    index = joined(parts)
    index.check_complete()
    assert len(index.tensors) == len(STORED_UNDER) * len(parameters)
