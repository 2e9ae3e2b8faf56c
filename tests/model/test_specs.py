"""Engines: FP8 in the blocks it is asked for, TransformerEngine's real signatures, and clear refusals."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import te_on_cpu
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from goku_mega.config.training import ComputeConfig, RecomputeConfig
from goku_mega.errors import ConfigError, LayoutError, MissingExtra
from goku_mega.model.sizes import ModelShape
from launch import run_ranks

# megatron-core is imported inside of functions: a rank may have to pretend first.

SHAPE = ModelShape(layers=4, hidden_size=64, ffn_hidden_size=128, heads=4, latent_channels=4, text_width=32)
FP8 = ComputeConfig(fp8="current")
LINEARS = ("linear_qkv", "linear_proj", "linear_q", "linear_kv", "linear_fc1", "linear_fc2")


def make_batch(lengths=(48, 16, 32), text_lengths=(5, 1, 3)):
    """Samples that a fixed rule maps to their velocities, so that there is something to learn."""
    from goku_mega.model.packed import PackedBatch, Segments

    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    patches = torch.randn(tokens, SHAPE.patch_dim, generator=generator)
    batch = PackedBatch(
        patches=patches,
        positions=torch.cat(
            [torch.cartesian_prod(torch.arange(n // 8), torch.arange(2), torch.arange(4)) for n in lengths]
        ),
        sample_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        timesteps=torch.rand(len(lengths), generator=generator),
        self_segments=Segments(lengths, lengths),
        text=torch.randn(sum(text_lengths), SHAPE.text_width, generator=generator),
        cross_segments=Segments(lengths, text_lengths),
    )
    return batch, patches.roll(1, dims=1) * 0.7


def train(compute: ComputeConfig, steps: int, *, groups=None, recompute: str = "off") -> list[float]:
    from goku_mega.parallel.groups import single_process_groups
    from goku_mega.parallel.parallelize import build_model, sum_partial_gradients

    groups = groups or single_process_groups()
    model = build_model(SHAPE, groups, seed=0, compute=compute, fsdp=False, recompute=RecomputeConfig(policy=recompute))
    batch, target = make_batch()
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = (model.module(batch) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        sum_partial_gradients(model, groups)
        optimizer.step()
    return losses


def train_over_two(rank: int, compute: ComputeConfig, sequence_parallel: bool, recompute: str) -> list[float]:
    from goku_mega.parallel.groups import build_groups, support_megatron_on_host
    from goku_mega.parallel.layout import Layout

    support_megatron_on_host()
    layout = Layout(tp=2, sequence_parallel=sequence_parallel)
    return train(compute, 5, groups=build_groups(layout, torch.device("cpu")), recompute=recompute)


@functools.cache
def losses(fp8: str) -> list[float]:
    return train(ComputeConfig(fp8=fp8), 30)


def engine(compute: ComputeConfig, *, shape=SHAPE, tp=1, device="cpu", dtype=torch.float32, recomputes=False):
    from goku_mega.model.specs import make_engine

    return make_engine(compute, shape, tp=tp, device=torch.device(device), dtype=dtype, recomputes=recomputes)


@pytest.mark.parametrize(
    ("first", "last", "in_fp8"), [(1, 1, {1, 2}), (0, 0, {0, 1, 2, 3}), (3, 1, set()), (0, 3, {0})]
)
def test_first_and_last_blocks_keep_their_linear_layers(first, last, in_fp8):
    from goku_mega.kernels.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear
    from goku_mega.parallel.groups import single_process_groups
    from goku_mega.parallel.parallelize import build_model

    compute = ComputeConfig(fp8="current", first_layers_bf16=first, last_layers_bf16=last)
    model = build_model(SHAPE, single_process_groups(), seed=0, compute=compute, fsdp=False).module
    kinds = (Fp8ColumnParallelLinear, Fp8RowParallelLinear)
    found = {name for name, part in model.named_modules() if isinstance(part, kinds)}
    assert {int(name.split(".")[1]) for name in found} == in_fp8
    # Seven in a block: qkv, q, kv, two projections, and the two of the MLP; the modulation is none of them.
    assert len(found) == 7 * len(in_fp8) and {name.split(".")[-1] for name in found} <= set(LINEARS)


class CountedProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._scaled_mm.default
        return function(*args, **(kwargs or {}))


def test_a_step_makes_three_fp8_products_for_every_layer_in_fp8_and_none_without():
    with CountedProducts() as products:
        train(FP8, 1)
    assert products.count == 3 * 7 * 2
    with CountedProducts() as products:
        train(ComputeConfig(), 1)
    assert products.count == 0


def test_training_in_fp8_follows_fp32():
    """Nothing is rounded in the first step, whose gates are zero; later the losses part by some percent, not more."""
    plain, fp8 = torch.tensor(losses("off")), torch.tensor(losses("current"))
    assert plain[-1] < 0.5 * plain[0], "there has to be something to follow"
    assert fp8[0] == plain[0]
    assert ((fp8 - plain).abs() / plain).max() < 0.05
    assert not torch.equal(fp8, plain)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recomputed_fp8_products_change_nothing(policy):
    assert train(FP8, 4, recompute=policy) == losses("current")[:4]


@pytest.mark.parametrize(("sequence_parallel", "recompute"), [(False, "selective"), (True, "off")])
def test_tensor_parallel_ranks_train_in_fp8_as_one_does(sequence_parallel, recompute):
    one, two, other = losses("current")[:5], *run_ranks(train_over_two, 2, FP8, sequence_parallel, recompute)
    assert two == other
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=0.01, atol=0)


@pytest.mark.skipif(te_on_cpu.is_installed(), reason="TransformerEngine is here")
def test_a_missing_transformer_engine_is_refused_and_not_mocked():
    with pytest.raises(MissingExtra, match=r"compute\.engine=te.*pip install.*transformer-engine\["):
        engine(ComputeConfig(engine="te"), device="cuda", dtype=torch.bfloat16)


def test_widths_that_fp8_cannot_multiply_are_refused():
    with pytest.raises(LayoutError, match=r"hidden width 64 over tp=8 is no multiple of 16"):
        engine(FP8, tp=8)
    odd = ModelShape(layers=2, hidden_size=64, ffn_hidden_size=200, heads=4)
    with pytest.raises(LayoutError, match=r"FFN width 200 over tp=1"):
        engine(FP8, shape=odd)


def test_fp8_in_fp64_is_refused():
    with pytest.raises(ConfigError, match=r"compute\.fp8=current.*float64"):
        engine(FP8, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["varlen", "cudnn", "flash3"])
def test_an_attention_kernel_without_its_gpu_is_refused(backend):
    with pytest.raises(ConfigError, match=rf"compute\.attention={backend} needs an NVIDIA GPU and bf16"):
        engine(ComputeConfig(attention=backend))


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"8\.9 or more.*\(8, 0\)"):
        engine(FP8, device="cuda", dtype=torch.bfloat16)


# TransformerEngine, by the real classes of the version that megatron-core is used with.


@pytest.fixture(scope="module")
def te_sources(request) -> str:
    pytest.importorskip("pydantic", reason="TransformerEngine's recipes are pydantic classes")
    sources = te_on_cpu.fetch(Path(request.config.cache.mkdir("transformer-engine")))
    if sources is None:
        pytest.skip(f"no package index to get transformer-engine=={te_on_cpu.VERSION} from")
    return str(sources)


def te_model(compute: ComputeConfig, groups, *, device: str = "meta"):
    """A model of the `te` engine on `device`, and its engine."""
    from functools import partial

    from goku_mega.model.specs import make_engine
    from goku_mega.model.transformer import GokuTransformer, megatron_config
    from goku_mega.parallel.parallelize import core_attention

    layout = groups.layout
    engine = make_engine(
        compute, SHAPE, tp=layout.tp, device=torch.device("cuda"), dtype=torch.bfloat16, recomputes=False
    )
    config = megatron_config(SHAPE, tp=layout.tp, sequence_parallel=layout.sequence_parallel, **engine.settings)
    core = core_attention(engine, SHAPE, groups)
    with torch.device("meta"):
        model = GokuTransformer(
            SHAPE, config=config, groups=groups.model,
            block=partial(engine.block, cross_attention=True, self_core_attention=core),
            around_blocks=partial(engine.around_blocks, config, groups.tp),
        )  # fmt: skip
    return model, engine


def groups_of(**degrees):
    from goku_mega.parallel.groups import build_groups, support_megatron_on_host
    from goku_mega.parallel.layout import Layout

    support_megatron_on_host()
    return build_groups(Layout(**degrees), torch.device("cpu"))


def check_parameters() -> None:
    """Over two tensor-parallel ranks: the parameters are the local engine's, by name and shape, and on no memory."""
    from transformer_engine.pytorch import DotProductAttention, Linear

    from goku_mega.model.specs import Engine
    from goku_mega.model.transformer import GokuTransformer, megatron_config
    from goku_mega.parallel.parallelize import tensor_parallel_dims

    groups = groups_of(tp=2, sequence_parallel=True)
    with torch.device("meta"):
        local = GokuTransformer(
            SHAPE, config=megatron_config(SHAPE, tp=2, sequence_parallel=True), groups=groups.model,
            block=functools.partial(Engine().block, cross_attention=True),
        )  # fmt: skip
    for fp8 in ("off", "delayed", "current", "blockwise"):
        model, engine = te_model(ComputeConfig(engine="te", fp8=fp8), groups)
        assert sum(isinstance(part, Linear) for part in model.modules()) == 7 * SHAPE.layers
        assert sum(isinstance(part, DotProductAttention) for part in model.modules()) == SHAPE.layers
        assert {name: p.shape for name, p in model.named_parameters()} == {
            name: p.shape for name, p in local.named_parameters()
        }
        assert all(p.device.type == "meta" for p in model.parameters())
        assert tensor_parallel_dims(model, engine) == tensor_parallel_dims(local, Engine())


def contexts_seen(fp8: str) -> dict[str, Any]:
    """In every block of a forward: whether FP8 is on, the recipe, how many contexts deep; and renewals of scales."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

    from goku_mega.model.block import GokuBlock

    seen: list[tuple[bool, str, int]] = []
    renewed: list[bool] = []

    def forward(self, hidden_states, *others):
        seen.append((State.is_fp8_enabled(), type(State.get_fp8_recipe()).__name__, State.AUTOCAST_DEPTH))
        return hidden_states

    model, _ = te_model(ComputeConfig(engine="te", fp8=fp8), groups_of())
    batch, _ = make_batch()
    with (
        mock.patch.object(GokuBlock, "forward", forward),
        mock.patch.object(State, "reduce_and_update_fp8_tensors", lambda forward=True: renewed.append(forward)),
    ):
        model(batch.to(torch.device("meta"), torch.float32))
    assert not State.is_fp8_enabled()
    return {"blocks": seen, "renewed": len(renewed)}


def check_gradients() -> None:
    """With torch's products behind TransformerEngine's signatures a model gives what the local engine's gives."""
    from goku_mega.parallel.parallelize import build_model

    groups = groups_of()
    local = build_model(SHAPE, groups, seed=0, fsdp=False).module
    batch, target = make_batch()
    for fp8 in ("off", "current"):
        model, _ = te_model(ComputeConfig(engine="te", fp8=fp8), groups)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in local.named_parameters():
                if parameter.abs().max() == 0:  # zeros would hide what lies behind them
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
                model.get_parameter(name).copy_(parameter)
        for each in (local, model):
            each.zero_grad()
            (each(batch) - target).square().mean().backward()
        for name, parameter in local.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-7)


def refusals() -> list[str]:
    from goku_mega.errors import UserError

    said = []
    for compute, settings in (
        (ComputeConfig(engine="te", fp8="mxfp8"), {}),
        (ComputeConfig(engine="te", fp8="delayed"), {"recomputes": True}),
        (ComputeConfig(engine="te"), {"device": "cpu"}),
        (ComputeConfig(engine="te"), {"dtype": torch.float32}),
    ):
        try:
            engine(compute, **{"device": "cuda", "dtype": torch.bfloat16, **settings})
        except UserError as error:
            said.append(str(error))
    return said


def alone(rank: int, sources: str) -> dict[str, Any]:
    te_on_cpu.emulate(te_on_cpu.pretend(Path(sources)))
    check_gradients()
    return {"refusals": refusals(), **{fp8: contexts_seen(fp8) for fp8 in ("delayed", "current", "blockwise")}}


@pytest.fixture(scope="module")
def te_alone(te_sources) -> dict[str, Any]:
    """What one process found, which also ran a whole model through the real signatures."""
    return run_ranks(alone, 1, te_sources)[0]


@pytest.mark.parametrize(
    ("fp8", "recipe"),
    [("delayed", "TEDelayedScaling"), ("current", "Float8CurrentScaling"), ("blockwise", "Float8BlockScaling")],
)
def test_a_recipe_reaches_the_blocks_between_the_first_and_the_last(te_alone, fp8, recipe):
    blocks = te_alone[fp8]["blocks"]
    assert [on for on, _, _ in blocks] == [False, True, True, False]
    assert all(name == recipe for on, name, _ in blocks if on)


def test_delayed_scales_are_renewed_once_a_forward_and_after_all_blocks(te_alone):
    assert te_alone["delayed"]["renewed"] == 1
    assert {depth for _, _, depth in te_alone["delayed"]["blocks"]} == {2}
    assert {depth for _, _, depth in te_alone["current"]["blocks"]} == {1}


def test_what_te_cannot_do_is_said_at_the_door(te_alone):
    blackwell, delayed, cpu, fp32 = te_alone["refusals"]
    assert "compute.fp8=mxfp8" in blackwell and "10.0" in blackwell
    assert "recompute.policy=off" in delayed
    assert "NVIDIA GPU" in cpu
    assert "bf16" in fp32
    assert all("\n" not in line for line in te_alone["refusals"])


def context_parallel_calls(rank: int, ulysses: int, ring: int, lengths: tuple[int, ...]) -> int:
    """Attention split over ranks equals attention of one; how often TransformerEngine's was called."""
    from transformer_engine.pytorch import DotProductAttention

    from goku_mega.model.core_attention import PackedAttention
    from goku_mega.model.packed import Segments
    from goku_mega.parallel.context import context_tokens, deal

    model, _ = te_model(ComputeConfig(engine="te"), groups_of(ulysses=ulysses, ring=ring))
    core = model.blocks[0].self_attention.core_attention
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(sum(lengths), SHAPE.heads, SHAPE.head_dim, generator=generator, dtype=torch.float64)
        for _ in range(3)
    )
    mine = context_tokens(lengths, rank, ulysses=ulysses, ring=ring)
    segments = deal(lengths, ring) if ring > 1 else Segments(lengths, lengths)
    calls: list[bool] = []
    forward = DotProductAttention.forward
    counted = lambda *args, **kwargs: calls.append(True) or forward(*args, **kwargs)  # noqa: E731
    with mock.patch.object(DotProductAttention, "forward", counted):
        found = core(query[mine], key[mine], value[mine], segments)
    expected = PackedAttention(config=model.config)(query, key, value, Segments(lengths, lengths))[mine]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    return len(calls)


def in_a_pair(rank: int, sources: str) -> list[int]:
    te_on_cpu.emulate(te_on_cpu.pretend(Path(sources)))
    check_parameters()
    return [
        context_parallel_calls(rank, 2, 1, (5, 11, 4)),
        context_parallel_calls(rank, 1, 2, (8, 12, 4)),
        context_parallel_calls(rank, 1, 2, (5, 11, 4)),
    ]


def test_a_pair_of_ranks_builds_real_classes_and_attends_as_one(te_sources):
    """Heads over ranks: our all-to-all around TransformerEngine's attention, in two groups of heads. Tokens over
    ranks: its own exchange of keys, and our ring for samples that it cannot split."""
    assert run_ranks(in_a_pair, 2, te_sources) == [[2, 1, 0]] * 2


def in_a_square(rank: int, sources: str) -> list[int]:
    te_on_cpu.emulate(te_on_cpu.pretend(Path(sources)))
    return [context_parallel_calls(rank, 2, 2, lengths) for lengths in ((8, 12, 4), (5, 11, 4))]


@pytest.mark.slow
def test_heads_and_tokens_over_four_ranks_attend_as_one(te_sources):
    assert run_ranks(in_a_square, 4, te_sources) == [[2, 0]] * 4
