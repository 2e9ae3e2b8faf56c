"""The FLOP formula against torch's own count of the real model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from goku_mega.data.packing import pack_prompts
from goku_mega.model.sizes import SIZES, ModelShape
from goku_mega.parallel.groups import single_process_groups
from goku_mega.parallel.parallelize import build_model
from goku_mega.plan.devices import peak_flops
from goku_mega.plan.flops import forward_flops, training_flops

SMALL = ModelShape(layers=2, hidden_size=48, ffn_hidden_size=160, heads=2, latent_channels=4, text_width=20)


def test_forward_flops_equal_torchs_count_of_a_packed_forward_pass():
    latents = [torch.randn(4, 1, 4, 4), torch.randn(4, 3, 6, 4), torch.randn(4, 2, 8, 8)]
    texts = [torch.randn(length, 20) for length in (3, 7, 1)]
    model = build_model(SMALL, single_process_groups(), seed=0, fsdp=False).module
    batch = pack_prompts(latents, texts, [0.1, 0.5, 0.9], SMALL)

    # torch counts the products of attention only where it spells them out.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)

    tokens = (4, 18, 32)
    assert counter.get_total_flops() == sum(
        forward_flops(count, len(text), SMALL) for count, text in zip(tokens, texts, strict=True)
    )


@pytest.mark.parametrize("size", ["1b", "2b", "8b"])
def test_a_long_video_costs_what_the_rule_of_thumb_says(size: str):
    shape = SIZES[size]
    s, d = 219_600, shape.hidden_size
    rule = shape.layers * (24 * s * d**2 + 4 * s**2 * d)
    # Cross-attention's query and output, 4 s d^2 a layer, and the text are all that is left.
    assert rule < forward_flops(s, 512, shape) < rule + shape.layers * (4 * s * d**2 + 8 * 512 * d * (s + d)) * 1.01


def test_cost_grows_with_tokens_and_text_and_training_costs_three_forward_passes():
    costs = [forward_flops(tokens, 10, SMALL) for tokens in (1, 16, 48, 1024)]
    assert costs == sorted(set(costs))
    assert forward_flops(16, 10, SMALL) < forward_flops(16, 11, SMALL)
    assert training_flops(16, 10, SMALL) == 3 * forward_flops(16, 10, SMALL)


def test_a_class_conditional_model_has_no_text_cost():
    assert forward_flops(256, 0, SIZES["pilot-1b"]) == forward_flops(256, 77, SIZES["pilot-1b"])


def test_peaks_are_those_of_the_very_card_and_unknown_elsewhere():
    assert peak_flops("NVIDIA H200", "bf16") == peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA H200", "fp64") is None
    assert peak_flops("AMD EPYC", "bf16") is None
