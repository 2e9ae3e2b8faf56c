"""Asking again for reads that fail or are slow, and counting what that took. Nothing here knows what is read.

A slow read is not given up: a second one runs beside it, and whichever answers first is taken.
"""

import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from goku_mega.errors import DataError

FIRST_PAUSE_S = 0.25
"""Before a failed read is asked for again; each pause is twice as long as the one before, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 8.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadRules:
    """How much is borne of a storage that fails or is slow."""

    retries: int = 10
    """A read is asked for so many times again."""
    slow_s: float = 30.0
    """A read without an answer after this time is asked for again beside the first."""


USUAL_RULES = ReadRules()


@dataclass(frozen=True)
class ReadCounts:
    """What reading took so far."""

    requests: int = 0
    """Reads that were answered."""
    bytes: int = 0
    """Bytes that came from the storage."""
    failures: int = 0
    """Reads that failed or came short."""
    slow: int = 0
    """Reads that had no answer in time."""
    cache_hits: int = 0
    """Samples that were found in the cache."""
    wait_s: float = 0.0
    """Seconds that the loader's thread waited for bytes."""


class Insistence:
    """Asks until there is an answer, within the rules. Several threads may ask; they can be told to stop."""

    def __init__(self, rules: ReadRules) -> None:
        self.rules = rules
        self._counts = asdict(ReadCounts())
        self._lock = threading.Lock()
        self._stopping: Future[None] = Future()

    @property
    def counts(self) -> ReadCounts:
        with self._lock:
            return ReadCounts(**self._counts)

    def count(self, **more: float) -> None:
        """Add to the counts, by their names."""
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number

    def stop(self) -> None:
        """Whoever waits here now or later gets an error instead of an answer."""
        with self._lock:
            if not self._stopping.done():
                self._stopping.set_result(None)

    def until_done(self, what: str, call: Callable[[], T]) -> T:
        """What `call` returns.

        Args:
            what: a message's beginning, for when there is no answer: "FILE cannot be read at byte 7".

        Raises:
            FileNotFoundError: as the call says.
            DataError: it failed for good, or too often, or the reading was stopped.
        """
        tries = self.rules.retries + 1
        for number in range(1, tries + 1):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:
                fault = error
            is_slow = isinstance(fault, _Slow)
            self.count(**({"slow": 1} if is_slow else {"failures": 1}))
            _check_passing(what, fault)
            if number < tries:
                self._pause(what, fault, 0.0 if is_slow else FIRST_PAUSE_S * 2 ** (number - 1))
        raise DataError(
            f"{what} ({_reason(fault)}), {tries} times over; see to the storage, or raise data.read_retries"
        ) from fault

    def until_done_in_time(self, what: str, call: Callable[[], T]) -> T:
        """The same, with every call in a thread of its own, and another beside it when it is slow.

        A call that never returns leaves its thread behind: no driver can be made to stop.
        """
        asked: set[Future[T]] = set()

        def ask() -> T:
            asked.add(_in_thread(call))
            waited_for: set[Future[Any]] = {*asked, self._stopping}
            done, _ = wait(waited_for, self.rules.slow_s, FIRST_COMPLETED)
            self._check_stop(what)
            answers = sorted(asked & done, key=lambda answer: answer.exception() is not None)
            if not answers:
                raise _Slow(f"no answer within {self.rules.slow_s:g} s")
            asked.remove(answers[0])
            return answers[0].result()

        return self.until_done(what, ask)

    def _pause(self, what: str, fault: Exception, longest_s: float) -> None:
        # Many ranks fail together; they shall not come back together.
        pause_s = min(longest_s, LONGEST_PAUSE_S) * random.uniform(0.5, 1)
        logger.warning("%s (%s); trying again in %.1f s", what, _reason(fault), pause_s)
        wait({self._stopping}, pause_s)
        self._check_stop(what)

    def _check_stop(self, what: str) -> None:
        if self._stopping.done():
            raise DataError(f"{what}: the reading was stopped")


class _Slow(TimeoutError):
    """There is no answer yet, but there may be one."""


def _check_passing(what: str, fault: Exception) -> None:
    """Raise where the same call will not succeed later."""
    if isinstance(fault, DataError):
        raise fault
    if isinstance(fault, (TypeError, ValueError, AttributeError)):
        raise DataError(f"{what} ({_reason(fault)}); encode the data set again") from fault
    refused = isinstance(fault, (PermissionError, IsADirectoryError, NotADirectoryError))
    if refused or "Credentials" in type(fault).__name__:  # drivers have kinds of their own for keys, named alike
        raise DataError(f"{what} ({_reason(fault)}); see to the place and the right to read it") from fault


def _in_thread(call: Callable[[], T]) -> Future[T]:
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="storage call", daemon=True).start()
    return answer


def _reason(fault: BaseException) -> str:
    """One line."""
    if isinstance(fault, OSError) and fault.strerror and fault.filename is None:
        return fault.strerror
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
