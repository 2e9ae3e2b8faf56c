"""What fails in a large run, how often, and how long each part of going on takes, with sources. No torch.

`published`: by others, at scale. `measured`: by this repository's benchmarks, on the machine and with the numbers of
ranks that the source says; what is worked out from it for more is worked out, not measured. `assumed`: neither.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["published", "measured", "assumed", "given"]
DAY_S = 86_400.0


class Figure(NamedTuple):
    """A number that a plan rests on."""

    what: str
    value: float
    unit: str
    kind: Kind
    source: str


class Cause(NamedTuple):
    """A kind of failure, and what is done about it."""

    name: str
    per_day: float
    """Failures of a run's nodes together."""
    detection_s: float
    restart_s: float
    """From the detection to the load, when nothing stands in the way."""
    replaces_node: bool
    """Whether a spare takes the place of the node."""


FAILURES = Figure(
    "failures", 6.50, "per 1,000 node-days", "published", "RSC-1, 16k A100, nodes of 8 GPUs: arXiv 2410.21680"
)
"""Llama 3 had fewer: 419 in 54 days on 2,048 nodes are 3.79."""
CAUSES = {"gpu": 262, "host": 46, "network": 42, "software": 63, "corruption": 6}
"""Of 419 unexpected interruptions of Llama 3 (arXiv 2407.21783, table 5).

gpu: faulty GPU 148, HBM3 72, SRAM 19, system processor 17, thermal 6. host: maintenance 32, SSD 3, power 3, chassis,
I/O board, CPU and memory 2 each. network: switch and cable 35, NIC 7. software: bugs 54, NCCL watchdog 7, others 2.
corruption: silent data corruption 6.
"""
CAUSES_SOURCE = "Llama 3, 419 interruptions: arXiv 2407.21783 table 5"
REPLACED = ("gpu", "host", "corruption")

GPU_DETECTION = Figure("detection of a faulty GPU", 10.0, "s", "published", "ByteRobust table 3: arXiv 2509.16293")
NODE_DETECTION = Figure(
    "detection of a lost node", 1.41, "s", "measured",
    "recovery_cluster.json: power-off of one of 4 nodes, SLURM on 2 cores; an agent may be silent for 1 s",
)  # fmt: skip
EXIT_DETECTION = Figure(
    "detection of an ended process", 0.053, "s", "measured", "recovery.json: SIGKILL of one of 2 ranks, 2 cores"
)
PROCESSES = Figure(
    "new processes", 1.13, "s", "measured",
    "recovery_cluster.json: from a power-off that is found to the first step with a spare, a tiny model on 3 ranks",
)  # fmt: skip
HANG_LIMIT = Figure(
    "limit of a hang", 2.5, "steps", "assumed", "5 times the longest phase; a backward pass of half a step"
)
GROUPS = Figure("process groups", 0.003, "s per GPU", "published", "MegaScale, < 30 s above 10,000: arXiv 2402.15627")
WARM_UP = Figure(
    "devices and first step", 30.0, "s", "assumed", "CUDA contexts, communicators, allocator; not measured"
)
NODE_LOAD = Figure("load from the nodes' memory", 20.0, "s", "assumed", "published for others only as `seconds`")
STORE_LOAD = Figure(
    "load from the store", 265.73, "s", "published", "ByteCheckpoint, 7B on 1,488 GPUs: arXiv 2407.20143"
)
BOTH_LOST = Figure(
    "failures that take a node and its copy", 0.05, "of those of nodes", "published", "RSC: 3-5% come together"
)
REQUEUED = Figure("failures that end in a requeue", 3 / 419, "of all", "published", "Llama 3: 3 of 419 needed people")
COLD_START = {128: 454.0, 256: 545.0, 512: 635.0, 1024: 768.0}
"""Seconds of a requeue by machines: ByteRobust, arXiv 2509.16293 table 7."""
REPAIR = Figure("repair of a node", 24.0, "h", "assumed", "until it is a spare again")
STORE = Figure("bandwidth of the store", 50.0, "GB/s", "published", "50-200 suffice: VAST's study of 85k checkpoints")

BLOCKED = Figure(
    "training blocked by a save", 0.0596, "s", "measured",
    "most of all cases in checkpoint_scale.json: plans of 1,024-8,192 ranks, copies at an assumed 20 GB/s",
)  # fmt: skip
COMMIT = Figure(
    "commit of a save", 5.29 / 8192, "s per GPU", "measured",
    "checkpoint_scale.json: 8,192 reports of one process, on one core",
)  # fmt: skip
WRITE = Figure("writing of a node's part", 1.805, "GB/s", "measured", "checkpoint.json: this machine's disk, 2 cores")
SLOWED = Figure("slower training while a save is written", 0.01, "of it", "assumed", "0.2% of all steps on 2 cores")

FIGURES = (
    FAILURES, GPU_DETECTION, NODE_DETECTION, EXIT_DETECTION, HANG_LIMIT, PROCESSES, GROUPS, WARM_UP, NODE_LOAD,
    STORE_LOAD, BOTH_LOST, REQUEUED, REPAIR, STORE, BLOCKED, COMMIT, WRITE, SLOWED,
)  # fmt: skip


def cold_start_s(nodes: int) -> float:
    """Seconds until a run that is queued anew trains; by the logarithm of the nodes, on past the largest published."""
    known = sorted(COLD_START)
    slope = COLD_START[known[-1]] - COLD_START[known[-2]]  # a doubling
    if nodes > known[-1]:
        return COLD_START[known[-1]] + slope * math.log2(nodes / known[-1])
    return float(np.interp(math.log2(nodes), np.log2(known), [COLD_START[number] for number in known]))


def spares_needed(nodes: int, per_node_day: float, repair_s: float, *, confidence: float = 0.99) -> int:
    """Spares that are enough in 99% of all moments: the quantile of a binomial of nodes under repair."""
    broken = 1 - math.exp(-per_node_day * repair_s / DAY_S)
    probability, total = (1 - broken) ** nodes, 0.0
    for count in range(nodes):
        total += probability
        if total >= confidence:
            return count
        probability *= (nodes - count) / (count + 1) * broken / (1 - broken)
    return nodes
