"""Processes and threads of the data commands: none outlives the command that started it."""

import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")

START = "forkserver"
"""How workers come into being: from a process that has loaded their modules, and holds nothing of the command's."""


class WorkerKilled(Exception):
    """A worker ended without a word."""


def end_with_parent() -> None:
    """A pool's initializer: end this worker with the command, whose next word it would else await for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_workers(
    work: Callable[..., Iterable[T]], arguments: Sequence[tuple[Any, ...]], *, load: Sequence[str] = ()
) -> Iterator[T]:
    """Iterate `work(*arguments)` in a process for each tuple of arguments; what they yield, as it comes.

    Args:
        load: modules that all workers need, loaded once for all of them.

    Raises:
        WorkerKilled: a worker was killed; the others are ended. What a worker raises is raised here.
    """
    context: Any = get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(["__main__", *load])
    workers, ears = [], {}
    try:
        for of_one in arguments:
            ear, mouth = context.Pipe(duplex=False)
            worker = context.Process(target=_speak, args=(mouth, work, of_one), daemon=True)
            worker.start()
            mouth.close()
            workers.append(worker)
            ears[ear] = worker
        while ears:
            for ear in connection.wait(list(ears)):
                assert isinstance(ear, Connection)
                yield from _heard(ear, ears)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _heard(ear: Connection, ears: dict[Connection, Any]) -> Iterator[Any]:
    """What one worker has to say; its ear is closed after its last word."""
    try:
        kind, content = ear.recv()
    except EOFError as error:
        raise WorkerKilled(f"worker {ears[ear].pid} was killed") from error
    if kind == "result":
        yield content
        return
    ears.pop(ear).join()
    if kind == "error":
        raise content


def _speak(mouth: Connection, work: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    try:
        for result in work(*arguments):
            mouth.send(("result", result))
        mouth.send(("end", None))
    except Exception as error:
        error.add_note(traceback.format_exc())
        mouth.send(("error", error))


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items, made by a thread of their own that is up to `depth` of them ahead; 0: made when they are asked for."""
    if depth == 0:
        yield from items
        return
    made: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    is_over = threading.Event()

    def put(word: tuple[str, Any]) -> None:
        while not is_over.is_set():
            try:
                made.put(word, timeout=0.2)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(("item", item))
                if is_over.is_set():
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    threading.Thread(target=make, daemon=True).start()
    try:
        while (word := made.get())[0] != "end":
            if word[0] == "error":
                raise word[1]
            yield word[1]
    finally:
        is_over.set()
