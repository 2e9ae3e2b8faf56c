"""Does this node compute right, and how fast: matrix products, memory, copies, all-reduce inside the node.

    python -m goku_infra.checks.compute_check [--no-gpu]

A process of its own, so that the caller needs no torch. Prints one JSON object: {"measurements": [...]}.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPU_SIZE, GPU_SIZE = 1024, 8192
CPU_BYTES, GPU_BYTES = 64 << 20, 1 << 30
LOOPBACK_BYTES = 8 << 20
REPEATS = 5
ROW = (1, -2, 3, 0, -1, 2, -3, 1)
COLUMN = (2, 1, -1, 3, -2, 0, 1, -3)


@dataclass(frozen=True)
class Measurement:
    """One figure of one device."""

    name: str
    device: str
    """cpu, or the GPU's model, which has limits of its own."""
    index: int
    """Of the GPU; -1 for the CPU, or for all GPUs together."""
    value: float
    unit: str


def expected_product(size: int) -> list[list[int]]:
    """The 8 x 8 table that the product of `operands(size)` repeats: every partial sum is a small integer."""
    return [
        [size // 8 * sum(ROW[(i + k) % 8] * COLUMN[(k + 3 * j) % 8] for k in range(8)) for j in range(8)]
        for i in range(8)
    ]


def wrong_elements(size: int, device: str, dtype_name: str) -> int:
    """How many elements of an integer-valued matrix product are wrong: right is exact, in whatever order it is summed.

    Args:
        size: of the square matrices, a multiple of 8 up to 2**16, so that sums stay below 2**24 and exact in fp32.
        dtype_name: of operands and result; sums are in fp32.
    """
    import torch

    left, right = _operands(size, device, getattr(torch, dtype_name))
    table = torch.tensor(expected_product(size), dtype=torch.float32, device=device).to(left.dtype)
    product = left @ right  # [size, size]
    # Tiles of 8 x 8 elements, each of which is the table: [size/8, 8, size/8, 8].
    return int((product.view(size // 8, 8, size // 8, 8) != table[:, None, :]).sum())


def loopback_all_reduce_s(bytes_: int, repeats: int) -> float:
    """Median seconds of an all-reduce between two gloo members of this process, over the loopback interface."""
    import torch
    import torch.distributed as dist

    store = dist.HashStore()
    gloo: Any = dist.ProcessGroupGloo
    times: list[float] = []

    def member(rank: int) -> None:
        group = gloo(store, rank, 2)
        values = torch.ones(bytes_ // 4)
        group.allreduce([values]).wait()
        for _ in range(repeats):
            begin = time.monotonic()
            group.allreduce([values]).wait()
            if rank == 0:
                times.append(time.monotonic() - begin)

    threads = [threading.Thread(target=member, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(times)


def measure_cpu() -> list[Measurement]:
    """The CPU's figures, half a second or so a core."""
    import torch

    left, right = _operands(CPU_SIZE, "cpu", torch.float32)
    source, target = torch.ones(CPU_BYTES // 4), torch.empty(CPU_BYTES // 4)
    product_s = _median_s(lambda: torch.mm(left, right), "cpu")
    copy_s = _median_s(lambda: target.copy_(source), "cpu")
    loopback_s = loopback_all_reduce_s(LOOPBACK_BYTES, REPEATS)
    return [
        Measurement("wrong_elements", "cpu", -1, wrong_elements(CPU_SIZE, "cpu", "float32"), "elements"),
        Measurement("matrix_product", "cpu", -1, 2 * CPU_SIZE**3 / product_s / 1e12, "TFLOP/s"),
        Measurement("memory_copy", "cpu", -1, 2 * CPU_BYTES / copy_s / 1e9, "GB/s"),
        Measurement("loopback_all_reduce", "cpu", -1, LOOPBACK_BYTES / loopback_s / 1e9, "GB/s"),
    ]


def measure_gpus() -> list[Measurement]:
    """Figures of every GPU that CUDA shows; none without one."""
    import torch

    count = torch.cuda.device_count()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums stay exact
    figures = [figure for index in range(count) for figure in _measure_gpu(index)]
    return figures + (_measure_all_reduce(count) if count > 1 else [])


def _measure_gpu(index: int) -> list[Measurement]:
    import torch

    device, name = f"cuda:{index}", torch.cuda.get_device_name(index)
    left, right = _operands(GPU_SIZE, device, torch.bfloat16)
    here = torch.empty(GPU_BYTES // 4, device=device)
    there = torch.ones(GPU_BYTES // 4, device=device)
    pinned = torch.empty(GPU_BYTES // 4, pin_memory=True)
    seconds = {
        "matrix_product": _median_s(lambda: torch.mm(left, right), device),
        "memory_copy": _median_s(lambda: here.copy_(there), device),
        "host_to_device": _median_s(lambda: here.copy_(pinned, non_blocking=True), device),
        "device_to_host": _median_s(lambda: pinned.copy_(here, non_blocking=True), device),
    }
    return [
        Measurement("wrong_elements", name, index, wrong_elements(GPU_SIZE, device, "bfloat16"), "elements"),
        Measurement("matrix_product", name, index, 2 * GPU_SIZE**3 / seconds["matrix_product"] / 1e12, "TFLOP/s"),
        Measurement("memory_copy", name, index, 2 * GPU_BYTES / seconds["memory_copy"] / 1e9, "GB/s"),
        Measurement("host_to_device", name, index, GPU_BYTES / seconds["host_to_device"] / 1e9, "GB/s"),
        Measurement("device_to_host", name, index, GPU_BYTES / seconds["device_to_host"] / 1e9, "GB/s"),
    ]


def _measure_all_reduce(count: int) -> list[Measurement]:
    """Bus bandwidth as nccl-tests defines it: 2 (n - 1) / n times the bytes, by the time."""
    import torch
    from torch.cuda import nccl

    values = [torch.ones(GPU_BYTES // 4, device=f"cuda:{index}") for index in range(count)]

    def all_reduce() -> None:
        nccl.all_reduce(values)
        for index in range(count):
            torch.cuda.synchronize(index)

    bandwidth = 2 * (count - 1) / count * GPU_BYTES / _median_s(all_reduce, "cuda:0") / 1e9
    return [Measurement(f"nccl_all_reduce_{count}", torch.cuda.get_device_name(0), -1, bandwidth, "GB/s")]


def _operands(size: int, device: str, dtype: "torch.dtype") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Matrices [size, size] whose element depends on (row + column) and (row + 3 column), each modulo 8."""
    import torch

    place = torch.arange(size, device=device)
    row = torch.tensor(ROW, dtype=dtype, device=device)
    column = torch.tensor(COLUMN, dtype=dtype, device=device)
    return row[(place[:, None] + place) % 8], column[(place[:, None] + 3 * place) % 8]


def _median_s(work: Callable[[], object], device: str) -> float:
    import torch

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    times = []
    work()
    for _ in range(REPEATS):
        wait()
        begin = time.monotonic()
        work()
        wait()
        times.append(time.monotonic() - begin)
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m goku_infra.checks.compute_check")
    parser.add_argument("--no-gpu", action="store_true", help="leave the GPUs alone")
    options = parser.parse_args(arguments)
    figures = measure_cpu() + ([] if options.no_gpu else measure_gpus())
    print(json.dumps({"measurements": [asdict(figure) for figure in figures]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
