"""What a GPU of each kind has and reaches: memory, peaks, links. No torch.

Peaks, memory and links are the vendor's data sheets: dense products, bytes of 10^9, one direction of a link.
A card reports some 6% more memory than its name says; the CUDA context, NCCL's buffers and what the
allocator cannot join are left that room.
"""

import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from goku_mega.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card in the node it is sold in."""

    memory_gb: float
    memory_gb_per_s: float
    tflops: Mapping[str, float]
    """Dense peaks by precision: bf16, fp32 and, where the card has it, fp8."""
    node_gb_per_s: float
    """To the other cards of the node: NVLink, or PCIe where bridges join pairs only."""
    network_gb_per_s: float
    """To other nodes: one network adapter a card."""
    per_node: int = 8
    attention_share: float = 0.40
    """Share of the bf16 peak that attention reaches."""


USABLE_SHARE = 0.94
"""Of the memory a card reports: what its name says."""
FIRST_STEP_BYTES = 28e6
"""Of libraries that a rank on a CPU loads in its first step; 27 and 28 MB were seen."""
HOST_SHARE = 0.9
"""Of main memory: the system, and what malloc keeps of what was freed, need the rest."""

GPUS = {
    # FlashAttention-2 trains at 225 TFLOP/s on this card (72%; arXiv 2307.08691); its attention alone, forward and
    # backward, lies near 60%.
    "A100": Gpu(
        memory_gb=80, memory_gb_per_s=2039, tflops={"bf16": 312.0, "fp32": 19.5}, node_gb_per_s=300,
        network_gb_per_s=25, attention_share=0.60,
    ),
    "H100 PCIe": Gpu(
        memory_gb=80, memory_gb_per_s=2000, tflops={"bf16": 756.0, "fp32": 51.0, "fp8": 1513.0}, node_gb_per_s=64,
        network_gb_per_s=50,
    ),
    "H100 NVL": Gpu(
        memory_gb=94, memory_gb_per_s=3900, tflops={"bf16": 835.0, "fp32": 60.0, "fp8": 1671.0}, node_gb_per_s=64,
        network_gb_per_s=50,
    ),
    "H100": Gpu(
        memory_gb=80, memory_gb_per_s=3350, tflops={"bf16": 989.0, "fp32": 67.0, "fp8": 1979.0}, node_gb_per_s=450,
        network_gb_per_s=50,
    ),
    "H200 NVL": Gpu(
        memory_gb=141, memory_gb_per_s=4800, tflops={"bf16": 835.0, "fp32": 60.0, "fp8": 1671.0}, node_gb_per_s=64,
        network_gb_per_s=50,
    ),
    "H200": Gpu(
        memory_gb=141, memory_gb_per_s=4800, tflops={"bf16": 989.0, "fp32": 67.0, "fp8": 1979.0}, node_gb_per_s=450,
        network_gb_per_s=50,
    ),
    # Attention on Blackwell: Hopper's share is taken, for want of a figure.
    "B200": Gpu(
        memory_gb=180, memory_gb_per_s=8000, tflops={"bf16": 2250.0, "fp32": 75.0, "fp8": 4500.0}, node_gb_per_s=900,
        network_gb_per_s=50,
    ),
}  # fmt: skip
"""By the words in the name a card gives itself; a card's variants come before its plain (SXM) name."""


def find_gpu(name: str) -> Gpu | None:
    """The card whose name is in `name`, as CUDA or a person gives it; None where it is not known."""
    return next((gpu for known, gpu in GPUS.items() if known.lower() in name.lower()), None)


def gpu_named(name: str) -> Gpu:
    """The card `name`.

    Raises:
        ConfigError: no such card is known.
    """
    if name not in GPUS:
        raise ConfigError(f"gpu {name!r} is not one of {', '.join(GPUS)}")
    return GPUS[name]


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s a device can reach in a precision (`bf16`, `fp32`, `fp8`), or None where it is not known (CPUs)."""
    known = find_gpu(device_name)
    return known.tflops[precision] * 1e12 if known and precision in known.tflops else None


def host_memory_bytes() -> float:
    """Main memory of this machine that processes may fill."""
    return HOST_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_bytes() -> float:
    """Main memory of this process as it is before it has a model, and of the libraries that its first step loads."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + FIRST_STEP_BYTES
