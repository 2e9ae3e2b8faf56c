"""A bar on the terminal while bytes are read or written; nothing where stderr is none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_progress(doing: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes that have been done since it was last called; any thread may call it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(doing, total=total_bytes)
        yield lambda count: progress.advance(task, count)
