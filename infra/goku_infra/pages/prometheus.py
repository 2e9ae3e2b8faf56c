"""A snapshot in Prometheus' text format.

Counters only count up over the life of a run; what a restart or a later finding can take back (steps, seconds of a
class of time) is a gauge. Labels are bounded: of a large run only the odd ranks have series of their own.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from goku_infra.pages.oddities import node_oddity, odd_ranks
from goku_infra.views import Role, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TARGETS_FILE = "prometheus.json"
"""In the supervisor's folder: for Prometheus' discovery by files, which sees when a run's controller moves."""
RANK_SERIES_LIMIT = 512
"""Ranks up to which every rank has its own series, and every GPU; beyond, those of what is odd."""

Sample = tuple[Mapping[str, Any], float | None]

RUN_GAUGES = {
    "goku_step": ("step", "Steps done; goes back when a restart resumes from a checkpoint."),
    "goku_highest_step": ("highest_step", "The furthest step that the run has ever done."),
    "goku_committed_step": ("committed_step", "Step of the newest committed checkpoint; -1: none."),
    "goku_loss": ("loss", "Loss of the newest step."),
    "goku_gradient_norm": ("gradient_norm", "Gradient norm of the newest step."),
    "goku_tokens_per_second": ("tokens_per_s", "Tokens trained on per second, all ranks."),
    "goku_samples_per_second": ("samples_per_s", "Samples trained on per second, all ranks."),
    "goku_goodput_ratio": ("goodput", "Productive share of all seconds of the run."),
    "goku_snapshot_timestamp_seconds": ("time_s", "When the controller took this snapshot, unix time."),
}
RUN_COUNTERS = {
    "goku_generations_total": ("generation", "Starts of all ranks."),
    "goku_controllers_total": ("epoch", "Controllers that the run has had."),
}
RANK_GAUGES = {
    "goku_rank_step": ("step", "Steps done by the rank."),
    "goku_rank_phase_age_seconds": ("phase_age_s", "How long the rank has been in its phase."),
    "goku_rank_alive_age_seconds": ("alive_age_s", "Since the rank's liveness thread last ran."),
    "goku_rank_resident_memory_bytes": ("rss_bytes", "Resident memory of the rank's process."),
}
RANK_COUNTERS = {
    "goku_rank_cpu_seconds_total": ("cpu_s", "CPU seconds of the rank's process."),
    "goku_rank_busy_seconds_total": ("busy_s", "Seconds of the rank's main thread at work."),
    "goku_rank_waiting_seconds_total": ("waiting_s", "Seconds of the rank's main thread waiting for other ranks."),
}
"""These start again with the rank's process, as a counter may."""

GPU_GAUGES = {
    "goku_gpu_busy_ratio": ("busy", "Share of the time in which a kernel ran on the GPU, one that waits included."),
    "goku_gpu_memory_used_bytes": ("memory_bytes", "Memory of the GPU in use."),
    "goku_gpu_power_watts": ("power_w", "Power that the GPU draws."),
    "goku_gpu_temperature_celsius": ("temperature_c", "Temperature of the GPU."),
}


def render(snapshot: dict[str, Any]) -> str:
    """The metrics of a snapshot (the contents of `state.json`); a figure that is not known has no line."""
    lines: list[str] = []
    for name, (key, text) in RUN_GAUGES.items():
        lines += _family(name, "gauge", text, [({}, snapshot.get(key))])
    for name, (key, text) in RUN_COUNTERS.items():
        lines += _family(name, "counter", text, [({}, snapshot.get(key))])
    lines += _run(snapshot)
    lines += _nodes(snapshot["nodes"])
    lines += _ranks(snapshot)
    return "\n".join(lines) + "\n"


def targets(run_dir: str, host: str, page_port: int) -> str:
    """Where the controller's metrics are, as the content of `TARGETS_FILE`."""
    return json.dumps([{"targets": [f"{host}:{page_port}"], "labels": {"run_dir": str(Path(run_dir).absolute())}}])


def _run(snapshot: dict[str, Any]) -> list[str]:
    incidents = snapshot["incidents"]
    last = incidents[-1] if incidents else None
    recovery_s = [row["recovered_s"] - row["fault_s"] for row in incidents if row["recovered_s"] is not None]
    open_causes = [incident["cause"] for incident in incidents if incident["status"] == "open"]
    info = {"run_dir": snapshot["run_dir"], "job_id": snapshot.get("job_id") or ""}
    return [
        *_family("goku_run_info", "gauge", "Which run this is.", [(info, 1)]),
        *_family(
            "goku_status", "gauge", "1 for the present status of the run, 0 for the others.",
            [({"status": status}, status == snapshot["status"]) for status in get_args(Status)],
        ),
        *_family(
            "goku_time_seconds", "gauge", "Seconds of the run by class; every second is in exactly one.",
            [({"class": kind}, seconds) for kind, seconds in snapshot["accounts"].items()],
        ),
        *_family(
            "goku_incidents_total", "counter", "Incidents of the run.", [({}, last["number"] if last else 0)]
        ),
        *_family(
            "goku_incidents_open", "gauge", "Incidents that are not repaired yet, by cause.",
            [({"cause": cause}, open_causes.count(cause)) for cause in sorted(set(open_causes))],
        ),
        *_family(
            "goku_last_incident_detection_seconds", "gauge", "From the newest incident's fault to its detection.",
            [({}, last["detected_s"] - last["fault_s"] if last else None)],
        ),
        *_family(
            "goku_last_incident_recovery_seconds", "gauge",
            "From the fault to the next step, of the newest incident that is over.",
            [({}, recovery_s[-1] if recovery_s else None)],
        ),
        *_family(
            "goku_requests_pending", "gauge", "What waits for the operator's approval.",
            [({}, len(snapshot["requests"]))],
        ),
    ]  # fmt: skip


def _nodes(nodes: list[dict[str, Any]]) -> list[str]:
    roles = [node["role"] for node in nodes]
    present = [node for node in nodes if node["role"] not in ("lost", "excluded")]
    shown = present if sum(len(node["gpus"]) for node in present) <= RANK_SERIES_LIMIT else filter(node_oddity, present)
    gpus = [({"node": node["name"], "gpu": gpu["index"]}, gpu) for node in shown for gpu in node["gpus"]]
    return [
        *_family(
            "goku_nodes", "gauge", "Nodes by role.", [({"role": role}, roles.count(role)) for role in get_args(Role)]
        ),
        *_family(
            "goku_node_heard_age_seconds", "gauge", "Since the agent of a present node was last heard.",
            [({"node": node["name"]}, node["heard_age_s"]) for node in present],
        ),
        *_family(
            "goku_node_healthy", "gauge", "1 if nothing is odd about the node, else 0.",
            [({"node": node["name"]}, not node_oddity(node)) for node in nodes],
        ),
        *(
            line
            for name, (key, text) in GPU_GAUGES.items()
            for line in _family(name, "gauge", text, [(labels, gpu[key]) for labels, gpu in gpus])
        ),
    ]  # fmt: skip


def _ranks(snapshot: dict[str, Any]) -> list[str]:
    ranks = snapshot["ranks"]
    odd = odd_ranks(ranks, [incident for incident in snapshot["incidents"] if incident["status"] == "open"])
    own = ranks if len(ranks) <= RANK_SERIES_LIMIT else [rank for rank in ranks if rank["rank"] in odd]
    phases = [rank["phase"] for rank in ranks]
    lines = [
        *_family(
            "goku_ranks", "gauge", "Ranks by phase.",
            [({"phase": phase}, phases.count(phase)) for phase in sorted(set(phases))],
        ),
        *_family("goku_ranks_odd", "gauge", "Ranks that are not like the healthy ones.", [({}, len(odd))]),
        *_family(
            "goku_ranks_step_spread", "gauge", "Steps between the fastest and the slowest rank.",
            [({}, max(r["step"] for r in ranks) - min(r["step"] for r in ranks) if ranks else None)],
        ),
        *_family(
            "goku_ranks_alive_age_max_seconds", "gauge", "The longest silence of a rank's liveness thread.",
            [({}, max((rank["alive_age_s"] for rank in ranks), default=None))],
        ),
    ]  # fmt: skip
    for families, kind in ((RANK_GAUGES, "gauge"), (RANK_COUNTERS, "counter")):
        for name, (key, text) in families.items():
            labelled = [({"rank": rank["rank"], "node": rank["node"]}, rank[key]) for rank in own]
            lines += _family(name, kind, text, labelled)
    return lines


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    """The lines of one metric; none at all without a sample."""
    lines = [f"{name}{_labels(labels)} {float(value):.17g}" for labels, value in samples if value is not None]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines] if lines else []


def _labels(labels: Mapping[str, Any]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
