"""Ranks that act together: either the work succeeds on all of them, or all of them raise the same error.

Works without torch.distributed, too. The messages are Python objects, so in a job whose default group is NCCL pass
a gloo group (`dist.new_group(backend="gloo")`): the objects then never touch a GPU.
"""

import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from goku_mega.errors import CheckpointError, UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Failure:
    rank: int
    message: str
    cause: str
    """"user": a complete message for the user; "system": the disk or the memory; "bug": anything else."""


@dataclass(frozen=True)
class Ranks:
    """The processes that decide together."""

    group: dist.ProcessGroup | None
    rank: int
    world: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> "Ranks":
        """The ranks of `group`; of the default group if None; this process alone without torch.distributed."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank; all ranks have come here when it returns."""
        if self.world == 1:
            return here
        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def together(self, doing: str, work: Callable[[], Result]) -> list[Result]:
        """Run `work` on every rank and return all results; if it fails on one rank, raise on every rank.

        Raises:
            CheckpointError: a disk or a file was at fault; names the ranks.
            RuntimeError: anything else, with the traceback of the failing rank.
        """
        value, error = None, None
        try:
            value = work()
        except Exception as caught:
            error = caught
        outcomes = self.gather((value, _describe(self.rank, error) if error else None))
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            raise _as_error(doing, failures) from error
        return [result for result, _ in outcomes]

    def each(self, doing: str, work: Callable[[], Result]) -> Result:
        """As `together`, but every rank keeps its own result, which need not be one that can travel."""
        own: list[Result] = []
        self.together(doing, lambda: own.append(work()))
        return own[0]

    def first(self, doing: str, work: Callable[[], Result], *, rank: int = 0) -> Result:
        """Run `work` on one rank only and give its result to every rank; if it fails, raise on every rank."""
        outcome: list[Any] = [None]
        error = None
        if self.rank == rank:
            try:
                outcome = [(work(), None)]
            except Exception as caught:
                error = caught
                outcome = [(None, _describe(rank, caught))]
        if self.world > 1:
            dist.broadcast_object_list(outcome, group_src=rank, group=self.group)
        result, failure = outcome[0]
        if failure is not None:
            raise _as_error(doing, [failure]) from error
        return result


def _describe(rank: int, error: BaseException) -> _Failure:
    if isinstance(error, UserError):
        return _Failure(rank, str(error), "user")
    if isinstance(error, OSError | MemoryError | EOFError):
        return _Failure(rank, f"{type(error).__name__}: {error}", "system")
    return _Failure(rank, "".join(traceback.format_exception(error)), "bug")


def _as_error(doing: str, failures: list[_Failure]) -> Exception:
    bugs = [failure for failure in failures if failure.cause == "bug"]
    if bugs:
        return RuntimeError(f"{doing} failed on rank {bugs[0].rank}:\n{bugs[0].message}")
    if all(failure.cause == "user" for failure in failures):
        return CheckpointError(failures[0].message)
    named = "; ".join(f"rank {failure.rank}: {failure.message}" for failure in failures)
    return CheckpointError(f"{doing} failed ({named})")


def host_name() -> str:
    """A name that processes share which see each other's memory."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
