"""Effective training time under failures: a simulation, the closed form beside it, and the interval between saves.

Every second of a job is in one class, as in `goku-ops`: productive, recomputed, saving, start_up, detection, restart or
waiting_for_nodes. The share that is productive is the effective training time ratio (ETTR). No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from goku_mega.plan.failures import DAY_S, Cause

CLASSES = ("productive", "recomputed", "saving", "start_up", "detection", "restart", "waiting_for_nodes")
Seconds = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A job, what befalls it, and how long everything takes."""

    causes: Sequence[Cause]
    interval_s: float
    """Training between two saves."""
    blocked_s: float = 0.0
    """What a save costs the training: stopped, or slowed while it is written."""
    commit_s: float = 0.0
    """From a save until a restart can use it."""
    load_s: float = 0.0
    store_commit_s: float = 0.0
    """From a save until it is in the store, too."""
    store_load_s: float = 0.0
    start_s: float = 0.0
    """A cold start: at first, and after a requeue."""
    both_lost: float = 0.0
    """Share of the failures with `replaces_node` after which only the store has what is needed."""
    requeued: float = 0.0
    """Share of all failures that end in a requeue."""
    nodes: int = 1
    spares: int = 1
    repair_s: float = 0.0
    """Until a node that was replaced is a spare."""
    group_nodes: int = 1
    """Nodes that a job does without for each that is missing."""

    @property
    def per_s(self) -> float:
        """Failures per second."""
        return sum(cause.per_day for cause in self.causes) / DAY_S


def simulate(scenario: Scenario, *, days: float, repeats: int, seed: int) -> dict[str, Seconds]:
    """Play a job through from failure to failure, many times at once.

    Failures come without memory, during recoveries, too, which then begin anew. A save that is not committed when a
    failure comes does not count. With no spare left, the job goes on with fewer nodes until its next restart; what
    it lacks is in `waiting_for_nodes`.

    Returns:
        Seconds in each class of `CLASSES`, each [repeats]; they sum to the days.
    """
    rng = np.random.default_rng(seed)
    end_s = days * DAY_S
    rates = np.array([cause.per_day for cause in scenario.causes])
    detection_s, restart_s = (
        np.array([getattr(cause, name) for cause in scenario.causes]) for name in ("detection_s", "restart_s")
    )
    replaces = np.array([cause.replaces_node for cause in scenario.causes])
    accounts = {name: np.zeros(repeats) for name in CLASSES}
    still = {"detection": np.zeros(repeats), "restart": np.zeros(repeats)}
    still["start_up"] = np.full(repeats, scenario.start_s)
    # Work is counted in seconds of undisturbed training, checkpoints by their number.
    now, furthest, speed = np.zeros(repeats), np.zeros(repeats), np.ones(repeats)
    saved, stored = np.zeros(repeats), np.zeros(repeats)
    repaired_s = np.zeros((repeats, scenario.spares + math.ceil(scenario.nodes / scenario.group_nodes)))
    everyone = np.arange(repeats)
    while (now < end_s).any():
        gap = rng.exponential(1 / scenario.per_s, repeats) if scenario.per_s else np.full(repeats, np.inf)
        cause = rng.choice(len(rates), repeats, p=rates / rates.sum()) if scenario.per_s else np.zeros(repeats, int)
        left = np.minimum(now + gap, end_s) - now
        now += left
        for name, seconds in still.items():
            used = np.minimum(left, seconds)
            accounts[name] += used
            left -= used
        cycle = scenario.interval_s / speed + scenario.blocked_s
        cycles = np.floor(left / cycle)
        working = cycles * scenario.interval_s / speed
        working += np.minimum(left - cycles * cycle, scenario.interval_s / speed)
        accounts["saving"] += left - working
        accounts["waiting_for_nodes"] += working * (1 - speed)
        reached = saved * scenario.interval_s + working * speed
        new = np.maximum(reached - furthest, 0)
        accounts["productive"] += new
        accounts["recomputed"] += working * speed - new
        furthest += new
        stored = np.maximum(stored, saved + np.floor((left - scenario.store_commit_s) / cycle))
        saved += np.maximum(np.floor((left - scenario.commit_s) / cycle), 0)
        requeued = rng.random(repeats) < scenario.requeued
        from_store = requeued | (replaces[cause] & (rng.random(repeats) < scenario.both_lost))
        saved = np.where(from_store, stored, saved)
        load_s = np.where(from_store, scenario.store_load_s, scenario.load_s)
        still["detection"] = detection_s[cause]
        still["restart"] = np.where(requeued, scenario.start_s, restart_s[cause]) + load_s
        still["start_up"] = np.zeros(repeats)
        oldest = repaired_s.argmin(1)
        repaired_s[everyone, oldest] = np.where(replaces[cause], now + scenario.repair_s, repaired_s.min(1))
        missing = np.maximum((repaired_s > now[:, None]).sum(1) - scenario.spares, 0)
        speed = 1 - np.minimum(missing * scenario.group_nodes / scenario.nodes, 0.99)
    return accounts


def effective_share(scenario: Scenario, *, days: float, repeats: int, seed: int) -> float:
    """Productive seconds over all, by simulation, mean of the repeats."""
    return float(simulate(scenario, days=days, repeats=repeats, seed=seed)["productive"].mean()) / (days * DAY_S)


def closed_form(scenario: Scenario, interval_s: float | None = None) -> float:
    """The same share by Daly's formula (Future Generation Computer Systems 22, 2006), which is exact for saves that
    are committed at once and recoveries of one length; here recoveries have their mean length, and a commit that
    comes later is as so much more recovery. Cold starts at the beginning and missing nodes are not in it.
    """
    interval_s = scenario.interval_s if interval_s is None else interval_s
    rate = scenario.per_s
    if not rate:
        return interval_s / (interval_s + scenario.blocked_s)
    recovery_s = mean_recovery_s(scenario) + scenario.commit_s
    wall_s = math.exp(rate * recovery_s) * math.expm1(rate * (interval_s + scenario.blocked_s)) / rate
    return interval_s / wall_s


def mean_recovery_s(scenario: Scenario) -> float:
    """Seconds from a failure to the first step after it, mean over the causes; 0 where nothing fails."""
    total, everything = 0.0, sum(cause.per_day for cause in scenario.causes)
    if not everything:
        return 0.0
    for cause in scenario.causes:
        store = scenario.requeued + (1 - scenario.requeued) * scenario.both_lost * cause.replaces_node
        total += cause.per_day * (
            cause.detection_s
            + (1 - scenario.requeued) * cause.restart_s
            + scenario.requeued * scenario.start_s
            + store * scenario.store_load_s
            + (1 - store) * scenario.load_s
        )
    return total / everything


def steps_between_saves(scenario: Scenario, step_s: float) -> int:
    """The number of steps that loses least by the closed form, and not less than a save takes: they do not overlap."""
    least = max(1, math.ceil(max(scenario.commit_s, scenario.store_commit_s) / step_s))
    optimum_s = math.sqrt(2 * scenario.blocked_s / scenario.per_s) if scenario.per_s else DAY_S  # Young's
    most = least + math.ceil(4 * optimum_s / step_s)
    return max(range(least, most + 1), key=lambda steps: closed_form(scenario, steps * step_s))
