"""How evenly the planner shares a step's FLOPs over the ranks: `python -m benchmarks.balance [--json]`.

A 480p mix at 24 frames a second, half images, half videos of 2 to 10 s, in six aspects, with captions of 16 to 256
tokens; FLOPs of the 8B model by the one formula. A rank's budget is the longest video. Imbalance is the dearest rank
over the mean rank, minus 1. Beside the planner, on the same samples in the same order:
  padding:    a random batch a rank, padded to its longest;
  first-fit:  packs as long as the longest video, filled by length (first fit decreasing in windows of 512 samples);
  ranges:     one shape a batch, batch sizes tuned for the longest of a range of durations, as Open-Sora 2.0's table is;
  buckets:    one shape a batch, the batch size of each shape tuned to the budget;
  LPT:        the planner's batches, shared out by the longest processing time rule under the same cap.
A pack may hold two longest videos. The second table caps it at one, so that a rank runs several micro-batches: FSDP
ties the ranks at each, and a step costs the sum over the micro-batches of the dearest pack.
"""

import statistics
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks._measure import alternate, arguments, device_name, median_ms, report
from goku_mega.data.planner import Planner
from goku_mega.model.sizes import model_shape
from goku_mega.plan.flops import training_flops

SHAPE = model_shape("8b")
SIZES = ((480, 864), (864, 480), (480, 720), (480, 640), (640, 480), (480, 480))
"""Height and width in pixels: the short side is 480."""
VAE_STRIDES = (4, 8, 8)
FRAMES_PER_SECOND, LONGEST_S = 24, 10
TEXT_TOKENS = (16, 256)
CAP = 2.0
"""Token cap of a pack in longest videos."""
STEPS = 200
WINDOW = 512
PLANNED = 512
"""Samples of the step whose planning is timed."""


class Mix(NamedTuple):
    """Samples of an index."""

    size: np.ndarray  # [samples]: place in SIZES
    frames: np.ndarray  # [samples]: latent frames
    tokens: np.ndarray  # [samples]
    text: np.ndarray  # [samples]: text tokens
    flops: np.ndarray  # [samples]

    @property
    def longest(self) -> int:
        return int(self.tokens.max())


class Shared(NamedTuple):
    """How one method shared its steps."""

    costs: list[np.ndarray]
    """Of each step: FLOPs [ranks, micro-batches]."""
    tokens: list[np.ndarray]
    """Of each step: processed tokens [ranks, micro-batches]."""
    real: float
    """Real tokens over processed ones."""


def draw_mix(samples: int, seed: int = 0) -> Mix:
    rng = np.random.default_rng(seed)
    size = rng.integers(len(SIZES), size=samples)
    video_frames = (rng.uniform(2, LONGEST_S, samples) * FRAMES_PER_SECOND).astype(int) + 1
    frames = (np.where(rng.random(samples) < 0.5, 1, video_frames) - 1) // VAE_STRIDES[0] + 1
    text = rng.integers(TEXT_TOKENS[0], TEXT_TOKENS[1], samples, endpoint=True)
    tokens = np.array([count_tokens(*shape) for shape in zip(size.tolist(), frames.tolist(), strict=True)])
    return Mix(size, frames, tokens, text, flops_of(tokens, text))


def count_tokens(size: int, frames: int) -> int:
    (height, width), (_, down, across), (pt, ph, pw) = SIZES[size], VAE_STRIDES, SHAPE.patch
    return (frames // pt) * (height // down // ph) * (width // across // pw)


def flops_of(tokens: np.ndarray, text: np.ndarray) -> np.ndarray:
    return np.array([training_flops(*pair, SHAPE) for pair in zip(tokens.tolist(), text.tolist(), strict=True)])


def budget_samples(mix: Mix, ranks: int, budget: float = 1) -> int:
    """Samples of a step, on average, with `budget` longest videos a rank."""
    return max(1, round(ranks * budget * mix.flops.max() / mix.flops.mean()))


def by_planner(mix: Mix, ranks: int, *, steps: int, budget: float = 1, cap: float = CAP) -> Shared:
    planner = Planner(mix.flops, mix.tokens, seed=1, samples_per_step=budget_samples(mix, ranks, budget))
    plans = (planner.plan(step, dp_ranks=ranks, max_tokens_per_rank=int(cap * mix.longest)) for step in range(steps))
    return shared(mix, (plan.micro_batches for plan in plans))


def by_lpt(mix: Mix, ranks: int, *, steps: int, budget: float = 1, cap: float = CAP) -> Shared:
    """The planner's global batches; the dearest sample left goes to the cheapest pack with room."""
    planner = Planner(mix.flops, mix.tokens, seed=1, samples_per_step=budget_samples(mix, ranks, budget))
    most = int(cap * mix.longest)
    batches = [planner.plan(step, dp_ranks=1, max_tokens_per_rank=mix.tokens.sum()).batch for step in range(steps)]
    return shared(mix, (longest_first(mix, np.array(batch), ranks, most) for batch in batches))


def longest_first(mix: Mix, batch: np.ndarray, ranks: int, cap: int) -> list[list[list[int]]]:
    micro = -(-int(mix.tokens[batch].sum()) // (cap * ranks))
    while True:
        costs, tokens = np.zeros(ranks * micro, dtype=np.int64), np.zeros(ranks * micro, dtype=np.int64)
        packs: list[list[int]] = [[] for _ in costs]
        for sample in batch[np.argsort(-mix.flops[batch], kind="stable")].tolist():
            room = tokens + mix.tokens[sample] <= cap
            if not room.any():
                break
            chosen = int(np.argmin(np.where(room, costs, np.iinfo(np.int64).max)))
            packs[chosen].append(sample)
            costs[chosen] += mix.flops[sample]
            tokens[chosen] += mix.tokens[sample]
        else:
            dearest_first = [packs[pack] for pack in np.argsort(-costs, kind="stable").tolist()]
            return [dearest_first[rank::ranks] for rank in range(ranks)]
        micro += 1


def by_first_fit(mix: Mix, ranks: int, *, steps: int) -> Shared:
    """Packs of a window are dealt in the order they were opened: neighbours are alike, which favours this side."""
    packs = [pack for window in windows(mix) for pack in first_fit(mix, window)]
    # What a pack lacks is padding: one more sample that is processed like others.
    tokens = np.array([mix.tokens[pack].sum() for pack in packs])
    padding = mix.longest - tokens
    flops = np.array([mix.flops[pack].sum() for pack in packs]) + (padding > 0) * flops_of(padding, 0 * padding)
    processed = np.full(len(packs), mix.longest)
    return dealt(flops, processed, ranks, steps, real=tokens.sum() / processed.sum())


def windows(mix: Mix) -> list[np.ndarray]:
    order = np.arange(len(mix.tokens))
    return np.split(order, range(WINDOW, len(order), WINDOW))


def first_fit(mix: Mix, window: np.ndarray) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for sample in window[np.argsort(-mix.tokens[window], kind="stable")].tolist():
        length = int(mix.tokens[sample])
        pack = next((number for number, left in enumerate(room) if left >= length), len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(mix.longest)
        packs[pack].append(sample)
        room[pack] -= length
    return packs


def by_padding(mix: Mix, ranks: int, *, steps: int) -> Shared:
    count = budget_samples(mix, 1)
    whole = len(mix.tokens) // count * count
    tokens, text = (column[:whole].reshape(-1, count) for column in (mix.tokens, mix.text))
    flops = count * flops_of(tokens.max(1), text.max(1))
    processed = count * tokens.max(1)
    return dealt(flops, processed, ranks, steps, real=tokens.sum() / processed.sum())


def by_buckets(mix: Mix, ranks: int, *, steps: int, range_s: float | None) -> Shared:
    """Batches of one shape, shuffled.

    Args:
        range_s: seconds of video that share a batch size; None: every shape has its own.
    """
    per_range = round(range_s * FRAMES_PER_SECOND / VAE_STRIDES[0]) if range_s else 1
    flops, processed = [], []
    for size, frames in sorted({*zip(mix.size.tolist(), mix.frames.tolist(), strict=True)}):
        inside = np.flatnonzero((mix.size == size) & (mix.frames == frames))
        tuned_for = 1 if frames == 1 else -(-frames // per_range) * per_range
        length = count_tokens(size, tuned_for)
        cost = training_flops(length, TEXT_TOKENS[1], SHAPE)
        count = max(1, min(int(mix.flops.max() // cost), int(CAP * mix.longest) // length))
        for batch in inside[: len(inside) // count * count].reshape(-1, count):
            flops.append(mix.flops[batch].sum())
            processed.append(mix.tokens[batch].sum())
    order = np.random.default_rng(2).permutation(len(flops))
    return dealt(np.array(flops)[order], np.array(processed)[order], ranks, steps, real=1.0)


def dealt(flops: np.ndarray, processed: np.ndarray, ranks: int, steps: int, *, real: float) -> Shared:
    """Batches dealt to the ranks in order, one a step."""
    steps = min(steps, len(flops) // ranks)
    costs, tokens = (column[: steps * ranks].reshape(steps, ranks, 1) for column in (flops, processed))
    return Shared(list(costs), list(tokens), float(real))


def shared(mix: Mix, plans: Iterator) -> Shared:
    costs, tokens = [], []
    for plan in plans:
        costs.append(np.array([[mix.flops[list(pack)].sum() for pack in of_rank] for of_rank in plan]))
        tokens.append(np.array([[mix.tokens[list(pack)].sum() for pack in of_rank] for of_rank in plan]))
    return Shared(costs, tokens, 1.0)


def imbalance(result: Shared) -> dict[str, float]:
    """Percent over the steps: of the ranks' totals, and of a step in which the ranks wait at every micro-batch."""
    of_rank = [float(cost.sum(1).max() / cost.sum(1).mean() - 1) for cost in result.costs]
    tied = [float(cost.max(0).sum() / cost.sum(1).mean() - 1) for cost in result.costs]
    return {
        "mean_percent": percent(statistics.fmean(of_rank)),
        "p95_percent": percent(float(np.quantile(of_rank, 0.95))),
        "tied_mean_percent": percent(statistics.fmean(tied)),
        "real_tokens_percent": percent(result.real),
        "padding_percent": percent(1 - result.real),
        "micro_batches": round(statistics.fmean(cost.shape[1] for cost in result.costs), 2),
        "steps": len(result.costs),
    }


def percent(share: float) -> float:
    return round(100 * share, 2)


def planning_ms(mix: Mix, repeats: int) -> dict[str, float]:
    """Milliseconds to plan a step of 512 samples on the ranks that 512 samples are a budget for; median over steps."""
    ranks = round(PLANNED / budget_samples(mix, 100) * 100)
    planner = Planner(mix.flops, mix.tokens, seed=1, samples_per_step=PLANNED)
    batches = (planner.plan(step, dp_ranks=1, max_tokens_per_rank=mix.tokens.sum()).batch for step in range(10**6))
    steps, cap = iter(range(10**6)), int(CAP * mix.longest)
    seconds = alternate(
        {
            "planner": lambda: planner.plan(next(steps), dp_ranks=ranks, max_tokens_per_rank=cap),
            "LPT": lambda: longest_first(mix, np.array(next(batches)), ranks, cap),
        },
        repeats=repeats,
    )
    return {"ranks": ranks, **{name: median_ms(values) for name, values in seconds.items()}}


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    methods = {
        "padding": by_padding,
        "first-fit": by_first_fit,
        "ranges": lambda mix, ranks, steps: by_buckets(mix, ranks, steps=steps, range_s=2),
        "buckets": lambda mix, ranks, steps: by_buckets(mix, ranks, steps=steps, range_s=None),
        "LPT": by_lpt,
        "planner": by_planner,
    }
    mix = draw_mix(int(1.05 * STEPS * 256 * 6.2))
    tables = {
        ranks: {name: imbalance(share(mix, ranks, steps=STEPS)) for name, share in methods.items()}
        for ranks in (32, 8, 256)
    }
    lines = ["ranks  method     imbalance mean    p95   real tokens   padding"]
    lines += [
        f"{ranks:5}  {name:9} {row['mean_percent']:12.2f} % {row['p95_percent']:6.2f} %"
        f" {row['real_tokens_percent']:9.1f} % {row['padding_percent']:7.1f} %"
        for ranks, table in tables.items()
        for name, row in table.items()
    ]
    tied = {
        budget: {
            name: imbalance(share(mix, 32, steps=25, budget=budget, cap=1))
            for name, share in (("LPT", by_lpt), ("planner", by_planner))
        }
        for budget in (1, 2, 4, 8)
    }
    lines.append("packs capped at the longest video, 32 ranks: what a step costs above the mean rank")
    lines += [
        f"budget {budget}: LPT {rows['LPT']['tied_mean_percent']:6.2f} %, planner"
        f" {rows['planner']['tied_mean_percent']:6.2f} % in {rows['planner']['micro_batches']} micro-batches"
        for budget, rows in tied.items()
    ]
    timed = planning_ms(mix, options.repeats)
    lines.append(f"planning {PLANNED} samples on {timed['ranks']} ranks: {timed['planner']} ms (LPT {timed['LPT']} ms)")
    ours, lpt = tables[32]["planner"], tables[32]["LPT"]
    report(
        options,
        lines,
        {
            "name": "balance",
            "value": ours["mean_percent"],
            "unit": "percent FLOP imbalance (max / mean - 1), mean over steps, 32 ranks",
            "baseline": {name: row["mean_percent"] for name, row in tables[32].items() if name != "planner"},
            "ratio": round(ours["mean_percent"] / lpt["mean_percent"], 3),
            "p95_percent": ours["p95_percent"],
            "real_tokens_percent": ours["real_tokens_percent"],
            "planner_ms_for_512_samples": timed["planner"],
            "planning": timed,
            "token_cap_in_longest": CAP,
            "tokens_of_samples": [int(mix.tokens.min()), mix.longest],
            "by_ranks": tables,
            "capped_at_longest": tied,
            "repeats": options.repeats,
            "device": device_name(),
        },
    )


if __name__ == "__main__":
    main()
