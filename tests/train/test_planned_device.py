"""Ranks of unlike machines plan alike."""

from launch import run_ranks


def device_of(rank: int):
    import torch

    from goku_mega.config.training import DataConfig, FlowRun
    from goku_mega.train import loop

    loop.process_bytes = lambda: 1e9 + 1e6 * rank
    loop.host_memory_bytes = lambda: 8e9 - 1e9 * rank
    loop.environment.local_world_size = lambda: 2
    run = FlowRun(run_dir="unused", steps=1, data=DataConfig(path="unused"))
    return loop.planned_device(run, torch.device("cpu"), torch.float32, torch.float32)


def test_every_rank_plans_with_the_least_that_any_has():
    first, second = run_ranks(device_of, 2)
    assert first == second
    assert (first.memory_bytes, first.process_bytes) == (3.5e9, 1.001e9)
