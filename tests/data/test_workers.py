"""Workers: what they say arrives, what they raise is raised, and a thread that works ahead keeps the order."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from goku_mega.data.workers import WorkerKilled, ahead, run_workers
from goku_mega.errors import DataError


def count(start: int, end: int) -> Iterator[int]:
    yield from range(start, end)


def fail(after: int) -> Iterator[int]:
    yield from range(after)
    raise DataError("the corpus is at fault")


def die(after: int) -> Iterator[int]:
    yield from range(after)
    os.kill(os.getpid(), signal.SIGKILL)


def test_all_that_workers_say_arrives_each_in_its_order():
    heard = list(run_workers(count, [(0, 50), (100, 150)]))
    assert [number for number in heard if number < 100] == list(range(50))
    assert [number for number in heard if number >= 100] == list(range(100, 150))


def test_what_a_worker_raises_is_raised_after_its_words():
    heard = []
    with pytest.raises(DataError, match="the corpus is at fault"):
        for number in run_workers(fail, [(3,)]):
            heard.append(number)
    assert heard == [0, 1, 2]


def test_a_killed_worker_is_noticed():
    with pytest.raises(WorkerKilled):
        list(run_workers(die, [(2,)]))


@pytest.mark.parametrize("depth", [0, 1, 7])
def test_a_thread_ahead_gives_the_same_items_and_the_same_error(depth):
    assert list(ahead(range(40), depth)) == list(range(40))
    heard = []
    with pytest.raises(DataError, match="at fault"):
        for item in ahead(fail(5), depth):
            heard.append(item)
    assert heard == [0, 1, 2, 3, 4]


def test_a_thread_is_ahead_by_its_depth_and_ends_with_its_reader():
    made: list[int] = []
    reached = threading.Event()

    def note() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            if number == 6:
                reached.set()
            yield number

    before = threading.active_count()
    items = ahead(note(), 5)
    assert next(items) == 0
    assert reached.wait(60)  # one read, five in the queue, one in the thread's hands
    items.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate()[before:]:
        thread.join(60)
    assert made == list(range(7))
