"""The memory plan against what torch really allocates, and the rules that any plan must keep."""

import importlib.util
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from goku_mega.config.training import LayoutConfig, RecomputeConfig
from goku_mega.model.packed import PackedBatch
from goku_mega.model.sizes import SIZES, ModelShape
from goku_mega.parallel.layout import Layout, resolve
from goku_mega.plan.activations import Numerics, Pack, block_bytes
from goku_mega.plan.memory import POLICIES, Job, model_numbers, passes_under_way, rank_memory
from launch import run_ranks

SMALL = ModelShape(layers=2, hidden_size=64, ffn_hidden_size=256, heads=4, latent_channels=4, text_width=32)
GRID, TEXT = (1, 32, 32), 24
PACK = Pack(tokens=256, text_tokens=TEXT, samples=1)
CPU = Numerics(computed=4, gpu=False, fused=False)


def saved_bytes_of_a_block(shape: ModelShape, layout: LayoutConfig, dtype: torch.dtype, *, fused: bool = False) -> int:
    """Bytes of the storages that autograd keeps of the last block, besides parameters and what blocks share."""
    from goku_mega.data.packing import context_part
    from goku_mega.parallel.context import context_tokens
    from goku_mega.parallel.groups import build_groups, single_process_groups, support_megatron_on_host
    from goku_mega.parallel.parallelize import build_model

    ranks = layout.tp * layout.cp
    groups = single_process_groups() if ranks == 1 else None
    if groups is None:
        support_megatron_on_host()
        groups = build_groups(resolve(layout, ranks, shape), torch.device("cpu"))
    module = build_model(shape, groups, seed=0, dtype=dtype, fsdp=False).module
    module.fused = fused
    batch = a_batch(shape)
    if layout.cp > 1:
        ulysses, ring = groups.layout.ulysses, groups.layout.ring
        mine = context_tokens([len(batch.patches)], groups.cp_rank, ulysses=ulysses, ring=ring)
        batch = context_part(batch, mine, ring)
    batch = batch.to(torch.device("cpu"), dtype)

    seen = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    alive, counted = [], {"bytes": 0, "in_last_block": False}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(tensor)  # so that no address comes twice
            counted["bytes"] += storage.nbytes() if counted["in_last_block"] else 0
        return tensor

    module.blocks[-1].register_forward_pre_hook(lambda *_: counted.update(in_last_block=True))
    module.blocks[-1].register_forward_hook(lambda *_: counted.update(in_last_block=False))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(batch)
    return counted["bytes"]


def a_batch(shape: ModelShape) -> PackedBatch:
    """The batch of PACK, whole."""
    from goku_mega.data.packing import pack_prompts

    generator = torch.Generator().manual_seed(0)
    latent = torch.randn((shape.latent_channels, *GRID), generator=generator)
    return pack_prompts([latent], [torch.zeros(TEXT, shape.text_width)], [0.1], shape)


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors that operations have made and that are still there."""

    def __init__(self, module: torch.nn.Module | None = None) -> None:
        """
        Args:
            module: its parameters do not count.
        """
        super().__init__()
        parameters = () if module is None else module.parameters()
        self.left_out = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def now(self) -> int:
        alive = {key: found for key, ref in self.storages.items() if (found := ref()) is not None}
        self.storages = {key: self.storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata in self.left_out:
                    continue
                self.storages[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now())
        return result


def saved_on_rank(rank: int, layout: LayoutConfig, dtypes: list[torch.dtype]) -> list[int]:
    return [saved_bytes_of_a_block(SMALL, layout, dtype) for dtype in dtypes]


def predicted(layout: Layout, dtype: torch.dtype, *, fused: bool = False) -> float:
    numerics = Numerics(computed=dtype.itemsize, gpu=False, fused=fused)
    return block_bytes(SMALL, layout, PACK, numerics).off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_blocks_activations_are_what_autograd_saves(dtype):
    measured = saved_bytes_of_a_block(SMALL, LayoutConfig(), dtype)
    assert predicted(Layout(), dtype) == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(tp=2, sequence_parallel=False),
        LayoutConfig(tp=2),
        LayoutConfig(cp=2),
        LayoutConfig(cp=2, cp_ring=2),
        LayoutConfig(tp=2, cp=2),
    ],
    ids=["tp", "tp-sp", "ulysses", "ring", "tp-ulysses"],
)
def test_split_activations_are_what_autograd_saves_on_a_rank(layout):
    ranks, dtypes = layout.tp * layout.cp, [torch.float32, torch.bfloat16]
    measured = run_ranks(saved_on_rank, ranks, layout, dtypes)
    for dtype, on_ranks in zip(dtypes, zip(*measured, strict=True), strict=True):
        assert predicted(resolve(layout, ranks, SMALL), dtype) == pytest.approx(max(on_ranks), rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_fused_kernels_keep_what_the_plan_says():
    """By Triton's interpreter, which has to be asked for before triton is imported."""
    code = (
        "import sys, torch\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from test_memory import SMALL, LayoutConfig, saved_bytes_of_a_block\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    print(saved_bytes_of_a_block(SMALL, LayoutConfig(), dtype, fused=True))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=Path(__file__).parent
    )
    for dtype, measured in zip((torch.float32, torch.bfloat16), done.stdout.split()[-2:], strict=True):
        assert predicted(Layout(), dtype, fused=True) == pytest.approx(int(measured), rel=0.01)


def built(shape: ModelShape, recompute: RecomputeConfig, *, fsdp: bool = False):  # type: ignore[no-untyped-def]
    from goku_mega.parallel.groups import single_process_groups
    from goku_mega.parallel.parallelize import build_model

    return build_model(shape, single_process_groups(), seed=0, fsdp=fsdp, recompute=recompute)


def kept_bytes(layers: int, recompute: RecomputeConfig) -> int:
    """What a forward pass leaves for the backward pass."""
    shape = replace(SMALL, layers=layers)
    module, batch = built(shape, recompute).module, a_batch(shape)
    with LiveBytes(module) as live:
        velocity = module(batch)
        return live.now() - velocity.untyped_storage().nbytes()


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_keeps_of_a_block_is_what_is_alive_after_the_forward_pass(policy):
    recompute = RecomputeConfig(policy=policy)
    of_one_block = kept_bytes(3, recompute) - kept_bytes(2, recompute)
    assert getattr(block_bytes(SMALL, Layout(), PACK, CPU), policy) == pytest.approx(of_one_block, rel=0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_peak_of_a_forward_and_backward_pass_is_the_plans(policy):
    shape = ModelShape(layers=6, hidden_size=96, ffn_hidden_size=384, heads=4, latent_channels=4, text_width=32)
    recompute = RecomputeConfig(policy=policy)
    batch = a_batch(shape)
    with LiveBytes() as live:
        model = built(shape, recompute, fsdp=True)
        for _ in range(2):
            model.start_step()
            live.peak = 0
            model.module(batch).square().sum().backward()
    memory = rank_memory(Job(shape=shape, layout=Layout(), pack=PACK, numerics=CPU), recompute)
    # Neither optimizer nor average are there.
    predicted = memory.peak - memory.process - memory.optimizer - memory.average
    assert predicted == pytest.approx(live.peak, rel=0.05)


def numbers_on_rank(rank: int, layout: LayoutConfig, ranks: int) -> int:
    from goku_mega.parallel.groups import build_groups, support_megatron_on_host
    from goku_mega.parallel.parallelize import build_model

    support_megatron_on_host()
    groups = build_groups(resolve(layout, ranks, SMALL), torch.device("cpu"))
    return sum(shard.tensor.numel() for shard in build_model(SMALL, groups, seed=0).shards.values())


@pytest.mark.parametrize(("ranks", "layout"), [(1, LayoutConfig()), (3, LayoutConfig()), (4, LayoutConfig(tp=2))])
def test_the_parameters_of_a_rank_are_counted_exactly(ranks, layout):
    resolved = resolve(layout, ranks, SMALL)
    measured = run_ranks(numbers_on_rank, ranks, layout, ranks)
    assert model_numbers(SMALL, resolved.tp, resolved.dp_shard) == max(measured)


def test_the_sizes_have_the_parameters_of_their_names():
    assert [round(model_numbers(SIZES[size]) / 1e9, 1) for size in ("1b", "2b", "8b")] == [0.8, 2.0, 8.4]


def test_passes_under_way_follow_the_schedules():
    # 1F1B keeps one pass for each stage from here on; the interleaved schedule at most all of them.
    assert [passes_under_way(stage, Layout(pp=4), 8) for stage in range(4)] == [4, 3, 2, 1]
    assert passes_under_way(0, Layout(pp=4), 2) == 2
    assert [passes_under_way(stage, Layout(pp=2, chunks=2), 4) for stage in range(2)] == [5, 3]
    assert passes_under_way(0, Layout(pp=2, chunks=2), 2) == 4


LARGE = st.sampled_from(["1b", "2b", "8b"])
PACKS = st.sampled_from([4_096, 40_320, 219_600])


def peak(size: str, tokens: int, layout: Layout, policy: str = "off", **job) -> float:  # type: ignore[no-untyped-def]
    pack = Pack(tokens, 256, 1)
    memory = rank_memory(
        Job(shape=SIZES[size], layout=layout, pack=pack, numerics=Numerics(), **job), RecomputeConfig(policy=policy)
    )
    parts = [getattr(memory, name) for name in memory.__dataclass_fields__]
    assert memory.peak == pytest.approx(sum(parts)) and min(parts) >= 0
    return memory.peak


@settings(max_examples=60, deadline=None)
@given(
    size=LARGE, tokens=PACKS, policy=st.sampled_from(POLICIES), micro_batches=st.sampled_from([1, 3]),
    optimizer=st.sampled_from(["adamw", "muon"]), shard=st.sampled_from([2, 8, 64]),
)  # fmt: skip
def test_more_gpus_of_an_axis_never_need_more_memory(size, tokens, policy, micro_batches, optimizer, shard):
    job = {"policy": policy, "micro_batches": micro_batches, "optimizer": optimizer}
    few = peak(size, tokens, Layout(dp_shard=shard), **job)
    assert peak(size, tokens, Layout(dp_shard=2 * shard), **job) <= few
    assert peak(size, tokens, Layout(dp_shard=shard, ulysses=2), **job) <= few * 1.001
    assert peak(size, tokens, Layout(dp_shard=shard, tp=2, sequence_parallel=True), **job) < few
    assert peak(size, tokens, Layout(dp_shard=shard, dp_replicate=2), **job) == few


@settings(max_examples=30, deadline=None)
@given(size=LARGE, tokens=PACKS, tp=st.sampled_from([1, 2, 4]), cp=st.sampled_from([1, 2, 4]))
def test_less_is_kept_the_more_is_recomputed(size, tokens, tp, cp):
    layout = Layout(tp=tp, ulysses=cp, dp_shard=8, sequence_parallel=tp > 1)
    off, selective, full = (peak(size, tokens, layout, policy) for policy in POLICIES)
    assert off > selective > full
