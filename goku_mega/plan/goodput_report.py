"""`goku-mega plan --goodput`: what failures cost a job by its size, when to save, what would be too slow. No torch."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from goku_mega.config.planning import FaultsConfig, PlanConfig
from goku_mega.model.sizes import model_shape
from goku_mega.plan import failures as figures
from goku_mega.plan.devices import gpu_named
from goku_mega.plan.failures import DAY_S, Cause
from goku_mega.plan.goodput import (
    CLASSES,
    Scenario,
    closed_form,
    effective_share,
    mean_recovery_s,
    simulate,
    steps_between_saves,
)
from goku_mega.plan.memory import model_numbers

GPUS = (1024, 2048, 4096, 8192, 10_000, 16_384)
TARGET = 0.97
STATE_BYTES = 16
"""Of a parameter in a checkpoint: weights, their average and AdamW's two moments in fp32."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 10.0)
MOST_TIMES = 1000.0
"""Where the search for a limit ends."""
NOTES = (
    "ettr: share of the time that trains for the first time, simulated, and beside it Daly's closed form, which knows "
    "neither the cold start nor missing nodes. Figures marked measured are our benchmarks on a few cores, "
    "worked out for more GPUs; no job of this size has been run. Stragglers and planned stops are not simulated."
)


def goodput_report(config: PlanConfig, step_s: float) -> dict[str, Any]:
    """The effective training time of a model's job on `config.gpus` and at other sizes, with steps of `step_s`."""
    faults, per_node = config.faults, gpu_named(config.gpu).per_node
    state_bytes = STATE_BYTES * model_numbers(model_shape(config.size))

    def job(gpus: int) -> tuple[Scenario, int]:
        return scenario_of(faults, gpus, per_node, step_s, state_bytes)

    def share(scenario: Scenario) -> float:
        return effective_share(scenario, days=faults.days, repeats=faults.repeats, seed=faults.seed)

    asked, steps = job(config.gpus)
    sizes = [_size_row(gpus, *job(gpus), step_s, faults) for gpus in sorted({*GPUS, config.gpus})]
    return {
        "model": f"{config.size} on {config.gpus} x {config.gpu}, steps of {step_s:.3g} s, {faults.days:g} days, "
        f"{faults.repeats} simulated jobs",
        "ettr_percent": next(row["ettr_percent"] for row in sizes if row["gpus"] == config.gpus),
        "save_every_steps": steps,
        "sizes": sizes,
        "save_intervals": _interval_rows(asked, steps, step_s, share),
        f"limits_for_{TARGET:.0%}": _limit_rows(asked, share),
        "causes": [_cause_row(cause) for cause in asked.causes],
        "others": _other_rows(faults, per_node),
        "figures": _figure_rows(faults, asked),
        "notes": NOTES,
    }


def scenario_of(
    faults: FaultsConfig, gpus: int, per_node: int, step_s: float, state_bytes: float
) -> tuple[Scenario, int]:
    """A job with this repository's checkpoints and supervisor, and its steps between saves."""
    nodes = math.ceil(gpus / per_node)
    restart_s = faults.restart_s or restart_seconds(gpus)
    detection_s = {
        "gpu": figures.GPU_DETECTION.value,
        "host": figures.NODE_DETECTION.value,
        "network": figures.HANG_LIMIT.value * step_s,
        "software": figures.EXIT_DETECTION.value,
        "corruption": step_s,  # checked at least before every save, here each step
    }
    per_day = faults.per_1000_node_days / 1000 * nodes
    among = sum(figures.CAUSES.values())
    causes = tuple(
        Cause(name, per_day * count / among, detection_s[name], restart_s, name in figures.REPLACED)
        for name, count in figures.CAUSES.items()
    )
    replaced = sum(cause.per_day for cause in causes if cause.replaces_node) / nodes
    repair_s = 3600 * faults.repair_hours
    spares = figures.spares_needed(nodes, replaced, repair_s) if faults.spares < 0 else faults.spares
    agreed_s = figures.COMMIT.value * gpus
    written_s = state_bytes / nodes / (figures.WRITE.value * 1e9)
    commit_s = written_s + agreed_s
    scenario = Scenario(
        causes=causes,
        interval_s=step_s,
        blocked_s=figures.BLOCKED.value + figures.SLOWED.value * commit_s,
        commit_s=commit_s,
        load_s=figures.NODE_LOAD.value,
        store_commit_s=commit_s + state_bytes / (figures.STORE.value * 1e9) + agreed_s,
        store_load_s=figures.STORE_LOAD.value,
        start_s=faults.start_s or figures.cold_start_s(nodes),
        both_lost=figures.BOTH_LOST.value,
        requeued=figures.REQUEUED.value,
        nodes=nodes,
        spares=spares,
        repair_s=repair_s,
        group_nodes=min(faults.group_nodes, nodes),
    )
    steps = faults.save_every_steps or steps_between_saves(scenario, step_s)
    return replace(scenario, interval_s=steps * step_s), steps


def restart_seconds(gpus: int) -> float:
    """From the detection to the first step in place or with a spare, without the load."""
    return figures.PROCESSES.value + figures.GROUPS.value * gpus + figures.WARM_UP.value


def megascale(nodes: int, per_day: float) -> Scenario:
    """MegaScale as published (arXiv 2402.15627): found in < 10 minutes, caught up in < 15, recomputation included."""
    return Scenario(causes=(Cause("all", per_day, 600.0, 900.0, False),), interval_s=1.0, nodes=nodes)


def byterobust(nodes: int, per_day: float) -> Scenario:
    """ByteRobust as published (arXiv 2509.16293): the incidents of its dense job (table 4) with its detection (table 3,
    10 minutes of a hang) and its resolutions (table 6), and a save in every step that costs 0.71% (table 8).
    """
    incidents = (
        ("explicit", 128, 10.0, 93.0), ("code change", 20, 0.0, 57.0), ("hang", 15, 600.0, 93.0),
        ("rollback", 12, 0.0, 4289.0),
    )  # fmt: skip
    among = sum(count for _, count, _, _ in incidents)
    causes = tuple(
        Cause(name, per_day * count / among, detection_s, restart_s, False)
        for name, count, detection_s, restart_s in incidents
    )
    return Scenario(causes=causes, interval_s=30.0, blocked_s=0.0071 * 30.0, nodes=nodes)


def _size_row(gpus: int, scenario: Scenario, steps: int, step_s: float, faults: FaultsConfig) -> dict[str, Any]:
    seconds = simulate(scenario, days=faults.days, repeats=faults.repeats, seed=faults.seed)
    shares = {name: float(values.mean()) / (faults.days * DAY_S) for name, values in seconds.items()}
    return {
        "gpus": gpus,
        "nodes": scenario.nodes,
        "spares": scenario.spares,
        "failures_a_day": round(scenario.per_s * DAY_S, 2),
        "save_steps": steps,
        "save_s": round(steps * step_s, 1),
        "recovery_s": round(mean_recovery_s(scenario), 1),
        "ettr_percent": _percent(shares["productive"]),
        "closed_form_percent": _percent(closed_form(scenario)),
        **{f"{name}_percent": _percent(shares[name]) for name in CLASSES[1:]},
    }


def _interval_rows(
    scenario: Scenario, steps: int, step_s: float, share: Callable[[Scenario], float]
) -> list[dict[str, Any]]:
    """The chosen interval and others; those that a save does not fit into are left out."""
    rows = []
    for number in sorted({max(1, round(steps * factor)) for factor in FACTORS}):
        tried = replace(scenario, interval_s=number * step_s)
        if tried.interval_s >= scenario.store_commit_s:
            rows.append(
                {
                    "save_steps": number,
                    "save_s": round(tried.interval_s, 1),
                    "ettr_percent": _percent(share(tried)),
                    "closed_form_percent": _percent(closed_form(tried)),
                }
            )
    return rows


def _limit_rows(scenario: Scenario, share: Callable[[Scenario], float]) -> list[dict[str, Any]]:
    """How many times worse one thing may get, alone, before less than the target trains."""

    def failing(times: float) -> Scenario:
        return _causes_changed(scenario, lambda cause: cause._replace(per_day=times * cause.per_day))

    def restarting(times: float) -> Scenario:
        return _causes_changed(scenario, lambda cause: cause._replace(restart_s=times * cause.restart_s))

    def detecting(times: float) -> Scenario:
        return _causes_changed(scenario, lambda cause: cause._replace(detection_s=times * cause.detection_s))

    def saving(times: float) -> Scenario:
        return replace(scenario, interval_s=times * scenario.interval_s)

    def mean_s(name: str) -> float:
        return sum(cause.per_day * getattr(cause, name) for cause in scenario.causes) / (scenario.per_s * DAY_S)

    if not scenario.per_s:
        return []
    changes = (
        ("failures a day", scenario.per_s * DAY_S, failing),
        ("restart without load, s", mean_s("restart_s"), restarting),
        ("detection, mean, s", mean_s("detection_s"), detecting),
        (
            "between saves, s",
            scenario.interval_s,
            lambda times: replace(scenario, interval_s=times * scenario.interval_s),
        ),
    )
    return [_limit_row(what, value, change, share) for what, value, change in changes]


def _limit_row(
    what: str, value: float, change: Callable[[float], Scenario], share: Callable[[Scenario], float]
) -> dict[str, Any]:
    low, high = 0.0, 1.0
    while high < MOST_TIMES and share(change(high)) >= TARGET:
        low, high = high, 2 * high
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if share(change(middle)) >= TARGET else (low, middle)
    return {"what": what, "now": round(value, 1), "limit": round(low * value, 1), "times": round(low, 2)}


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _causes_changed(scenario: Scenario, change: Callable[[Cause], Cause]) -> Scenario:
    return replace(scenario, causes=tuple(change(cause) for cause in scenario.causes))


def _cause_row(cause: Cause) -> dict[str, Any]:
    return {
        "cause": cause.name,
        "failures_a_day": round(cause.per_day, 3),
        "detection_s": round(cause.detection_s, 2),
        "restart_s": round(cause.restart_s, 2),
        "action": "spare" if cause.replaces_node else "in place",
    }


def _other_rows(faults: FaultsConfig, per_node: int) -> list[dict[str, Any]]:
    """Others' published figures in this simulator, at their own numbers of failures and at ours."""
    rows = []
    for name, build, gpus, own, source, reported in (
        ("MegaScale", megascale, 12_288, 100 / 28, "100 in an assumed 4 of its `several weeks`", "> 90"),
        ("ByteRobust", byterobust, 9_600, 175 / 90, "175 in its 3 months", "up to 97"),
    ):
        nodes = gpus // per_node
        rates = ((own, source), (faults.per_1000_node_days / 1000 * nodes, "as in this plan"))
        for per_day, failures in rates:
            ettr = effective_share(
                build(nodes, per_day), days=faults.days, repeats=faults.repeats, seed=faults.seed
            )  # fmt: skip
            rows.append(
                {
                    "system": name,
                    "gpus": gpus,
                    "failures_a_day": round(per_day, 2),
                    "of": failures,
                    "ettr_percent": _percent(ettr),
                    "reported": reported,
                }
            )
    return rows


def _figure_rows(faults: FaultsConfig, asked: Scenario) -> list[dict[str, Any]]:
    """What everything rests on; what the command line has changed is `given`."""
    own = FaultsConfig()
    rows = [figure._asdict() for figure in figures.FIGURES]
    for row in rows:
        given = {
            "failures": (faults.per_1000_node_days, own.per_1000_node_days),
            "repair of a node": (faults.repair_hours, own.repair_hours),
        }.get(row["what"])
        if given and given[0] != given[1]:
            row.update(value=given[0], kind="given", source="faults.*")
    rows += [
        {"what": "shares of the causes", "kind": "published", "source": figures.CAUSES_SOURCE},
        {
            "what": "cold start and requeue", "value": asked.start_s, "unit": "s",
            "kind": "given" if faults.start_s else "published",
            "source": "ByteRobust's requeue by machines: arXiv 2509.16293 table 7",
        },
        {
            "what": "restart", "value": asked.causes[0].restart_s, "unit": "s",
            "kind": "given" if faults.restart_s else "assumed", "source": "new processes + process groups + devices",
        },
    ]  # fmt: skip
    return [{name: row.get(name) for name in ("what", "value", "unit", "kind", "source")} for row in rows]
