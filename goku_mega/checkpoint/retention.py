"""Which committed checkpoints go once a newer one is there. Pure; the last intact one never goes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """What is kept."""

    keep: int
    """The newest intact ones; one stays whatever this says."""
    keep_every: int = 0
    """Every one whose step is a multiple of this, for ever; 0: none."""
    keep_best: int = 0
    """Those with the lowest loss; 0: none."""


@dataclass(frozen=True)
class Kept:
    """A committed checkpoint."""

    step: int
    name: str
    """Of its folder."""
    intact: bool
    loss: float | None = None
    """Mean training loss since the save before; None where it is not known."""


def kept_as(found: Sequence[Kept], newest_step: int, retention: Retention) -> dict[str, list[str]]:
    """Why each of those of `found` stays that a rule keeps: name -> "newest", "every 1000", "best"."""
    intact = [one for one in _judged(found, newest_step) if one.intact]
    periodic = [one for one in intact if retention.keep_every and one.step % retention.keep_every == 0]
    known = [(one.loss, one) for one in intact if one.loss is not None and not math.isnan(one.loss)]
    best = [one for _, one in sorted(known, key=lambda pair: pair[0])]
    reasons: dict[str, list[str]] = {}
    for reason, kept in (
        ("newest", _newest(intact, retention)),
        (f"every {retention.keep_every}", periodic),
        ("best", best[: retention.keep_best]),
    ):
        for one in kept:
            reasons.setdefault(one.name, []).append(reason)
    return reasons


def retired(found: Sequence[Kept], newest_step: int, retention: Retention) -> list[Kept]:
    """Those of `found` that go after the checkpoint of `newest_step` was committed, newest first.

    Steps beyond `newest_step`, left by a future that the run was set back from, are not judged. Damaged ones do not
    count as kept, and go once `keep` intact ones are newer.
    """
    judged = _judged(found, newest_step)
    kept = kept_as(found, newest_step, retention)
    newest = _newest([one for one in judged if one.intact], retention)
    last = newest[-1].step if newest and len(newest) >= retention.keep else -1
    return [one for one in judged if one.name not in kept and (one.intact or one.step < last)]


def _judged(found: Sequence[Kept], newest_step: int) -> list[Kept]:
    return sorted((one for one in found if one.step <= newest_step), key=lambda one: one.step, reverse=True)


def _newest(intact: Sequence[Kept], retention: Retention) -> Sequence[Kept]:
    return intact[: max(1, retention.keep)]
