"""Which layouts fit a number of devices, how fast they are, and why the others do not fit. No torch.

`goku-mega plan` prints it before a GPU is used; `train` asks whether its own layout fits, and what to recompute
where the recipe leaves that to the plan.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from goku_mega.config.planning import PlanConfig
from goku_mega.config.training import FlowRun, LayoutConfig, RecomputeConfig
from goku_mega.errors import ConfigError, LayoutError
from goku_mega.model.sizes import ModelShape, model_shape
from goku_mega.parallel.layout import Layout, divisors, resolve
from goku_mega.plan.activations import Numerics
from goku_mega.plan.devices import Gpu, gpu_named
from goku_mega.plan.goodput_report import goodput_report
from goku_mega.plan.memory import POLICIES, Job, RankMemory, rank_memory
from goku_mega.plan.speed import StepTime, step_time, utilisation
from goku_mega.plan.workload import Kind, Workload, video_tokens

logger = logging.getLogger(__name__)

GB = 1e9
MAX_CHUNKS = 2
"""Model chunks a pipeline stage is tried with."""
NOTES = (
    "GB of the fullest GPU at its fullest moment, and beside it the activations under each policy. With one pack a "
    "step, activations are at their fullest before there are gradients. exposed_s: communication that nothing hides. "
    "mfu: of the bf16 peak, recomputation not counted. Times are estimates that no GPU has been held against."
)


class Fit(NamedTuple):
    """A layout that fits, and what it is like."""

    job: Job
    recompute: RecomputeConfig
    memory: RankMemory
    time: StepTime
    mfu: float

    @property
    def layout(self) -> Layout:
        return self.job.layout


class TooLarge(NamedTuple):
    """A layout that does not fit under any policy, with the least it would need."""

    layout: Layout
    memory: RankMemory
    policy: str


class Device(NamedTuple):
    """What a rank of a run has."""

    name: str
    memory_bytes: float
    numerics: Numerics
    process_bytes: float = 0.0
    """What the process has without its model, where that is in the same memory."""


@dataclass(frozen=True)
class Search:
    """What became of every layout that was tried."""

    fits: list[Fit]
    """Best first."""
    too_large: list[TooLarge]
    refused: Counter[str]
    """Layouts that the model or the number of GPUs rules out, by reason."""


def plan(config: PlanConfig) -> dict[str, Any]:
    """`goku-mega plan`: the layouts that fit, best first, and why the others do not; or what failures cost.

    Raises:
        ConfigError: the size or the GPU is not known, or the longest sample is above the token cap; for what failures
            cost, no layout fits and the time of a step is not given.
    """
    shape, gpu = model_shape(config.size), gpu_named(config.gpu)
    work = workload(config, shape)
    numerics = Numerics(fused=config.fused)
    if config.goodput and config.faults.step_s:
        return goodput_report(config, config.faults.step_s)
    found = search(config, shape, gpu, work, numerics)
    if config.goodput:
        if not found.fits:
            raise ConfigError(f"no layout fits {config.gpus} x {config.gpu}; give faults.step_s, or use more GPUs")
        return goodput_report(config, found.fits[0].time.total)
    best = _distinct(found.fits)[: config.top]
    return {
        "model": f"{config.size} on {config.gpus} x {config.gpu} of {gpu.memory_gb:g} GB",
        "step": f"{work.samples} samples, {work.tokens:,.0f} tokens; the longest sample has {work.longest:,}",
        "fitting_layouts": len(found.fits),
        "best": [{"rank": rank, **_speed_row(fit)} for rank, fit in enumerate(best, 1)],
        "memory_gb": [{"rank": rank, **_memory_row(fit)} for rank, fit in enumerate(best, 1)],
        "too_large": _too_large_rows(found, gpu),
        "refused": _refused_rows(found.refused),
        "notes": NOTES,
    }


def workload(config: PlanConfig, shape: ModelShape) -> Workload:
    """The step that a plan is for.

    Raises:
        ConfigError: the longest sample is above the token cap.
    """
    count = len(config.frames)
    heights, widths = (sizes * count if len(sizes) == 1 else sizes for sizes in (config.height, config.width))
    shares = config.share if len(config.share) == count else (1.0,) * count
    kinds = tuple(
        Kind(video_tokens(frames, height, width, shape), config.text_tokens, share)
        for frames, height, width, share in zip(config.frames, heights, widths, shares, strict=True)
    )
    longest = max(kind.tokens for kind in kinds)
    cap = config.max_tokens_per_rank or longest
    if longest > cap:
        raise ConfigError(f"the longest sample has {longest} tokens, above max_tokens_per_rank={cap}; raise the cap")
    return Workload(kinds, config.samples_per_step or config.gpus, cap)


def search(config: PlanConfig, shape: ModelShape, gpu: Gpu, work: Workload, numerics: Numerics) -> Search:
    """Try every sane layout under every policy."""
    fits, too_large, refused = [], [], Counter[str]()
    for asked in candidates(config.gpus, gpu.per_node):
        try:
            layout = resolve(asked, config.gpus, shape)
        except LayoutError as error:
            refused[str(error)] += 1
            continue
        if layout.dp > work.samples:
            refused[f"more data-parallel ranks than the {work.samples} samples of a step"] += 1
            continue
        if layout.tp * layout.ulysses > gpu.per_node and layout.ring * 2 <= layout.cp:
            refused[f"Ulysses over more than the {gpu.per_node} GPUs of a node; a ring crosses nodes better"] += 1
            continue
        job = _job(shape, layout, work, numerics, config.optimizer)
        recompute = choose_recompute(job, gpu.memory_gb * GB, policies=config.policies)
        memory = rank_memory(job, recompute)
        if memory.peak > gpu.memory_gb * GB:
            too_large.append(TooLarge(layout, memory, recompute.policy))
            continue
        time = step_time(shape, layout, work, numerics, gpu, recompute=recompute, fp8=config.fp8)
        fits.append(Fit(job, recompute, memory, time, utilisation(shape, layout, work, gpu, time.total)))
    return Search(sorted(fits, key=lambda fit: fit.time.total), too_large, refused)


def candidates(gpus: int, per_node: int) -> Iterator[LayoutConfig]:
    """Every product of degrees that makes `gpus`: tensor parallel inside a node, replicas of whole FSDP groups."""
    for tp in (degree for degree in divisors(gpus) if degree <= per_node):
        for pp in divisors(gpus // tp):
            for cp in divisors(gpus // tp // pp):
                dp = gpus // tp // pp // cp
                degrees = ((ring, replicate) for ring in divisors(cp) for replicate in divisors(dp))
                for ring, replicate in degrees:
                    for chunks in range(1, MAX_CHUNKS + 1 if pp > 1 else 2):
                        yield LayoutConfig(
                            tp=tp, cp=cp, cp_ring=ring, pp=pp, pp_chunks=chunks, dp_replicate=replicate
                        )  # fmt: skip


def choose_recompute(job: Job, limit_bytes: float, *, policies: Sequence[str] = POLICIES) -> RecomputeConfig:
    """The policy that costs least time and fits, on as few of the first blocks as it takes; if none fits, the smallest.

    To recompute what lies between the products of all blocks costs less than a few whole blocks, and frees more.
    """

    def fits(recompute: RecomputeConfig) -> bool:
        return rank_memory(job, recompute).peak <= limit_bytes

    choice = RecomputeConfig()
    for policy in (policy for policy in POLICIES if policy in policies):
        choice = RecomputeConfig(policy=policy)
        if not fits(choice):
            continue
        if policy == "off":
            return choice
        too_few, enough = 0, job.shape.layers  # blocks
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if fits(replace(choice, first=middle)):
                enough = middle
            else:
                too_few = middle
        return replace(choice, first=-1 if enough == job.shape.layers else enough)
    return choice


def decide_recompute(
    run: FlowRun, shape: ModelShape, layout: Layout, lengths: Iterable[tuple[int, int]], device: Device
) -> RecomputeConfig:
    """What a run recomputes: as its recipe says, or under `auto` what the plan chooses.

    Args:
        lengths: (tokens, text tokens) of every sample of the data set.

    Raises:
        LayoutError: the layout cannot fit into the device's memory, by the plan, and `ignore_plan` is not set.
    """
    kinds = tuple(Kind(tokens, text, count) for (tokens, text), count in Counter(lengths).items())
    work = Workload(kinds, run.data.samples_per_step, run.data.max_tokens_per_rank)
    job = _job(shape, layout, work, device.numerics, run.optimizer.name, device.process_bytes)
    recompute = run.recompute
    if recompute.policy == "auto":
        recompute = choose_recompute(job, recompute.memory_gb * GB or device.memory_bytes)
        logger.info("recompute: %s", _recompute_words(recompute))
    memory = rank_memory(job, recompute)
    if memory.peak <= device.memory_bytes or run.ignore_plan:
        return recompute
    smallest = choose_recompute(job, device.memory_bytes)
    helps = rank_memory(job, smallest).peak <= device.memory_bytes
    remedy = f"recompute.policy={smallest.policy}" if helps else "more processes, or a larger cp, tp or pp"
    raise LayoutError(
        f"layout {layout} cannot fit: a rank needs {memory.peak / GB:.1f} GB ({_parts(memory)}) and {device.name} "
        f"has {device.memory_bytes / GB:.1f} GB for it; use {remedy}, or lower data.max_tokens_per_rank (packs of "
        f"{job.pack.tokens:,} tokens); ignore_plan=true trains all the same"
    )


def _job(
    shape: ModelShape,
    layout: Layout,
    work: Workload,
    numerics: Numerics,
    optimizer: Literal["adamw", "muon"],
    process_bytes: float = 0.0,
) -> Job:
    return Job(
        shape=shape,
        layout=layout,
        pack=work.fullest_pack(layout),
        numerics=numerics,
        micro_batches=work.micro_batches(layout),
        optimizer=optimizer,
        process_bytes=process_bytes,
    )


def _distinct(fits: Sequence[Fit]) -> list[Fit]:
    """Of layouts that differ in chunks and replicas only, the best."""
    seen: dict[tuple[int, ...], Fit] = {}
    for fit in fits:
        seen.setdefault((fit.layout.tp, fit.layout.ulysses, fit.layout.ring, fit.layout.pp), fit)
    return list(seen.values())


def _speed_row(fit: Fit) -> dict[str, Any]:
    layout = fit.layout
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "ulysses": layout.ulysses,
        "ring": layout.ring,
        "pp": layout.pp,
        "chunks": layout.chunks,
        "dp_replicate": layout.dp_replicate,
        "dp_shard": layout.dp_shard,
        "recompute": _recompute_words(fit.recompute),
        "peak_gb": round(fit.memory.peak / GB, 2),
        "step_s": round(fit.time.total, 3),
        "mfu": round(fit.mfu, 3),
        "exposed_s": round(fit.time.communication, 3),
        "bubble_s": round(fit.time.bubble, 3),
    }


def _memory_row(fit: Fit) -> dict[str, Any]:
    row = {name: value for name, value in asdict(fit.memory).items() if name != "process"}
    for policy in POLICIES:
        row[f"activations_{policy}"] = rank_memory(fit.job, RecomputeConfig(policy=policy)).activations
    row["peak"] = fit.memory.peak
    return {name: round(value / GB, 2) for name, value in row.items()}


def _too_large_rows(found: Search, gpu: Gpu) -> list[dict[str, Any]]:
    """For each (tp, pp), what the roomiest context-parallel degree that is too small would need."""
    fitting: dict[tuple[int, int], int] = {}
    for fit in found.fits:
        key = (fit.layout.tp, fit.layout.pp)
        fitting[key] = min(fit.layout.cp, fitting.get(key, fit.layout.cp))
    worst: dict[tuple[int, int, int], TooLarge] = {}
    for large in found.too_large:
        key3 = (large.layout.tp, large.layout.pp, large.layout.cp)
        if key3 not in worst or large.memory.peak < worst[key3].memory.peak:
            worst[key3] = large
    rows = []
    for (tp, pp, cp), large in sorted(worst.items()):
        needed = fitting.get((tp, pp))
        if needed is not None and cp >= needed:
            continue  # another split of the same degrees fits
        rows.append(
            {
                "tp": tp,
                "pp": pp,
                "cp": cp,
                "needs_gb": round(large.memory.peak / GB, 1),
                "why": f"{_parts(large.memory)} with recompute {large.policy}, of {gpu.memory_gb:g} GB; "
                + ("no cp fits" if needed is None else f"cp >= {needed} fits"),
            }
        )
    return rows


def _refused_rows(refused: Counter[str]) -> list[dict[str, Any]]:
    """Reasons that differ in their numbers only as one, with the most frequent as the example."""
    alike: dict[str, list[tuple[str, int]]] = {}
    for why, count in refused.most_common():
        alike.setdefault(re.sub(r"[\d, ]+", "#", why), []).append((why, count))
    return [{"layouts": sum(count for _, count in group), "why": group[0][0]} for group in alike.values()]


def _parts(memory: RankMemory) -> str:
    """The parts of a peak that count, largest first."""
    parts = sorted(asdict(memory).items(), key=lambda part: -part[1])
    return " + ".join(f"{name} {value / GB:.1f}" for name, value in parts if value >= 0.05 * GB) + " GB"


def _recompute_words(recompute: RecomputeConfig) -> str:
    among = f" of the first {recompute.first} blocks" if recompute.first >= 0 else ""
    return recompute.policy + (among if recompute.policy != "off" else "")
