"""What a run reports of every step: a JSON line, TensorBoard, and a live display on a terminal.

Only the main rank writes. A resumed run cuts off what the killed one wrote beyond its checkpoint.
"""

import json
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

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
            cut_after(path, self.start_step)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.start_step)
            self._progress = _live_display(self.start_step, self.total_steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_main:
            os.close(self._file)
            self._board.close()
            if self._progress is not None:
                self._progress[0].stop()

    def record(self, row: dict[str, Any]) -> None:
        """Write one step's row; it has `step` (from 0) and numbers, None where a figure is not known."""
        if not self.is_main:
            return
        os.write(self._file, (json.dumps(row) + "\n").encode())
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, row["step"])
        if self._progress is not None:
            progress, task = self._progress
            progress.update(task, completed=row["step"] + 1, loss=row["loss"], rate=row["samples_per_s"])
        elif (row["step"] + 1) % LOG_EVERY_STEPS == 0 or row["step"] + 1 == self.total_steps:
            logger.info(
                "step %d/%d loss %.4f grad norm %.3f %.0f tokens/s %.1f samples/s",
                row["step"] + 1, self.total_steps, row["loss"], row["gradient_norm"],
                row["tokens_per_s"], row["samples_per_s"],
            )  # fmt: skip


def cut_after(path: Path, start_step: int) -> None:
    """Keep the rows of the steps before `start_step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] < start_step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _live_display(start_step: int, total_steps: int) -> Any:
    """A rich progress bar and its task, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    progress = Progress(
        TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:.1f} samples/s"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    progress.start()
    return progress, progress.add_task("train", total=total_steps, completed=start_step, loss=float("nan"), rate=0.0)
