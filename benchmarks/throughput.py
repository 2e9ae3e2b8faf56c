"""How fast a training step of Goku layers is: `python -m benchmarks.throughput [--json]`.

Forward and backward of a few layers on one long sample (every side can take that; packs of mixed lengths are the
business of `benchmarks.packing`), all sides with weights of the same type, taking turns in one run:
  goku:       our layers, with every attention kernel at hand, in bf16 and FP8 on a GPU;
  plain:      a plain torch block of the same weights, on a GPU also compiled;
  wan:        diffusers' transformer block of Wan at the same width and heads.
8B-wide layers at 8K, 37K and 74K tokens on a GPU; small ones in fp32 on a CPU. TFLOP/s and MFU count each side's
own model FLOPs: recomputation, which no side does here, would not count. Goku's side embeds the patches and
projects them back besides, the other sides are blocks alone.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import alternate, arguments, device_name, ratio, report
from benchmarks.packing import Stack
from goku_mega.config.training import ComputeConfig
from goku_mega.data.packing import pack_prompts, token_positions
from goku_mega.model.rope import rotary_from_positions
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.groups import initialise_distributed, single_process_groups
from goku_mega.parallel.parallelize import build_model
from goku_mega.plan.devices import peak_flops
from goku_mega.plan.flops import training_flops

sys.path.append(str(Path(__file__).parent.parent / "tests" / "model"))
from published_block import PublishedBlock, random_weights

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPE = (
    ModelShape(layers=4, hidden_size=3072, ffn_hidden_size=12288, heads=48)
    if ON_GPU
    else ModelShape(layers=2, hidden_size=384, ffn_hidden_size=1536, heads=6, text_width=384)
)
LATENTS = [(8, 64, 64), (19, 90, 90), (18, 128, 128)] if ON_GPU else [(1, 32, 32), (4, 32, 32)]
"""(t, h, w): 8,192, 38,475 and 73,728 tokens; 256 and 1,024 on a CPU."""
TEXT_TOKENS = 128 if ON_GPU else 16
Step = Callable[[], Any]


@dataclass(frozen=True)
class Side:
    step: Step
    flops: int


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    device = initialise_distributed(1)
    rows, lines = [], []
    for latent in LATENTS:
        tokens = len(token_positions(latent, SHAPE.patch))
        sides, failed = prepare(latent, device)
        memory = {name: peak_memory_gb(side.step) for name, side in sides.items()}
        seconds = alternate({name: side.step for name, side in sides.items()}, repeats=options.repeats)
        lines.append(f"{tokens:,} tokens")
        for name, side in sides.items():
            row = figures(name, tokens, side, seconds[name], memory[name])
            row["over_plain"] = round(ratio(seconds, "plain", name), 3)
            rows.append(row)
            lines.append(line(row))
        lines += [f"  {name}: {reason}" for name, reason in failed.items()]
        del sides  # the next length needs its memory
    ours, plain = (next(row for row in rows if row["side"].startswith(side)) for side in ("goku", "plain"))
    report(
        options,
        lines,
        {
            "name": "throughput",
            "value": ours["tflops_per_s"],
            "unit": "model TFLOP/s of a forward and backward pass",
            "baseline": plain["tflops_per_s"],
            "ratio": ours["over_plain"],
            "rows": rows,
            "shape": f"{SHAPE.layers} layers, {SHAPE.hidden_size} wide",
            "dtype": str(DTYPE).removeprefix("torch."),
            "repeats": options.repeats,
            "device": device_name(),
        },
    )


def prepare(latent: tuple[int, int, int], device: torch.device) -> tuple[dict[str, Side], dict[str, str]]:
    """The sides that run here, and why others do not."""
    tokens = len(token_positions(latent, SHAPE.patch))
    flops = training_flops(tokens, TEXT_TOKENS, SHAPE)
    wanted: dict[str, Callable[[], Side]] = {
        name: partial(goku, compute, latent, device, flops) for name, compute in variants().items()
    }
    blocks_alone = training_flops(tokens, TEXT_TOKENS, SHAPE) - training_flops(
        tokens, TEXT_TOKENS, ModelShape(**{**vars(SHAPE), "layers": 0})
    )
    wanted["plain"] = partial(plain, latent, device, blocks_alone, False)
    if ON_GPU:
        wanted["plain, compiled"] = partial(plain, latent, device, blocks_alone, True)
    # Wan adds a learned table to rows that are computed once for all blocks, so it has no 6 d x d product a block.
    modulation = 3 * 12 * SHAPE.hidden_size**2 * SHAPE.layers
    wanted["wan (diffusers)"] = partial(wan, latent, device, blocks_alone - modulation)
    sides, failed = {}, {}
    for name, make in wanted.items():
        try:
            side = make()
            side.step()
        except (RuntimeError, ImportError) as error:
            failed[name] = str(error).splitlines()[0]
        else:
            sides[name] = side
    return sides, failed


def variants() -> dict[str, ComputeConfig]:
    """Our side under every attention kernel and precision that this device may have."""
    if not ON_GPU:
        return {"goku, sdpa": ComputeConfig()}
    kernels = ["varlen", "cudnn", *(["flash3"] if importlib.util.find_spec("flash_attn_interface") else [])]
    found = {f"goku bf16, {kernel}": ComputeConfig(attention=kernel) for kernel in kernels}
    found |= {f"goku fp8, {kernel}": ComputeConfig(attention=kernel, fp8="current") for kernel in kernels}
    if importlib.util.find_spec("transformer_engine"):
        found["goku te bf16"] = ComputeConfig(engine="te")
        found |= {f"goku te fp8 {kind}": ComputeConfig(engine="te", fp8=kind) for kind in ("current", "blockwise")}
    found["goku bf16, varlen, not fused"] = ComputeConfig(attention="varlen", fused="off")
    return found


def goku(compute: ComputeConfig, latent: tuple[int, int, int], device: torch.device, flops: int) -> Side:
    model = build_model(
        SHAPE, single_process_groups(device), seed=0, dtype=DTYPE, compute_dtype=DTYPE, fsdp=False, compute=compute
    ).module
    random_weights(model, 0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE.latent_channels, *latent, generator=generator)
    text = torch.randn(TEXT_TOKENS, SHAPE.text_width, generator=generator)
    batch = pack_prompts([noise], [text], [0.3], SHAPE).to(device, DTYPE)

    def step() -> None:
        model.zero_grad()
        model(batch).float().square().mean().backward()

    return Side(step, flops)


def inputs(latent: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and text [1, tokens, hidden], cos and sin [tokens, head_dim / 2]."""
    generator = torch.Generator().manual_seed(0)
    positions = token_positions(latent, SHAPE.patch)
    x = torch.randn(1, len(positions), SHAPE.hidden_size, generator=generator)
    text = torch.randn(1, TEXT_TOKENS, SHAPE.hidden_size, generator=generator)
    cos, sin = (part[:, 0].to(device) for part in rotary_from_positions(positions, SHAPE.head_dim))
    return x.to(device, DTYPE).requires_grad_(), text.to(device, DTYPE), cos, sin


def plain(latent: tuple[int, int, int], device: torch.device, flops: int, compiled: bool) -> Side:
    stack = Stack([PublishedBlock(SHAPE.hidden_size, SHAPE.heads, SHAPE.ffn_hidden_size) for _ in range(SHAPE.layers)])
    random_weights(stack, 0)
    stack.to(device, DTYPE)
    x, text, cos, sin = inputs(latent, device)
    embedding = torch.randn(1, SHAPE.hidden_size, device=device, dtype=DTYPE)
    run = torch.compile(stack) if compiled else stack

    def step() -> None:
        stack.zero_grad()
        run(x, text, embedding, cos, sin).float().square().mean().backward()

    return Side(step, flops)


def wan(latent: tuple[int, int, int], device: torch.device, flops: int) -> Side:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    stack = Stack(
        [
            WanTransformerBlock(SHAPE.hidden_size, SHAPE.ffn_hidden_size, SHAPE.heads, cross_attn_norm=True)
            for _ in range(SHAPE.layers)
        ]
    ).to(device, DTYPE)
    x, text, cos, sin = inputs(latent, device)
    rows = torch.randn(1, 6, SHAPE.hidden_size, device=device, dtype=DTYPE)
    # Wan's tables hold every angle twice, [1, tokens, 1, head_dim].
    rotary = tuple(part.repeat_interleave(2, dim=-1)[None, :, None] for part in (cos, sin))

    def step() -> None:
        stack.zero_grad()
        stack(x, text, rows, rotary).float().square().mean().backward()

    return Side(step, flops)


def peak_memory_gb(step: Step) -> float | None:
    """Most memory allocated on the device during a step, all sides' weights included; None on a CPU."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


def figures(name: str, tokens: int, side: Side, seconds: list[float], memory: float | None) -> dict[str, Any]:
    middle = sorted(seconds)[len(seconds) // 2]
    peak = peak_flops(device_name(), "bf16")
    return {
        "side": name,
        "tokens": tokens,
        "ms": round(1000 * middle, 2),
        "tokens_per_s": round(tokens / middle, 1),
        "tflops_per_s": round(side.flops / middle / 1e12, 4),
        "bf16_mfu": None if peak is None else round(side.flops / middle / peak, 4),
        "memory_gb": memory,
    }


def line(row: dict[str, Any]) -> str:
    mfu = "" if row["bf16_mfu"] is None else f"{row['bf16_mfu']:6.1%} of the bf16 peak"
    return (
        f"  {row['side']:30}{row['ms']:10.1f} ms{row['tokens_per_s']:12,.0f} tokens/s"
        f"{row['tflops_per_s']:10.3f} TFLOP/s {mfu}  {row['over_plain']:.2f} x plain"
    )


if __name__ == "__main__":
    main()
