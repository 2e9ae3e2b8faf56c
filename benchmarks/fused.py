"""What the fused kernels save: `python -m benchmarks.fused [--json]`, on a GPU.

Forward and backward of each operation between the matrix products, 3072 wide, in bf16, on packs of samples of
mixed lengths, three ways on the same numbers:
  fused:    our Triton kernels;
  plain:    the plain operations;
  compiled: torch.compile of the plain operations, for exactly these sizes; packs of other sizes would compile again.
GB/s counts what an ideal kernel must move: every token's row in and out of each pass once.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks._measure import alternate, arguments, device_name, ratio, report
from goku_mega.kernels.fused import gated_add, modulated_norm, norm_and_rotate
from goku_mega.kernels.pieces import Pieces, sample_pieces
from goku_mega.parallel.groups import single_process_groups

WIDTH, HEADS = 3072, 48
HEAD_DIM = WIDTH // HEADS
TOKENS = (8192, 36864)
EPS = 1e-6
PASSES = 10  # of one call: launches run ahead of the device, as in training
Step = Callable[[], Any]


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    if not torch.cuda.is_available():
        print("benchmarks.fused: error: the kernels it measures need a GPU, and there is none here", file=sys.stderr)
        sys.exit(2)
    group = single_process_groups(torch.device("cuda")).model.tp
    rows, lines = [], []
    for tokens in TOKENS:
        with torch.device("cuda"):
            made = operations(tokens, group)
        for name, (sides, row_passes) in made.items():
            seconds = alternate(sides, repeats=options.repeats)
            times = {side: round(1000 * statistics.median(seconds[side]) / PASSES, 4) for side in sides}
            speed = row_passes * tokens * WIDTH * 2 / times["fused"] / 1e6  # bytes / ms
            over = {f"{side}_over_fused": round(ratio(seconds, side, "fused"), 2) for side in ("plain", "compiled")}
            rows.append({"operation": name, "tokens": tokens, **times, **over, "fused_gb_per_s": round(speed)})
            figures = "  ".join(f"{side} {times[side]:7.3f} ms" for side in sides)
            lines.append(f"{tokens:6} tokens  {name:24} {figures}  fused {speed:5.0f} GB/s")
    first = rows[0]
    report(
        options,
        lines,
        {
            "name": "fused",
            "value": first["fused"],
            "unit": "ms of the first operation, forward and backward",
            "baseline": {"plain_ms": first["plain"], "compiled_ms": first["compiled"]},
            "ratio": first["plain_over_fused"],
            "rows": rows,
            "width": WIDTH,
            "repeats": options.repeats,
            "device": device_name(),
        },
    )


def operations(tokens: int, group: dist.ProcessGroup) -> dict[str, tuple[dict[str, Step], int]]:
    """By name: the three sides, and how often an ideal kernel moves a token's row in the two passes together."""
    torch.manual_seed(0)
    lengths = torch.tensor([tokens // 2, tokens // 4, tokens // 8, tokens // 8], device="cpu")
    index = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths).cuda()
    pieces = sample_pieces(index, len(lengths))
    x, update = numbers(tokens, WIDTH), numbers(tokens, WIDTH)
    shift, scale, gate = (numbers(len(lengths), WIDTH, dtype=torch.float32) for _ in range(3))
    weight, bias, key_weight = numbers(WIDTH), numbers(WIDTH), numbers(WIDTH)
    heads = numbers(tokens, HEADS, 3, HEAD_DIM)
    angles = torch.rand(tokens, 1, HEAD_DIM // 2)
    rotary = (angles.cos(), angles.sin())

    def norm(weight: Tensor | None, pieces: Pieces | None) -> Tensor:
        return modulated_norm(x, shift, scale, index, eps=EPS, weight=weight, pieces=pieces)

    def gated(pieces: Pieces | None) -> Tensor:
        return gated_add(x, update, gate, index, bias=bias, pieces=pieces)

    def qkv(pieces: Pieces | None) -> tuple[Tensor, ...]:
        return norm_and_rotate(
            heads, (weight, key_weight), rotary, group=group, eps=EPS, fused=pieces is not None
        )  # fmt: skip

    rows = [x, shift, scale]
    return {
        # Forward: read x, write the result; backward: read x and the gradient, write the gradient of x.
        "LayerNorm + modulation": (three_sides(partial(norm, None), rows, pieces), 5),
        "RMSNorm + modulation": (three_sides(partial(norm, weight), [*rows, weight], pieces), 5),
        # Read both, write the sum; read the update and the gradient, write the update's.
        "gate + add": (three_sides(gated, [x, update, gate, bias], pieces), 6),
        # As a norm, for q and k; the value's gradient is copied.
        "QK norm + RoPE": (three_sides(qkv, [heads, weight, key_weight], pieces), 12),
    }


def three_sides(run: Callable[[Pieces | None], Any], inputs: list[Tensor], pieces: Pieces) -> dict[str, Step]:
    compiled = torch.compile(run, dynamic=False)
    sides = {"fused": partial(run, pieces), "plain": partial(run, None), "compiled": partial(compiled, None)}
    return {name: partial(step, forward, inputs) for name, forward in sides.items()}


def step(forward: Step, inputs: list[Tensor]) -> None:
    """Forward and backward, with the outputs' own values as their gradients."""
    for _ in range(PASSES):
        outputs = forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, inputs, [out.detach() for out in outputs])


def numbers(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size, dtype=dtype).requires_grad_()


if __name__ == "__main__":
    main()
