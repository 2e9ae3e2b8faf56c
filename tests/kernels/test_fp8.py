"""FP8 linear layers: every product is the exact one of the quantised numbers, and training in FP8 follows fp32."""

import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from goku_mega.kernels import fp8
from goku_mega.kernels.fp8 import ALIGNMENT, FORWARD, GRADIENT, fp8_linear, quantise
from launch import run_ranks

SIZES = [(64, 48, 32), (37, 16, 80), (1, 96, 16), (200, 128, 48)]
# fp32 sums of up to 200 terms, in any order.
FP32_SUM = 2e-6


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> torch.Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=torch.float64)
    return (values * spread).to(dtype)


def exact(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """What a matrix becomes under its FP8 scale, in fp64: written again from the definition."""
    largest = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}[kind]
    scale = x.float().abs().max() / largest
    return (x.float() / scale).clamp(-largest, largest).to(kind).double() * scale.double()


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("tokens", "width_in", "width_out"), SIZES)
@pytest.mark.parametrize("spread", [1.0, 1e-6, 3e4])
def test_all_three_products_are_those_of_the_quantised_numbers(tokens, width_in, width_out, spread):
    x = draw(tokens, width_in, spread=spread).requires_grad_()
    weight = draw(width_out, width_in, seed=1).requires_grad_()
    grad = draw(tokens, width_out, seed=2, spread=1e-4)

    y = fp8_linear(x, weight)
    y.backward(grad)

    x_8, weight_8, grad_8 = (exact(x, FORWARD), exact(weight, FORWARD), exact(grad, GRADIENT))
    close(y, x_8 @ weight_8.T, FP32_SUM)
    close(x.grad, grad_8 @ weight_8, FP32_SUM)
    close(weight.grad, grad_8.T @ x_8, FP32_SUM)


def test_in_bf16_only_the_result_is_rounded_to_bf16():
    x, weight = draw(96, 64, dtype=torch.bfloat16), draw(32, 64, seed=1, dtype=torch.bfloat16)
    y = fp8_linear(x, weight)
    assert y.dtype == torch.bfloat16
    expected = exact(x, FORWARD) @ exact(weight, FORWARD).T
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("kind", [FORWARD, GRADIENT])
def test_the_largest_number_survives_and_the_rest_is_within_half_a_step(kind):
    x = draw(64, 64, spread=123.4)
    x[3, 5] = -1000.0
    stored, scale = quantise(x, kind)
    back = stored.double() * scale.double()
    assert math.isclose(back[3, 5].item(), -1000.0, rel_tol=1e-6)
    normal = x.abs() >= 1000.0 / torch.finfo(kind).max * torch.finfo(kind).smallest_normal
    error = (back - x.double()).abs() / x.double().abs()
    assert error[normal].max() <= torch.finfo(kind).eps / 2 + 1e-6


def test_zeros_stay_zeros_and_nan_is_not_hidden():
    stored, scale = quantise(torch.zeros(16, 16), FORWARD)
    assert stored.float().abs().max() == 0 and scale.isfinite()
    broken = draw(16, 16)
    broken[2, 3] = math.nan
    assert fp8_linear(broken, draw(16, 16)).isnan().any()
    broken[2, 3] = math.inf
    assert not fp8_linear(broken, draw(16, 16)).isfinite().all()


class Products(TorchDispatchMode):
    """Writes down the operands of every scaled product."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._scaled_mm.default:
            self.operands.append((args[0], args[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 37, 64])
def test_operands_lie_and_measure_as_cublas_asks(tokens):
    """The CPU multiplies any matrices; a GPU wants these."""
    x, weight = draw(tokens, 48).requires_grad_(), draw(32, 48, seed=1).requires_grad_()
    with Products() as products:
        fp8_linear(x, weight).sum().backward()  # the gradient of a sum is one number, expanded
    assert [(a.dtype, b.dtype) for a, b in products.operands] == [
        (FORWARD, FORWARD), (GRADIENT, FORWARD), (GRADIENT, FORWARD),
    ]  # fmt: skip
    for a, b in products.operands:
        assert a.stride() == (a.shape[1], 1), "the first operand is row-major"
        assert b.stride() == (1, b.shape[0]), "the second operand is column-major"
        assert a.shape[1] % ALIGNMENT == 0 and b.shape[0] % ALIGNMENT == 0 and b.shape[1] % ALIGNMENT == 0


def test_only_the_products_that_are_asked_for_are_made():
    x, weight = draw(32, 48), draw(32, 48, seed=1).requires_grad_()
    with Products() as products:
        fp8_linear(x, weight).sum().backward()
    assert len(products.operands) == 2
    with Products() as products:
        fp8_linear(x.requires_grad_(), weight.detach()).sum().backward()
    assert len(products.operands) == 2


def test_between_forward_and_backward_one_byte_a_number_is_kept():
    kept: list[torch.Tensor] = []
    x, weight = draw(64, 48, dtype=torch.bfloat16).requires_grad_(), draw(32, 48, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x, weight)
    extra = [tensor for tensor in kept if tensor.data_ptr() != weight.data_ptr()]
    assert sum(tensor.nbytes for tensor in extra) == x.numel() + 4  # and the scale


def test_a_recomputed_product_gives_the_same_bits():
    def gradients(again: bool) -> list[torch.Tensor]:
        x, weight = draw(64, 48).requires_grad_(), draw(48, 48, seed=1).requires_grad_()
        layer = functools.partial(fp8_linear, weight=weight)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, weight.grad]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.slow
def test_the_compiled_quantiser_is_the_plain_one_and_compiles_once_for_all_lengths():
    compiled = fp8._quantise_in_one_kernel.__wrapped__()
    torch._dynamo.utils.counters.clear()
    for tokens in (64, 37, 200, 16):
        x = draw(tokens, 48, dtype=torch.bfloat16)
        for mine, plain in zip(compiled(x, FORWARD), fp8._quantise(x, FORWARD), strict=True):
            assert torch.equal(mine.view(torch.uint8) if mine.dtype == FORWARD else mine,
                               plain.view(torch.uint8) if plain.dtype == FORWARD else plain)  # fmt: skip
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def parallel_layers(rank: int, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Column- then row-parallel layer on this rank's parts; results and gradients, and what a rank should find."""
    import torch.distributed as dist

    from goku_mega.kernels.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear
    from goku_mega.model.sizes import ModelShape
    from goku_mega.model.transformer import megatron_config
    from goku_mega.parallel.groups import support_megatron_on_host

    support_megatron_on_host()
    world, group = dist.get_world_size(), dist.group.WORLD
    shape = ModelShape(layers=1, hidden_size=64, ffn_hidden_size=128, heads=4)
    config = megatron_config(shape, tp=world, sequence_parallel=sequence_parallel and world > 1)
    common = {"config": config, "init_method": None, "skip_bias_add": False, "tp_group": group}
    column = Fp8ColumnParallelLinear(64, 128, bias=True, gather_output=False, **common)
    row = Fp8RowParallelLinear(128, 64, bias=False, input_is_parallel=True, **common)
    first, second = draw(128, 64, seed=3), draw(64, 128, seed=4)
    x, grad = draw(48, 64, seed=5), draw(48, 64, seed=6)
    with torch.no_grad():
        column.weight.copy_(first.chunk(world)[rank])
        column.bias.zero_()
        row.weight.copy_(second.chunk(world, dim=1)[rank])
    split = config.sequence_parallel
    mine = (x.chunk(world)[rank] if split else x).clone().requires_grad_()
    y, _ = row(column(mine)[0])
    y.backward(grad.chunk(world)[rank] if split else grad)
    return {"y": y.detach(), "x.grad": mine.grad, "first": column.weight.grad, "second": row.weight.grad}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_parallel_ranks_agree_with_one_to_the_rounding_of_fp8(sequence_parallel):
    [one] = run_ranks(parallel_layers, 1, False)
    two = run_ranks(parallel_layers, 2, sequence_parallel)
    joined = {
        "first": torch.cat([part["first"] for part in two]),
        "second": torch.cat([part["second"] for part in two], dim=1),
    }
    for name in ("y", "x.grad"):
        if sequence_parallel:
            joined[name] = torch.cat([part[name] for part in two])
        else:
            assert torch.equal(two[0][name], two[1][name])
            joined[name] = two[0][name]
    # Parts have scales of their own, so that a number may be rounded the other way: half a step, 2^-4 of it in e4m3
    # and 2^-3 in e5m2. A sum left out over the ranks is an error of about 0.7.
    for name, kind in {"y": FORWARD, "x.grad": GRADIENT, "first": GRADIENT, "second": GRADIENT}.items():
        close(joined[name], one[name].double(), torch.finfo(kind).eps / 2)
