"""What the fused kernels are held against: each case runs the plain operations and the kernels on the same numbers.

On a CPU the kernels run in Triton's interpreter, which must be asked for before triton is imported, so `run_ranks`
gives these cases processes of their own. Tensors are made on torch's default device.
"""

import sys
from collections.abc import Callable, Iterable
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from goku_mega.kernels.fused import gated_add, modulated_norm, norm_and_rotate
from goku_mega.kernels.pieces import sample_pieces

EPS = 1e-6
Outputs = dict[str, tuple[Tensor, Tensor]]

PACKS = {
    "one": [5],
    "ragged": [1, 7, 33, 0, 3],
    "empty ends": [0, 32, 2, 0],
}
"""Tokens of each sample of a pack."""


def fresh_triton() -> None:
    """Have triton imported anew: the process that ranks are forked from read TRITON_INTERPRET at its own start."""
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
        del sys.modules[name]
    sys.modules.pop("goku_mega.kernels.triton_fused", None)


def draw(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(size))
    numbers = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device(), dtype).requires_grad_()


def sample_index(pack: str, shuffled: bool = False) -> Tensor:
    lengths = torch.tensor(PACKS[pack])
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    if shuffled:
        index = index[draw(len(index)).argsort()]
    return index


def compared(run: Callable[[bool], Iterable[Tensor]], inputs: dict[str, Tensor | None]) -> Outputs:
    """Outputs, and gradients of a loss that weighs every output number differently: (plain, fused) by name."""
    found = []
    for fused in (False, True):
        outputs = list(run(fused))
        weights = [draw(*out.shape, seed=9 + number).to(out.dtype).detach() for number, out in enumerate(outputs)]
        wanted = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(loss, list(wanted.values()))
        results = {f"out {number}": out for number, out in enumerate(outputs)}
        found.append(results | {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)})
    plain, fused = found
    return {name: (plain[name].detach().cpu(), fused[name].detach().cpu()) for name in plain}


def norm_case(pack: str, width: int, dtype: torch.dtype, rms: bool, shuffled: bool = False) -> Outputs:
    index = sample_index(pack, shuffled)
    rows = torch.promote_types(dtype, torch.float32)
    samples = len(PACKS[pack])
    inputs = {
        "x": draw(len(index), width, dtype=dtype),
        "shift": draw(samples, width, dtype=rows, seed=1),
        "scale": draw(samples, width, dtype=rows, seed=2),
        "weight": draw(width, dtype=dtype, seed=3) if rms else None,
    }

    def run(fused: bool) -> list[Tensor]:
        pieces = sample_pieces(index, samples) if fused else None
        # An offset, so that a mean that is not taken off shows.
        moved = inputs | {"x": inputs["x"] + 3}
        return [modulated_norm(**moved, sample_index=index, eps=EPS, pieces=pieces)]

    return compared(run, inputs)


def many_pieces_case() -> Outputs:
    """More pieces of a sample than one step of the sum over them takes."""
    with patch("goku_mega.kernels.pieces.PIECE_ROWS", 1):
        return norm_case("ragged", 4, torch.float64, rms=True)


def gate_case(pack: str, width: int, dtype: torch.dtype, biased: bool, shuffled: bool = False) -> Outputs:
    index = sample_index(pack, shuffled)
    samples = len(PACKS[pack])
    inputs = {
        "residual": draw(len(index), width, dtype=dtype),
        "update": draw(len(index), width, dtype=dtype, seed=1),
        "gate": draw(samples, width, dtype=torch.promote_types(dtype, torch.float32), seed=2),
        "bias": draw(width, dtype=dtype, seed=3) if biased else None,
    }

    def run(fused: bool) -> list[Tensor]:
        pieces = sample_pieces(index, samples) if fused else None
        return [gated_add(**inputs, sample_index=index, pieces=pieces)]

    return compared(run, inputs)


def rotate_case(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, normed: int, parts: int, rotated: bool
) -> Outputs:
    """Under several ranks, this rank's heads of a norm over all of them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    local = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
    # Laid out as a fused projection's rows: the parts of a head lie side by side.
    inputs = {"heads": draw(tokens, heads, parts, head_dim, dtype=dtype)[:, local].detach().requires_grad_()}
    for number in range(normed):
        whole = draw(heads, head_dim, dtype=dtype, seed=2 + number)
        inputs[f"weight {number}"] = whole[local].flatten().detach().requires_grad_()
    angle = draw(tokens, 1, head_dim // 2, dtype=torch.promote_types(dtype, torch.float32), seed=7).detach()
    rotary = (angle.cos(), angle.sin()) if rotated else None

    def run(fused: bool) -> tuple[Tensor, ...]:
        weights = tuple(tensor for name, tensor in inputs.items() if name != "heads")
        return norm_and_rotate(inputs["heads"], weights, rotary, group=dist.group.WORLD, eps=EPS, fused=fused)

    return compared(run, inputs)


def transformer_case(policy: str) -> tuple[Outputs, list[str]]:
    """A small transformer over the ranks as tensor-parallel group, with sequence parallelism; and its graph's nodes.

    The fused one recomputes by the policy.
    """
    from goku_mega.config.training import RecomputeConfig
    from goku_mega.model.packed import PackedBatch, Segments
    from goku_mega.model.sizes import ModelShape
    from goku_mega.model.specs import block_spec
    from goku_mega.model.transformer import GokuTransformer, megatron_config
    from goku_mega.parallel.groups import build_groups, support_megatron_on_host
    from goku_mega.parallel.layout import Layout
    from goku_mega.parallel.recompute import apply_recompute

    support_megatron_on_host()
    ranks = dist.get_world_size()
    shape = ModelShape(layers=1, hidden_size=24, ffn_hidden_size=32, heads=2, latent_channels=2, text_width=6)
    groups = build_groups(Layout(tp=ranks), torch.device("cpu")).model
    config = megatron_config(shape, tp=ranks, sequence_parallel=ranks > 1, dtype=torch.float64)
    lengths, words = (5, 34, 1), (3, 1, 2)
    tokens = sum(lengths)
    batch = PackedBatch(
        patches=draw(tokens, shape.patch_dim).detach(),
        positions=torch.arange(3 * tokens).view(tokens, 3).remainder(5),
        sample_index=torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)),
        timesteps=torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
        self_segments=Segments(lengths, lengths),
        text=draw(sum(words), 6).detach(),
        cross_segments=Segments(lengths, words),
    )
    models, nodes = {}, []
    for fused in (False, True):
        spec = block_spec(cross_attention=True)
        model = GokuTransformer(shape, config=config, block=lambda number, spec=spec: spec, groups=groups, fused=fused)
        for number, parameter in enumerate(model.parameters()):
            parameter.data = 0.3 * draw(*parameter.shape, seed=number).detach()
        models[fused] = model
    apply_recompute(models[True].blocks, RecomputeConfig(policy=policy))

    def run(fused: bool) -> list[Tensor]:
        velocity = models[fused](batch)
        if fused:
            nodes.extend(_graph(velocity.grad_fn))
        velocity.square().sum().backward()
        return [velocity.detach(), *(parameter.grad for parameter in models[fused].parameters())]

    names = ["velocity", *(name for name, _ in models[True].named_parameters())]
    return dict(zip(names, zip(run(False), run(True), strict=True), strict=True)), nodes


def _graph(start: object) -> list[str]:
    """The names of all nodes of an autograd graph."""
    found, todo = {}, [start]
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            todo.extend(after for after, _ in node.next_functions)
    return [node.name() for node in found.values()]
