"""Weights of one run as the start of another: the next stage, another task, another optimizer.

Only weights are taken over. What the checkpoint lacks keeps its value from the seed if the run says that it may;
nothing else may differ.
"""

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from goku_mega.checkpoint.agree import Ranks
from goku_mega.checkpoint.load import Place, Stored, load_named
from goku_mega.checkpoint.state import stored_under
from goku_mega.errors import CheckpointError
from goku_mega.parallel.shards import Shard

NAMES_IN_A_MESSAGE = 3


@dataclass(frozen=True)
class Loaded:
    """What became of every name, on all ranks together."""

    checkpoint: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    """Parameters that kept their values."""
    unused: tuple[str, ...]
    """Weights of the checkpoint that no parameter took."""

    def __str__(self) -> str:
        words = [f"{len(self.loaded)} parameters from {self.checkpoint}"]
        for names, what in ((self.fresh, "kept fresh"), (self.unused, "of the checkpoint left unused")):
            words += [f"{len(names)} {what} ({', '.join(names)})"] if names else []
        return ", ".join(words)


@dataclass(frozen=True)
class _Comparison:
    """A rank's parameters beside a checkpoint's weights."""

    taken: frozenset[str]
    fresh: frozenset[str]
    unused: frozenset[str]
    misfits: dict[str, str]
    """What is wrong with a parameter, by its name."""


def initialise_from(
    place: Place,
    model_shards: Mapping[str, Shard],
    *,
    weights: Literal["ema", "model"],
    fresh: Sequence[str] = (),
) -> Loaded:
    """Fill a model's boxes in place from a run folder's newest whole checkpoint, or from one checkpoint folder.

    Every rank calls it with its own boxes; another layout and another dtype are converted.

    Args:
        weights: which of the checkpoint's weights to take.
        fresh: patterns (`image_projection.*`) of names of parameters that keep their values, whatever the checkpoint
            has under these names.

    Raises:
        CheckpointError: on every rank: there is no whole checkpoint; or, before any box is changed: it has no such
            weights; a parameter that no pattern names is missing there or has another shape; a pattern names none.
    """
    _, loaded = load_named(place, lambda stored: _fill(stored, model_shards, weights, fresh))
    return loaded


def _fill(stored: Stored, shards: Mapping[str, Shard], weights: str, fresh: Sequence[str]) -> Loaded:
    ranks = Ranks.of(stored.group)
    prefix = f"{stored_under(weights)}/"
    mine = _compare(stored, prefix, shards, fresh)
    # Most ranks hold boxes of the same parameters; one of each kind speaks for all.
    kinds = ranks.gather(hashlib.sha256(repr(sorted(shards)).encode()).hexdigest())
    told = ranks.gather(mine if kinds.index(kinds[ranks.rank]) == ranks.rank else None)
    all_ranks = [comparison for comparison in told if comparison is not None]
    _check(str(stored.folder), all_ranks, weights, fresh)
    stored.fill({f"{prefix}{name}": shards[name] for name in sorted(mine.taken)})
    return Loaded(
        str(stored.folder),
        loaded=tuple(sorted(frozenset.union(*(comparison.taken for comparison in all_ranks)))),
        fresh=tuple(sorted(frozenset.union(*(comparison.fresh for comparison in all_ranks)))),
        unused=tuple(sorted(frozenset.intersection(*(comparison.unused for comparison in all_ranks)))),
    )


def _compare(stored: Stored, prefix: str, shards: Mapping[str, Shard], patterns: Sequence[str]) -> _Comparison:
    fresh = frozenset(name for name in shards if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    taken = frozenset(shards) - fresh
    shapes = {tensor.name: tensor.shape for tensor in stored.index.tensors if tensor.name.startswith(prefix)}
    misfits = {}
    for name in sorted(taken):
        found, here = shapes.get(f"{prefix}{name}"), tuple(shards[name].global_shape)
        if found is None:
            misfits[name] = "is not in it"
        elif found != here:
            misfits[name] = f"is {found} in it and {here} here"
    available = frozenset(name.removeprefix(prefix) for name in shapes)
    return _Comparison(taken, fresh, available - taken, misfits)


def _check(checkpoint: str, all_ranks: Sequence[_Comparison], weights: str, patterns: Sequence[str]) -> None:
    misfits = {name: what for comparison in all_ranks for name, what in comparison.misfits.items()}
    taken, fresh = (
        frozenset.union(*parts) for parts in zip(*((one.taken, one.fresh) for one in all_ranks), strict=True)
    )
    if misfits and all(what == "is not in it" for what in misfits.values()) and len(misfits) == len(taken):
        other = "model" if weights == "ema" else "ema"
        raise CheckpointError(f"{checkpoint} has no {weights} weights of this model; try init.weights={other}")
    if misfits:
        shown = "; ".join(f"{name} {misfits[name]}" for name in sorted(misfits)[:NAMES_IN_A_MESSAGE])
        more = f", and {len(misfits) - NAMES_IN_A_MESSAGE} more" if len(misfits) > NAMES_IN_A_MESSAGE else ""
        raise CheckpointError(
            f"{checkpoint} does not fit this model: {shown}{more}; take another checkpoint, or name in init.fresh "
            "what is to keep its new values"
        )
    for pattern in patterns:
        if not fnmatch.filter(sorted(fresh), pattern):
            raise CheckpointError(f"init.fresh names {pattern!r}, but this model has no such parameter")
