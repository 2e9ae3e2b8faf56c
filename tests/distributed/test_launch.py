"""The helper of every distributed test returns what ranks return, and says which rank failed and why."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from launch import RankFailed, run_ranks


def add_up(rank: int, offset: torch.Tensor) -> torch.Tensor:
    total = offset + rank
    dist.all_reduce(total)
    return total


def fail_on_rank_1(rank: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("rank 1 is unwell")
    if rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "hang":
        time.sleep(1000)
    dist.barrier()


def read_variable(rank: int) -> str:
    return os.environ["GOKU_TEST_VARIABLE"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_returns_its_result(world: int) -> None:
    expected = torch.full((2,), float(world + sum(range(world))))
    assert all(torch.equal(result, expected) for result in run_ranks(add_up, world, torch.ones(2)))


@pytest.mark.parametrize(
    ("how", "said"), [("raise", "ValueError: rank 1 is unwell"), ("die", "rank 1 died with exit code -9")]
)
def test_a_rank_that_fails_is_named_with_its_reason(how: str, said: str) -> None:
    with pytest.raises(RankFailed, match=said):
        run_ranks(fail_on_rank_1, 2, how)


def test_a_rank_that_hangs_is_named_with_its_stack() -> None:
    for limit_s in (3, 60):  # a busy machine may need more than 3 s until the ranks have met
        with pytest.raises(RankFailed) as failed:
            run_ranks(fail_on_rank_1, 2, "hang", timeout_s=limit_s)
        if "in fail_on_rank_1" in str(failed.value):
            break
    assert "in fail_on_rank_1" in str(failed.value)


def test_ranks_see_the_environment_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):
        monkeypatch.setenv("GOKU_TEST_VARIABLE", value)
        assert run_ranks(read_variable, 1) == [value]
