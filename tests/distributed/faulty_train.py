"""`python -m faulty_train PLAN.json train ...`: goku-mega with faults planted in chosen ranks at chosen steps.

The plan is a list of faults, read at every step: {"kind", "where", "rank", "step", "data_step", "times", "arguments"},
of which all but the kind may be left out: then any rank or step is meant. "where" is the start, the load, a step (the
default) or a save. With "times" a fault strikes only so often in the life of the plan, whatever the starts in between.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import goku_mega.cli
import goku_mega.train.loop as loop
from goku_mega import environment
from goku_mega.checkpoint.save import Saver
from goku_mega.train.loop import Trainer

HELD_S = 600


class Plan:
    """A file of faults that grows while the run goes on."""

    def __init__(self, path: Path, *faults: dict[str, Any]) -> None:
        self.path = path
        self.faults: list[dict[str, Any]] = []
        self.add(*faults)

    def add(self, *faults: dict[str, Any]) -> None:
        self.faults += faults
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.faults))
        temporary.replace(self.path)

    def add_one(self, fault: dict[str, Any]) -> Path:
        """Add a fault with a number of times; the file that is there once it has struck."""
        self.add(fault)
        return self.path.with_suffix(f".{len(self.faults) - 1}") / "0"

    @property
    def command(self) -> list[str]:
        """What trains under the plan, up to the settings."""
        return ["python", "-m", "faulty_train", str(self.path), "train"]


def strike(path: Path, where: str, trainer: Trainer | None = None, batch: Any = None) -> None:
    here = {"rank": environment.rank()}
    if batch is not None:
        here |= {"step": batch.step, "data_step": batch.data_step}
    for number, fault in enumerate(json.loads(path.read_text())):
        here_and_now = all(fault.get(name, value) == value for name, value in here.items())
        if (
            here_and_now
            and fault.get("where", "step") == where
            and _may_strike(path.with_suffix(f".{number}"), fault.get("times"))
        ):
            KINDS[fault["kind"]](trainer, batch, **fault.get("arguments", {}))


def _may_strike(folder: Path, times: int | None) -> bool:
    """Whether a fault has not struck `times` times yet; counted by files, for the striker may not live on."""
    if times is None:
        return True
    folder.mkdir(exist_ok=True)
    for blow in range(times):
        try:
            os.close(os.open(folder / str(blow), os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            continue
    return False


def _raise(trainer: Any, batch: Any) -> None:
    raise RuntimeError("a planted fault")


def _leave(trainer: Trainer, batch: Any) -> None:
    os._exit(0)


def _spoil(trainer: Trainer, batch: Any, value: float = float("nan")) -> None:
    """The samples of this step lead to a loss that is `value` or grows with it."""
    batch.micro_batches[0].packed.patches.fill_(value)
    batch.micro_batches[0].velocity.fill_(value)


def _flip_bit(trainer: Trainer, batch: Any) -> None:
    """As a cosmic ray would, between two updates."""
    shard = next(shard for shard in trainer.state["model"].values() if shard.tensor.numel() > 8)
    shard.tensor.flatten().view(torch.int32)[5] ^= 1 << 12


def _other_collective(trainer: Trainer, batch: Any) -> None:
    """Wait in a group that the others do not enter now."""
    dist.barrier(group=_other_group)


_other_group: dist.ProcessGroup | None = None

KINDS: dict[str, Callable[..., None]] = {
    "exception": _raise,
    "leave": _leave,
    "segfault": lambda trainer, batch: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": lambda trainer, batch: os.abort(),
    "kill": lambda trainer, batch: os.kill(os.getpid(), signal.SIGKILL),
    "spoil": _spoil,
    "flip_bit": _flip_bit,
    "sleep": lambda trainer, batch, seconds: time.sleep(seconds),
    "hold_lock": lambda trainer, batch: ctypes.PyDLL(None).sleep(HELD_S),
    "other_collective": _other_collective,
}


def main() -> int:
    path, sys.argv = Path(sys.argv[1]), ["goku-mega", *sys.argv[2:]]
    step, save, assemble, resume = Trainer.step, Saver.save, loop.assemble, loop.resume

    def faulty_assemble(run: Any) -> Any:
        global _other_group
        strike(path, "start")
        assembled = assemble(run)
        _other_group = dist.new_group()
        return assembled

    def faulty_resume(*arguments: Any) -> int:
        strike(path, "load")
        return resume(*arguments)

    def faulty_step(self: Trainer, batch: Any) -> Any:
        strike(path, "step", self, batch)
        return step(self, batch)

    def faulty_save(self: Saver, *arguments: Any, **named: Any) -> float:
        saved = save(self, *arguments, **named)  # its writers have begun
        strike(path, "save")
        return saved

    loop.assemble, loop.resume = faulty_assemble, faulty_resume
    Trainer.step, Saver.save = faulty_step, faulty_save  # type: ignore[method-assign]
    return goku_mega.cli.main()


if __name__ == "__main__":
    sys.exit(main())
