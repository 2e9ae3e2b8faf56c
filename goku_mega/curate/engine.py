"""Sources to worker processes that may be killed: a source that hangs, crashes or cannot be read costs itself alone.

The engine knows nothing of stages: a worker is any callable that takes a task and tells what it finds.
"""

import importlib
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from goku_mega.data.workers import end_with_parent
from goku_mega.errors import ConfigError, MediaError, MissingExtra, UserError

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""Tries of a task whose worker ends without a word: a machine that is out of memory takes the worker that is next."""
TICK_S = 0.5


@dataclass(frozen=True)
class Found:
    """A score that a worker computed."""

    task: Any
    stage: str
    key: str
    score: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Finished:
    """A task that is done with."""

    task: Any


@dataclass(frozen=True)
class SetAside:
    """A task that came to nothing."""

    task: Any
    kind: str
    """media: the file is at fault; error: the code; time: it took too long; death: its process ended."""
    stage: str
    reason: str


Event = Found | Finished | SetAside


def run_local(
    tasks: Iterable[Any], factory: str, arguments: tuple[Any, ...], *, workers: int, time_limit_s: float
) -> Iterator[Event]:
    """What comes of tasks, as it comes, from `workers` processes.

    Args:
        factory: `module:function`; called with the arguments in every worker, it returns a function of a task and a
            `Teller`.
        time_limit_s: longest time that a worker may spend on one stage of one task.

    Raises:
        ConfigError, MissingExtra: a worker could not be made as it was asked for; all of them end.
    """
    pool = Pool(factory, arguments, time_limit_s)
    try:
        pool.start(workers)
        yield from pool.run(iter(tasks))
    finally:
        pool.stop()


class Teller:
    """A worker's way to tell what it does; `goku_mega.curate.pipeline.Listener` in the worker's process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def begins(self, stage: str) -> None:
        self._pipe.send(("begins", stage))

    def found(self, stage: str, key: str, score: dict[str, Any], seconds: float) -> None:
        self._pipe.send(("found", stage, key, score, seconds))


@dataclass
class _Worker:
    """A process, what it works on, and since when."""

    process: Any
    pipe: Connection
    task: Any = None
    stage: str = "start"
    since_s: float = field(default_factory=time.monotonic)


class Pool:
    """Worker processes, each with a task or idle; those that hang or end are replaced."""

    def __init__(self, factory: str, arguments: tuple[Any, ...], time_limit_s: float) -> None:
        self.factory, self.arguments, self.time_limit_s = factory, arguments, time_limit_s
        self.context = multiprocessing.get_context("forkserver")
        self.workers: list[_Worker] = []
        self.again: list[Any] = []
        self.deaths: dict[int, int] = {}

    def start(self, count: int) -> None:
        self.workers = [self._new() for _ in range(count)]

    def stop(self) -> None:
        for worker in self.workers:
            self._end(worker)
        self.workers = []

    def run(self, waiting: Iterator[Any]) -> Iterator[Event]:
        """What comes of the tasks, as `run_local`."""
        while self._feed(waiting):
            yield from self._events()

    def _feed(self, waiting: Iterator[Any]) -> bool:
        """A task for every idle worker; whether any is at work."""
        for worker in self.workers:
            if worker.task is None:
                task = self.again.pop() if self.again else next(waiting, None)
                if task is None:
                    continue
                worker.task, worker.stage, worker.since_s = task, "start", time.monotonic()
                worker.pipe.send(task)
        return any(worker.task is not None for worker in self.workers)

    def _events(self) -> Iterator[Event]:
        """What the workers have told since the last look, and what became of those that are late or gone."""
        pipes = {worker.pipe: worker for worker in self.workers}
        for pipe in wait(list(pipes), timeout=TICK_S):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                while worker.pipe.poll():
                    if (event := self._heard(worker, worker.pipe.recv())) is not None:
                        yield event
            except (EOFError, OSError):
                yield from self._died(worker)
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.task is not None and now - worker.since_s > self.time_limit_s:
                task, stage = worker.task, worker.stage
                self._replace(worker)
                yield SetAside(task, "time", stage, f"it took longer than {self.time_limit_s:g} s")

    def _heard(self, worker: _Worker, message: tuple[Any, ...]) -> Event | None:
        task = worker.task
        match message:
            case ("begins", stage):
                worker.stage, worker.since_s = stage, time.monotonic()
            case ("found", stage, key, score, seconds):
                worker.since_s = time.monotonic()
                return Found(task, stage, key, score, seconds)
            case ("finished",):
                worker.task = None
                return Finished(task)
            case ("failed", kind, reason):
                worker.task = None
                return SetAside(task, kind, worker.stage, reason)
            case ("unable", "extra", reason):
                raise MissingExtra(reason)
            case ("unable", _, reason):
                raise ConfigError(reason)
        return None

    def _died(self, worker: _Worker) -> Iterator[Event]:
        task, stage = worker.task, worker.stage
        worker.process.join()
        code = worker.process.exitcode
        self._replace(worker)
        if task is None:
            return
        self.deaths[id(task)] = self.deaths.get(id(task), 0) + 1
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        if self.deaths[id(task)] < ATTEMPTS:
            logger.warning("a worker ended (%s) in stage %s; its source is tried once more", how, stage)
            self.again.append(task)
        else:
            yield SetAside(task, "death", stage, f"its worker ended ({how}) {ATTEMPTS} times")

    def _replace(self, worker: _Worker) -> None:
        self._end(worker)
        self.workers[self.workers.index(worker)] = self._new()

    def _new(self) -> _Worker:
        here, there = self.context.Pipe()
        process = self.context.Process(
            target=_work, args=(there, self.factory, self.arguments), daemon=True, name="curate-worker"
        )
        process.start()
        there.close()
        return _Worker(process, here)

    @staticmethod
    def _end(worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


def _work(pipe: Connection, factory: str, arguments: tuple[Any, ...]) -> None:
    """A worker's life: it ends with the command."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command's to act on
    module, name = factory.split(":")
    try:
        work: Callable[[Any, Teller], None] = getattr(importlib.import_module(module), name)(*arguments)
        while True:
            task = pipe.recv()
            try:
                work(task, Teller(pipe))
            except MediaError as error:
                pipe.send(("failed", "media", str(error)))
            except (ConfigError, MissingExtra):
                raise
            except UserError as error:
                pipe.send(("failed", "error", str(error)))
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{os.path.basename(where.filename)}:{where.lineno}"
                pipe.send(("failed", "error", f"{type(error).__name__}: {error} ({place})"))
            else:
                pipe.send(("finished",))
    except (ConfigError, MissingExtra) as error:
        pipe.send(("unable", "extra" if isinstance(error, MissingExtra) else "config", str(error)))
    except (EOFError, OSError):
        os._exit(1)
