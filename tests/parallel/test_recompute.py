"""Recomputed blocks give the same gradients, and repeat exactly the work that their policy says."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from goku_mega.config.training import FlowConfig, RecomputeConfig
from goku_mega.data.packing import pack_training
from goku_mega.data.shards import Sample
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.groups import single_process_groups
from goku_mega.parallel.parallelize import build_model

SHAPE = ModelShape(layers=3, hidden_size=32, ffn_hidden_size=64, heads=4, latent_channels=4, text_width=8)
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.counts[name] for name in ("mm", "addmm", "bmm"))


def run(recompute: RecomputeConfig) -> tuple[dict[str, torch.Tensor], CountOperators]:
    """Gradients of one pack, and the operators it took."""
    model = build_model(
        SHAPE, single_process_groups(), seed=1, dtype=torch.float64, recompute=recompute, fsdp=False
    ).module
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # away from the zeros that a new model starts with
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    samples = [
        Sample(str(n), torch.randn(4, n, 4, 6, generator=generator), torch.randn(2 + n, 8, generator=generator))
        for n in (1, 2, 3)
    ]
    batch = pack_training(
        samples, seed=0, step=0, flow=FlowConfig(), caption_dropout=0.0, null_text=torch.zeros(1, 8), shape=SHAPE,
        dtype=torch.float64,
    )  # fmt: skip
    with CountOperators() as operators:
        model(batch.packed).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}, operators


@pytest.fixture(scope="module")
def kept():
    return run(RecomputeConfig())


@pytest.mark.parametrize(
    "config",
    [
        RecomputeConfig(policy="selective"),
        RecomputeConfig(policy="full"),
        RecomputeConfig(policy="full", every=2),
        RecomputeConfig(policy="selective", first=1),
    ],
    ids=str,
)
def test_gradients_are_bitwise_those_of_kept_activations(config, kept):
    gradients, _ = run(config)
    assert gradients.keys() == kept[0].keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, kept[0][name]), name


def test_selective_repeats_no_product_and_no_attention(kept):
    _, operators = run(RecomputeConfig(policy="selective"))
    assert operators.products == kept[1].products
    assert operators.counts[ATTENTION] == kept[1].counts[ATTENTION]
    assert operators.counts["gelu"] == 2 * SHAPE.layers + 1  # each block's again; the captions' projection once
    assert kept[1].counts["gelu"] == SHAPE.layers + 1


def test_full_repeats_the_attention_of_the_chosen_blocks_only(kept):
    once = kept[1].counts[ATTENTION] // SHAPE.layers
    for config, repeated in [
        (RecomputeConfig(policy="full"), 3),
        (RecomputeConfig(policy="full", every=2), 2),
        (RecomputeConfig(policy="full", first=1), 1),
    ]:
        assert run(config)[1].counts[ATTENTION] == once * (SHAPE.layers + repeated), config


def test_which_blocks_are_recomputed():
    def chosen(**settings):
        config = RecomputeConfig(policy="full", **settings)
        return [number for number in range(7) if config.covers(number)]

    assert chosen() == list(range(7))
    assert chosen(every=3) == [0, 3, 6]
    assert chosen(first=2) == [0, 1]
    assert chosen(every=2, first=4) == [0, 2]
    assert chosen(first=0) == []
    assert not RecomputeConfig().covers(0)


def test_auto_has_to_be_decided_first():
    with pytest.raises(ValueError, match="decided before"):
        run(RecomputeConfig(policy="auto"))
