"""The path between noise and data, and the loss on its velocity."""

import torch
from torch import Tensor

from goku_mega.flow.path import interpolate, velocity, velocity_loss


def noise_and_data(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype), torch.randn(shape, generator=generator, dtype=dtype)


def test_the_path_runs_from_noise_at_0_to_data_at_1():
    x_0, x_1 = noise_and_data(3, 4, 5)
    assert torch.equal(interpolate(x_1, x_0, torch.zeros(3)), x_0)
    assert torch.equal(interpolate(x_1, x_0, torch.ones(3)), x_1)


def test_every_sample_has_its_own_time():
    x_0, x_1 = noise_and_data(2, 3, 4)
    both = interpolate(x_1, x_0, torch.tensor([0.25, 0.75], dtype=torch.float64))
    for number, t in enumerate((0.25, 0.75)):
        alone = interpolate(x_1[number], x_0[number], torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(both[number], alone, rtol=0, atol=0)


def test_velocity_is_the_paths_derivative_at_every_time():
    x_0, x_1 = noise_and_data(6, 7)
    for t in (0.0, 0.3, 0.9):
        now = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        _, slope = torch.autograd.functional.jvp(lambda time: interpolate(x_1, x_0, time), now, torch.ones_like(now))
        torch.testing.assert_close(slope, velocity(x_1, x_0))


def test_following_the_velocity_from_anywhere_on_the_path_reaches_the_data():
    x_0, x_1 = noise_and_data(6, 7)
    t = torch.tensor(0.37, dtype=torch.float64)
    torch.testing.assert_close(interpolate(x_1, x_0, t) + (1 - t) * velocity(x_1, x_0), x_1)


def test_losses_and_gradients_of_parts_add_up_to_those_of_the_whole():
    target, start = noise_and_data(10, 4)
    weight = torch.tensor([1.0] * 8 + [0.0] * 2, dtype=torch.float64)
    whole, parts = (start.clone().requires_grad_() for _ in range(2))
    loss = velocity_loss(whole, target, weight, 8.0)
    loss.backward()
    pieces = [velocity_loss(parts[cut], target[cut], weight[cut], 8.0) for cut in (slice(0, 3), slice(3, 10))]
    torch.stack(pieces).sum().backward()

    torch.testing.assert_close(torch.stack(pieces).sum(), loss)
    torch.testing.assert_close(parts.grad, whole.grad)
    torch.testing.assert_close(loss, (start - target)[:8].square().mean())
    assert not whole.grad[8:].any(), "padding pulled at the model"


def test_loss_is_summed_in_fp32_under_bf16_and_in_fp64_under_fp64():
    target, predicted = noise_and_data(1000, 4)
    weight = torch.ones(1000)
    assert velocity_loss(predicted, target, weight.double(), 1000.0).dtype == torch.float64
    low = velocity_loss(predicted.bfloat16(), target.bfloat16(), weight, 1000.0)
    exact = velocity_loss(predicted.bfloat16().double(), target.bfloat16().double(), weight.double(), 1000.0)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-6, atol=0)
