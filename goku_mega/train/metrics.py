"""What a run reports of every step: a JSON line, TensorBoard, and a live display on a terminal.

Only the main rank writes. A resumed run cuts off what the killed one wrote beyond its checkpoint.
"""

import json
import logging
import math
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)

LOG_EVERY_STEPS = 50


class MetricsLog:
    """The metrics of one run folder; a context manager."""

    def __init__(self, run_dir: Path, *, is_main: bool, start_step: int, total_steps: int) -> None:
        self.run_dir = run_dir
        self.is_main = is_main
        self.start_step = start_step
        self.total_steps = total_steps

    def __enter__(self) -> "MetricsLog":
        if self.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.run_dir.mkdir(parents=True, exist_ok=True)
            path = self.run_dir / "metrics.jsonl"
            cut_from(path, self.start_step)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.start_step)
            self._display = _live_display(self.start_step, self.total_steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_main:
            os.close(self._file)
            self._board.close()
            if self._display is not None:
                self._display.progress.stop()

    def record(self, row: dict[str, Any]) -> None:
        """Write one step's row: `step`, from 0, and numbers; None where a figure is not known.

        The line is one write, so a kill leaves it whole or absent.
        """
        if not self.is_main:
            return
        os.write(self._file, (json.dumps(_finite(row)) + "\n").encode())
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, row["step"])
        if row["checkpoint_s"]:
            self._board.flush()  # so that a kill takes from TensorBoard no step the checkpoint keeps
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        done = row["step"] + 1
        if self._display is not None:
            self._display.progress.update(
                self._display.task, completed=done, loss=row["loss"], rate=row["samples_per_s"]
            )
        elif done % LOG_EVERY_STEPS == 0 or done == self.total_steps:
            logger.info(
                "step %d/%d loss %.4f gradient norm %.3f %.0f tokens/s %.1f samples/s",
                done, self.total_steps, row["loss"], row["gradient_norm"], row["tokens_per_s"], row["samples_per_s"],
            )  # fmt: skip


def cut_from(path: Path, step: int) -> None:
    """Drop the rows of `step` and later, and lines that are not whole; the file is replaced by a rename."""
    if not path.exists():
        return
    kept = [line + "\n" for line in path.read_text(errors="replace").splitlines() if _step_of(line) < step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _step_of(line: str) -> float:
    """The step of a row; infinity of a torn line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no nan and no infinity: null."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}


class _Display(NamedTuple):
    """A rich progress bar and its task."""

    progress: "Progress"
    task: "TaskID"


def _live_display(start_step: int, total_steps: int) -> _Display | None:
    """A running progress bar, or None where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    progress = Progress(
        TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:.1f} samples/s"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    task = progress.add_task("train", total=total_steps, completed=start_step, loss=math.nan, rate=0.0)
    progress.start()
    return _Display(progress, task)
