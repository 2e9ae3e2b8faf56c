"""What watches the ranks from snapshot to snapshot: time limits that learn, slow ranks, jumps of the loss.

No clock and no files: a detector sees values and keeps the few that it needs. What a restarted controller must still
know goes out as JSON and comes in again.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from goku_infra.diagnosis import culprit
from goku_infra.diagnosis.stacks import STOPPED
from goku_infra.views import Finding, RankView

FLOORS_S = {
    "start": 600.0, "load": 600.0, "data": 120.0, "forward": 120.0, "backward": 120.0, "optimizer": 120.0,
    "checkpoint": 600.0, "leave": 600.0,
}  # fmt: skip
"""Shortest limit of a phase: what is slow but sound on a busy file system or network."""
OUTSIDE_STEPS = ("start", "load", "leave")
OUTSIDE_FACTOR = 10.0
"""With one floor for all phases, how much longer a start or an end may take than a phase of a step."""
THREADLESS = ("start", "leave")
"""Phases in which a rank's liveness thread may not run."""
FIRST_STEP_S = 600.0
"""Shortest limit of the phases of a start's first step, which may compile and warm up."""
LEARNING_FACTOR = 5.0
LEARNING_STEPS = 3
STOPPED_S = 3.0
"""A process that is stopped for so long was not stopped by a tool that looks at it."""
HEARD_S = 1.0
"""A rank that its agent has not described for longer may have done anything since: its ages are not counted on."""
STARVED_FACTOR = 4.0
"""How many times as long as its limit a phase may take at most, however little of the time a core was free."""


class PhaseLimits:
    """How long a rank may stay in a phase: at least a floor, at most five times the longest that was sound.

    Args:
        floor_s: one floor for all phases of a step; a start may take ten times as long. None: `FLOORS_S`.
        alive_limit_s: how long a rank's liveness thread may be silent, whatever the phase: one long call that keeps
            Python's lock is sound.
    """

    def __init__(self, floor_s: float | None = None, alive_limit_s: float = 30.0) -> None:
        self.alive_limit_s = alive_limit_s
        self._floors = dict(FLOORS_S)
        self._first_step_s = FIRST_STEP_S
        if floor_s:
            self._floors = {phase: floor_s * (OUTSIDE_FACTOR if phase in OUTSIDE_STEPS else 1.0) for phase in FLOORS_S}
            self._first_step_s = floor_s
        self._longest: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._first_step: int | None = None
        self._last: dict[int, RankView] = {}
        self._began: dict[int, RankView] = {}
        """The first view of each rank in what it does now: a step, or one of `OUTSIDE_STEPS`."""

    def limit_s(self, phase: str, step: int) -> float:
        """How long a rank that has done `step` steps may stay in `phase`."""
        floor_s = self._floors[phase]
        if phase not in OUTSIDE_STEPS and (self._first_step is None or step <= self._first_step):
            floor_s = max(floor_s, self._first_step_s)
        if self._seen.get(phase, 0) < LEARNING_STEPS:
            return floor_s
        return max(floor_s, LEARNING_FACTOR * self._longest[phase])

    def starved_s(self, ranks: Sequence[RankView]) -> float:
        """How long a rank has waited for a core since it began its step: the longest, for all others wait for it.

        Nobody ran in that time, so nobody was stuck in it. Call it at every look.
        """
        longest_s = 0.0
        for rank in ranks:
            began = self._began.get(rank.rank)
            if began is None or not _is_same_work(began, rank):
                self._began[rank.rank] = rank
            elif rank.delayed_s - began.delayed_s > longest_s:
                longest_s = rank.delayed_s - began.delayed_s
        return longest_s

    def observe(self, ranks: Sequence[RankView]) -> None:
        """Learn from a snapshot: the phases that ranks have left since the one before.

        Never one that a rank is still in: the age of a hang would raise its own limit.
        """
        finished: dict[tuple[str, int], float] = {}
        for rank in ranks:
            before = self._last.get(rank.rank)
            self._last[rank.rank] = rank
            if before is None or before.pid != rank.pid:
                continue
            if (before.phase, before.step) != (rank.phase, rank.step):
                place = (before.phase, before.step)
                finished[place] = max(finished.get(place, 0.0), before.phase_age_s)
        for (phase, _), age_s in finished.items():
            self._seen[phase] = self._seen.get(phase, 0) + 1
            self._longest[phase] = max(self._longest.get(phase, 0.0), age_s)
        training = [rank.step for rank in ranks if rank.phase not in OUTSIDE_STEPS]
        if training and self._first_step is None:
            self._first_step = min(training)

    def begin_generation(self) -> None:
        """The ranks start anew: their first step may be slow again. What was learned stays."""
        self._first_step = None
        self._last, self._began = {}, {}

    def to_json(self) -> dict[str, Any]:
        return {"longest": self._longest, "seen": self._seen, "first_step": self._first_step}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on with what an earlier controller had learned."""
        self._longest, self._seen = dict(saved["longest"]), dict(saved["seen"])
        self._first_step = saved["first_step"]


def find_hang(ranks: Sequence[RankView], limits: PhaseLimits) -> Finding | None:
    """The ranks that a run waits for if one has been still for too long; without their stacks, so a first guess.

    Ranks that have ended are not looked at: their end is a finding of its own.
    """
    running = [rank for rank in ranks if rank.exit_code is None]
    starved_s = limits.starved_s(running)
    longest_s: dict[tuple[str, int], _Longest] = {}
    for rank in running:
        place = rank.phase, rank.step
        longest = longest_s.get(place) or longest_s.setdefault(place, _longest(limits, starved_s, *place))
        if _is_overdue(rank, longest):
            return culprit.blame(running, {})
    return None


class _Longest(NamedTuple):
    """How long a rank may be in a phase of a step, s, and how long its liveness thread may be silent meanwhile."""

    phase_s: float
    alive_s: float
    stopped_s: float
    """The same of a process that is stopped: it does not wait for a core."""


def _longest(limits: PhaseLimits, starved_s: float, phase: str, step: int) -> _Longest:
    limit_s = limits.limit_s(phase, step)
    alive_s = limit_s if phase in THREADLESS else min(limit_s, limits.alive_limit_s)
    return _Longest(
        min(limit_s + starved_s, STARVED_FACTOR * limit_s), min(alive_s + starved_s, STARVED_FACTOR * alive_s),
        min(limit_s, STOPPED_S),
    )  # fmt: skip


def _is_overdue(rank: RankView, longest: _Longest) -> bool:
    unheard_s = rank.heard_age_s - HEARD_S if rank.heard_age_s > HEARD_S else 0.0
    alive_s = longest.stopped_s if rank.process_state in STOPPED else longest.alive_s
    return rank.phase_age_s - unheard_s > longest.phase_s or rank.alive_age_s - unheard_s > alive_s


def _is_same_work(one: RankView, other: RankView) -> bool:
    """Whether a rank is still at it: at the same step, whatever its phase there, or the same start or end."""
    if one.step != other.step or one.pid != other.pid:
        return False
    return one.phase == other.phase or (one.phase not in OUTSIDE_STEPS and other.phase not in OUTSIDE_STEPS)


@dataclass(frozen=True)
class _Window:
    """What every rank did in some seconds."""

    steps: int
    busy_s: dict[int, float]
    delayed_s: dict[int, float]


class Stragglers:
    """Finds ranks that work longer for a step than the rest, though collectives make all steps last alike.

    Every rank's main thread is sampled as busy or as waiting for others. A window is full when the ranks have done so
    for `window_s`. A rank is slow if over the last windows its busy seconds per step exceed the ranks' median by more
    than `threshold` (a share), by more than chance and by more than the ranks differ from each other anyway, and if it
    did so in nearly every one of them: a pause in one window is not a slow machine.

    What a rank waits for a core counts as its work: a node whose cores others take is slow, too. The finding tells it.
    Where all ranks wait for cores, who waits longer is the scheduler's whim: an excess below the usual share of that
    wait is nobody's fault.

    Not seen here: a GPU that is slow while its process waits for it, which counts as waiting on every rank.

    Args:
        window_s: length of a window.
        windows: full windows in a row that are needed.
        threshold: least excess that is named.
    """

    CHANCE = 1e-4
    """How likely a window of equal ranks may show one that is slow by chance."""
    SPREAD = 4.0
    """Robust standard deviations between ranks above the median."""
    MEMORY = 6
    """A small excess is looked for in the last MEMORY x windows, too: chance averages out."""
    FEW = 8
    """At most every FEW-th rank, but always one: more of them are a layout whose ranks have unlike work."""
    CROWDED = 0.02
    """Share of its time that a rank waits for a core, above which that is told with it."""

    def __init__(self, window_s: float = 10.0, windows: int = 5, threshold: float = 0.05) -> None:
        self.window_s = window_s
        self.windows = windows
        self.threshold = threshold
        self._nodes: dict[int, str] = {}
        self._pids: dict[int, int] = {}
        self._start: dict[int, RankView] = {}
        self._past: deque[_Window] = deque(maxlen=windows * self.MEMORY)
        self._found: Finding | None = None

    def observe(self, ranks: Sequence[RankView]) -> None:
        """Take a snapshot; ranks of another start than before begin anew."""
        pids = {rank.rank: rank.pid for rank in ranks}
        if pids != self._pids:
            self._past.clear()
            self._start, self._found = {}, None
            self._pids, self._nodes = pids, {rank.rank: rank.node for rank in ranks}
        if any(rank.phase in OUTSIDE_STEPS for rank in ranks):
            return
        if not self._start:
            self._start = {rank.rank: rank for rank in ranks}
            return
        starts = [self._start[rank.rank] for rank in ranks]
        steps = min(rank.step - start.step for rank, start in zip(ranks, starts, strict=True))
        sampled_s = [_sampled_s(rank) - _sampled_s(start) for rank, start in zip(ranks, starts, strict=True)]
        if steps > 0 and statistics.median(sampled_s) >= self.window_s:
            delayed_s = {rank.rank: rank.delayed_s - self._start[rank.rank].delayed_s for rank in ranks}
            self._past.append(_Window(steps, self._busy_s(ranks), delayed_s))
            self._start = {rank.rank: rank for rank in ranks}
            self._judge()

    def _busy_s(self, ranks: Sequence[RankView]) -> dict[int, float]:
        """Busy seconds in the window, as if all ranks had been sampled for equally long."""
        busy_s = {rank.rank: rank.busy_s - self._start[rank.rank].busy_s for rank in ranks}
        sampled_s = {rank.rank: _sampled_s(rank) - _sampled_s(self._start[rank.rank]) for rank in ranks}
        usual = statistics.median(sampled_s.values())
        return {rank: seconds * usual / max(sampled_s[rank], 1e-9) for rank, seconds in busy_s.items()}

    def finding(self) -> Finding | None:
        """The slow ranks, told once: it takes as many new windows to name them again."""
        found, self._found = self._found, None
        return found

    def _judge(self) -> None:
        past = list(self._past)
        for count in dict.fromkeys((self.windows, len(past))):
            if self._found is None and self.windows <= count <= len(past):
                self._found = self._slow(past[-count:])
        if self._found:
            self._past.clear()

    def _slow(self, past: Sequence[_Window]) -> Finding | None:
        names = list(past[0].busy_s)
        if len(names) < 2:
            return None
        excesses = [_excess_of_ranks(window.busy_s) for window in past]
        by_rank = {rank: [excess[rank] for excess in excesses] for rank in names}
        means = {rank: statistics.fmean(values) for rank, values in by_rank.items()}
        noise = statistics.median(statistics.stdev(values) for values in by_rank.values()) / math.sqrt(len(past))
        middle = statistics.median(means.values())
        spread = 1.4826 * statistics.median(abs(mean - middle) for mean in means.values())
        chance = statistics.NormalDist().inv_cdf(1 - self.CHANCE / len(names)) * noise
        crowded = statistics.median(_delayed_share(past, rank) for rank in names)
        limit = max(self.threshold, chance, crowded, self.SPREAD * spread if len(names) >= self.FEW else 0.0)
        slow = [
            rank
            for rank in names
            if means[rank] > limit and _share_above(by_rank[rank], self.threshold / 2) >= 0.8
        ]  # fmt: skip
        if not slow or len(slow) > max(1, len(names) // self.FEW):
            return None
        slow.sort(key=lambda rank: -means[rank])
        worst = slow[0]
        steps = sum(window.steps for window in past)
        per_step = sum(window.busy_s[worst] for window in past) / steps
        delayed = sum(window.delayed_s[worst] for window in past) / steps
        usual = per_step / (1 + means[worst])
        no_core = f"; for {delayed:.3g} s of each it could have run, but others had the cores of {self._nodes[worst]}"
        return Finding(
            cause="straggler",
            ranks=tuple(slow),
            node=self._nodes[worst],
            detail=f"works {per_step:.3g} s a step, {means[worst]:.0%} longer than the median of the ranks, {usual:.3g}"
            f" s, over {len(past)} windows of {self.window_s:g} s" + no_core * (delayed > self.CROWDED * per_step),
            data={"excess": {str(rank): round(means[rank], 4) for rank in slow}},
        )


def _sampled_s(rank: RankView) -> float:
    return rank.busy_s + rank.waiting_s


def _delayed_share(past: Sequence[_Window], rank: int) -> float:
    """Of a rank's time at work, what it waited for a core."""
    return sum(window.delayed_s[rank] for window in past) / max(sum(window.busy_s[rank] for window in past), 1e-9)


def _excess_of_ranks(busy_s: Mapping[int, float]) -> dict[int, float]:
    usual = statistics.median(busy_s.values()) or 1e-9
    return {rank: seconds / usual - 1 for rank, seconds in busy_s.items()}


def _share_above(values: Sequence[float], limit: float) -> float:
    return sum(value > limit for value in values) / len(values)


@dataclass
class _History:
    """Values of the last steps."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    last: tuple[int, float, float] | tuple[()] = ()
    """Newest step with its values, finite or not."""


class Spikes:
    """Finds a loss or a gradient norm that is not finite, or far above the median of the last steps.

    A high gradient norm must last for two steps. Healthy runs have single ones, whatever data they skip, and clipping
    has made them harmless; where the update has harmed the weights, the next step's gradient is high, too.

    Args:
        factor: how many times the median is a jump.
        window: steps of history.
        least: steps needed before a jump can be told.
    """

    def __init__(self, factor: float = 5.0, window: int = 100, least: int = 20) -> None:
        self.factor = factor
        self.window = window
        self.least = least
        self._history = _History()

    def observe(self, step: int, loss: float, norm: float) -> Finding | None:
        """Take the loss and the gradient norm of a step, each step once and in order.

        An earlier step than the last means that the run was rolled back to before it: what came after is forgotten.
        The same values of the same step again are passed over.
        """
        history = self._history
        if str(history.last) == str((step, loss, norm)):  # as text, for NaN is not equal to itself
            return None
        if history.last and step <= history.last[0]:
            self._forget_from(step)
        finding = self._not_finite(step, loss, norm)
        finding = finding or self._jump("loss_spike", "loss", step, loss, history.losses)
        norms = history.gradient_norms
        if norms and self._is_jump(norms[-1], norms[:-1]):
            finding = finding or self._jump("gradient_spike", "gradient norm", step, norm, norms)
        history.last = (step, loss, norm)
        if math.isfinite(loss) and math.isfinite(norm):
            history.steps.append(step)
            history.losses.append(loss)  # a jump, too: if it is the new level, the median will say so
            history.gradient_norms.append(norm)
            self._keep(slice(-self.window, None))
        return finding

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self._history))

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on with an earlier controller's history."""
        self._history = _History(**saved)
        self._history.last = tuple(saved["last"])

    def _forget_from(self, step: int) -> None:
        self._keep(slice(0, sum(seen < step for seen in self._history.steps)))

    def _keep(self, part: slice) -> None:
        history = self._history
        history.steps = history.steps[part]
        history.losses, history.gradient_norms = history.losses[part], history.gradient_norms[part]

    def _not_finite(self, step: int, loss: float, norm: float) -> Finding | None:
        if math.isfinite(loss) and math.isfinite(norm):
            return None
        return Finding(
            cause="nan_loss", detail=f"loss {loss:.4g}, gradient norm {norm:.4g} at step {step}", data={"step": step}
        )

    def _is_jump(self, value: float, past: Sequence[float]) -> bool:
        return len(past) >= self.least and value > self.factor * statistics.median(past) > 0

    def _jump(self, cause: str, name: str, step: int, value: float, past: Sequence[float]) -> Finding | None:
        if not self._is_jump(value, past):
            return None
        usual = statistics.median(past)
        text = f"{name} {value:.4g} at step {step} is {value / usual:.1f} times the median {usual:.4g}"
        return Finding(
            cause=cause, detail=f"{text} of {len(past)} steps", data={"step": step, "value": value, "median": usual}
        )
