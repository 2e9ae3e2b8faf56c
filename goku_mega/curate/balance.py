"""How often each clip is taken, so that classes have the shares that they are meant to have (paper 4.4).

Primary classes share by weight, subclasses within one alike. Where a class has too few clips, even repeated, the
others take its rest. Pure: the same clips get the same answer, in whatever order they come.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from goku_mega.errors import ConfigError
from goku_mega.seeding import derive_seed

Counts = NDArray[np.int64]


def balance(
    keys: Sequence[str],
    primary: Sequence[str],
    subclass: Sequence[str],
    *,
    weights: Mapping[str, float],
    max_repeat: int,
    size: int = 0,
    seed: int = 0,
) -> Counts:
    """How often each clip is taken, [clips], 0 to `max_repeat`.

    Clips of one subclass are taken equally often, some once more; which ones, a hash of seed and key says.

    Args:
        keys: of the clips, each once.
        weights: share of a primary class against the others; classes that it leaves out have 1.
        size: the sum of the counts; 0: as many as there are clips. Less where all clips of the classes that have a
            weight, each `max_repeat` times, are less.
    """
    codes, classes = _coded(primary, subclass)
    clips = np.bincount(codes, minlength=len(classes))
    order = np.lexsort((_hashes(keys, seed), codes))
    place = np.empty(len(codes), np.int64)  # of a clip among those of its class
    place[order] = np.arange(len(codes)) - np.repeat(np.cumsum(clips) - clips, clips)
    total = _class_totals(classes, clips * max_repeat, weights, size or len(keys))
    every, more = np.divmod(total, np.maximum(clips, 1))
    return every[codes] + (place < more[codes])


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, or to all caps of positive weights if that is less, in the weights' shares.

    None is above its cap, and what a cap leaves over is shared by the others. With a larger total no number is
    smaller (Webster's method; largest remainders would take from some), and of equal claims the first goes first.
    """
    limits = [cap if weight > 0 else 0 for weight, cap in zip(weights, caps, strict=True)]
    total = min(total, sum(limits))
    # Exact shares are at most half a unit for each class away; from below them the rest is handed out one by one.
    level = _water_level(total, weights, limits)
    slack = len(limits) // 2 + 1
    counts = [max(0, int(min(limit, level * weight)) - slack) for weight, limit in zip(weights, limits, strict=True)]
    claims = [
        ((count + 0.5) / weight, number)
        for number, (weight, count, limit) in enumerate(zip(weights, counts, limits, strict=True))
        if count < limit
    ]
    heapq.heapify(claims)
    for _ in range(total - sum(counts)):
        _, number = heapq.heappop(claims)
        counts[number] += 1
        if counts[number] < limits[number]:
            heapq.heappush(claims, ((counts[number] + 0.5) / weights[number], number))
    return counts


def parse_weights(text: str, classes: Collection[str]) -> dict[str, float]:
    """Weights of primary classes from `human=1.5,animals=0.5`.

    Raises:
        ConfigError: a class that there is not, or one that is there twice.
    """
    weights: dict[str, float] = {}
    for part in filter(str.strip, text.split(",")):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in classes:
            raise ConfigError(f"balance.weights: there is no class {name!r}; the classes are {', '.join(classes)}")
        if name in weights:
            raise ConfigError(f"balance.weights has {name!r} twice; give it one weight")
        weights[name] = float(number)
    return weights


def _class_totals(
    classes: Sequence[tuple[str, str]], caps: NDArray[np.int64], weights: Mapping[str, float], size: int
) -> Counts:
    """How many clips, repeats counted, each of the sorted classes has in the set."""
    members: dict[str, list[int]] = {}
    for number, (primary, _) in enumerate(classes):
        members.setdefault(primary, []).append(number)
    primary_caps = [int(caps[numbers].sum()) for numbers in members.values()]
    primary_totals = apportion(size, [weights.get(primary, 1.0) for primary in members], primary_caps)
    totals = np.zeros(len(classes), np.int64)
    for total, numbers in zip(primary_totals, members.values(), strict=True):
        totals[numbers] = apportion(total, [1.0] * len(numbers), [int(caps[number]) for number in numbers])
    return totals


def _water_level(total: int, weights: Sequence[float], limits: Sequence[int]) -> float:
    """The level at which the smaller of limit and level times weight, over all classes, sum to `total`."""
    open_classes = sorted(
        (limit / weight, limit, weight) for weight, limit in zip(weights, limits, strict=True) if limit
    )
    rest, open_weight = float(total), sum(weight for _, _, weight in open_classes)
    for full_at, limit, weight in open_classes:
        if rest <= full_at * open_weight:
            return rest / open_weight
        rest, open_weight = rest - limit, open_weight - weight
    return open_classes[-1][0] if open_classes else 0.0


def _coded(primary: Sequence[str], subclass: Sequence[str]) -> tuple[NDArray[np.int64], list[tuple[str, str]]]:
    """Each clip's class as a number, and the classes, sorted, that the numbers are of."""
    pairs = list(zip(primary, subclass, strict=True))
    classes = sorted(set(pairs))
    numbers = {pair: number for number, pair in enumerate(classes)}
    return np.fromiter((numbers[pair] for pair in pairs), np.int64, len(pairs)), classes


def _hashes(keys: Sequence[str], seed: int) -> NDArray[np.uint64]:
    salt = derive_seed(seed, "balance")
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode(), salt) for key in keys), np.uint64, len(keys))
