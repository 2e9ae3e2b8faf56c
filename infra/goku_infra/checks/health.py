"""One row of a health check, and asking what may never answer."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class HealthFinding:
    """Something that is wrong with a node, or may become so."""

    name: str
    """Which check saw it: `disk`, `clock`, `network`, `memory`, `kernel`, `gpu_ecc`, `gpu_xid`, ..."""
    severity: Literal["critical", "warning"]
    """critical: the node must not run ranks now. warning: for the operator; work may go on."""
    text: str
    """One line: the thing, its value and the limit."""
    is_event: bool = False
    """It happened at a moment, and a later look at the node would not show it."""


_unanswered: dict[str, threading.Thread] = {}
"""Threads that were left behind, by what they ask."""


def answer_within(timeout_s: float, question: Callable[[], Value], name: str) -> Value | None:
    """What `question` returns or raises; None if it raises OSError, or takes longer.

    A dead network file system or a hung driver would hold the caller for ever. So a thread asks, and is left behind;
    until it comes back, questions of the same `name` get None at once: there is never more than one such thread.
    """
    pending = _unanswered.get(name)
    if pending is not None and pending.is_alive():
        return None
    _unanswered.pop(name, None)
    answers: list[Value] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        _unanswered[name] = thread
    if errors and not isinstance(errors[0], OSError):
        raise errors[0]
    return answers[0] if answers else None
