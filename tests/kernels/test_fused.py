"""The plain operations are the formulas, and the fused kernels are the plain operations, in fp64 to rounding."""

import importlib.util
import re
from collections import Counter

import pytest
import torch
from fused_cases import PACKS, fresh_triton, gate_case, many_pieces_case, norm_case, rotate_case, transformer_case

from goku_mega.kernels.fused import fused_available, gated_add, modulated_norm, norm_and_rotate, rotate
from goku_mega.kernels.pieces import PIECE_ROWS, sample_pieces
from goku_mega.parallel.groups import single_process_groups
from launch import run_ranks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
INDEX = torch.tensor([0, 0, 2, 2, 2, 1])
F64, BF16 = torch.float64, torch.bfloat16

CASES = {
    **{
        f"{kind}, {pack}, {width} wide{', shuffled' if shuffled else ''}": (make, (pack, width, F64, option, shuffled))
        for kind, make, option in (
            ("LayerNorm", norm_case, False),
            ("RMSNorm", norm_case, True),
            ("gate", gate_case, False),
            ("gate and bias", gate_case, True),
        )
        for pack, width, shuffled in (
            ("one", 5, False), ("ragged", 24, False), ("ragged", 131, True), ("empty ends", 72, False),
        )
    },
    "RMSNorm, more pieces than one step adds up": (many_pieces_case, ()),
    "self-attention's q and k": (rotate_case, (45, 3, 24, F64, 2, 3, True)),
    "cross-attention's q": (rotate_case, (33, 2, 72, F64, 1, 1, True)),
    "cross-attention's k": (rotate_case, (7, 2, 64, F64, 1, 2, False)),
    "a rank without tokens": (rotate_case, (0, 2, 6, F64, 2, 3, True)),
    "bf16 LayerNorm": (norm_case, ("ragged", 24, BF16, False)),
    "bf16 RMSNorm": (norm_case, ("ragged", 24, BF16, True)),
    "bf16 gate and bias": (gate_case, ("ragged", 24, BF16, True)),
    "bf16 q and k": (rotate_case, (33, 2, 64, BF16, 2, 3, True)),
}  # fmt: skip
SPLIT = {
    "two ranks' q and k": (rotate_case, (37, 4, 6, F64, 2, 3, True)),
    "two ranks' text keys": (rotate_case, (5, 4, 6, F64, 1, 2, False)),
}


def run_cases(rank, cases, device):
    fresh_triton()
    with torch.device(device):
        return {name: make(*arguments) for name, (make, arguments) in cases.items()}


def run_transformer(rank, policy):
    fresh_triton()
    return transformer_case(policy)


@pytest.fixture
def interpreted(monkeypatch):
    """The ranks' processes run the kernels in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", params=["interpreter", "GPU"])
def found(request):
    on_gpu = request.param == "GPU"
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0" if on_gpu else "1")
        (alone,) = run_ranks(run_cases, 1, CASES, "cuda" if on_gpu else "cpu")
    return alone


def check(outputs):
    for name, (plain, fused) in outputs.items():
        tolerance = 2**-7 if plain.dtype == BF16 else 1e-11 if name.startswith("grad") else 1e-12
        size = plain.abs().max().item() if plain.numel() else 0.0
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance * max(size, 1.0), msg=name)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_what_the_plain_operations_give(found, case):
    if case.startswith("bf16"):
        # The gradients of fp32 rows come from bf16 numbers too, which the plain operations round once more.
        check({name: tuple(part.to(BF16) for part in pair) for name, pair in found[case].items()})
        assert all(plain.dtype == fused.dtype for plain, fused in found[case].values())
    else:
        check(found[case])


@needs_triton
def test_the_norm_of_a_rank_counts_the_heads_of_all_ranks(interpreted):
    for outputs in run_ranks(run_cases, 2, SPLIT, "cpu"):
        for case in SPLIT:
            check(outputs[case])


@needs_triton
@pytest.mark.parametrize(("tp", "policy"), [(1, "off"), (2, "off"), (2, "selective")])
def test_a_fused_transformer_gives_what_the_plain_one_gives(interpreted, tp, policy):
    for outputs, nodes in run_ranks(run_transformer, tp, policy):
        for name, (plain, fused) in outputs.items():
            torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-11 * plain.abs().max().item(), msg=name)
        # Two of the block and one of the final layer; after self-attention and the FFN; self q and k, cross q, cross k.
        count = Counter(nodes)
        assert count["FusedModulatedNormBackward"] == 3
        assert count["FusedGatedAddBackward"] == 2
        assert count["FusedNormAndRotateBackward"] == 3


@needs_triton
def test_nothing_of_a_rows_width_but_the_inputs_is_kept_for_the_backward_pass(interpreted):
    (kept,) = run_ranks(kept_shapes, 1)
    assert kept.count((6, 8)) == 2  # x and the update, once each
    assert kept.count((6, 2, 3, 4)) == 1  # the projection's output, as it came
    assert all(shape in {(6, 8), (6, 2, 3, 4), (3, 8), (8,), (6,), (2, 6), (6, 1, 2)} for shape in kept)


def kept_shapes(rank):
    fresh_triton()
    group = single_process_groups().model.tp
    x, rows, weight = (torch.randn(*size, requires_grad=True) for size in ((6, 8), (3, 8), (8,)))
    heads, angle = torch.randn(6, 2, 3, 4, requires_grad=True), torch.randn(6, 1, 2)
    pieces = sample_pieces(INDEX, 3)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        modulated_norm(x, rows, rows, INDEX, eps=1e-6, pieces=pieces)
        gated_add(x, x, rows, INDEX, bias=weight, pieces=pieces)
        norm_and_rotate(heads, (weight, weight), (angle, angle), group=group, eps=1e-6, fused=True)
    return kept


@needs_triton
def test_other_token_and_sample_counts_compile_nothing_new_and_sums_are_not_atomic(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (first, later, code) = run_ranks(compile_for_hopper, 1)[0]
    assert len(first) >= 11 and later == []
    assert not any(re.search(r"\b(atom|red)\.", ptx) for ptx in code)


def compile_for_hopper(rank):
    """What is compiled for packs of several sizes: first, then later. Nothing runs; no GPU is needed."""
    fresh_triton()
    import triton
    from triton.backends.compiler import GPUTarget

    class NoDriver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(NoDriver())
    compiled, code = [], []
    triton.knobs.runtime.jit_post_compile_hook = lambda **told: compiled.append(told["fn"].name)
    launch = triton.runtime.jit.JITFunction.run

    def only_compile(self, *arguments, grid, warmup, **options):
        code.append(launch(self, *arguments, grid=grid, warmup=True, **options).asm["ptx"])

    triton.runtime.jit.JITFunction.run = only_compile
    use_every_kernel(tokens=64, samples=2)
    first = compiled.copy()
    for tokens, samples in ((1, 1), (7, 3), (33, 16), (128, 5), (4097, 1)):
        use_every_kernel(tokens, samples)
    return first, compiled[len(first) :], code


def use_every_kernel(tokens, samples):
    def zeros(*size, dtype=BF16):
        return torch.zeros(size, dtype=dtype, requires_grad=True)

    width, group = 144, single_process_groups().model.tp
    index = torch.arange(tokens).remainder(samples)
    pieces, rows = sample_pieces(index, samples), zeros(samples, width, dtype=torch.float32)
    rotary = (torch.zeros(tokens, 1, 36),) * 2
    for weight in (None, zeros(width)):
        modulated_norm(zeros(tokens, width), rows, rows, index, eps=1e-6, weight=weight, pieces=pieces).sum().backward()
        gated_add(zeros(tokens, width), zeros(tokens, width), rows, index, bias=weight, pieces=pieces).sum().backward()
    for parts, normed, turn in ((3, 2, rotary), (1, 1, rotary), (2, 1, None)):
        weights = (zeros(width),) * normed
        heads = norm_and_rotate(zeros(tokens, 2, parts, 72), weights, turn, group=group, eps=1e-6, fused=True)
        sum(part.sum() for part in heads).backward()


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_pieces_hold_every_token_once_and_one_sample_each(pack, shuffled):
    lengths = torch.tensor(PACKS[pack])
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    if shuffled:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
    pieces = sample_pieces(index, len(lengths))
    held = []
    for number, (begin, end, sample) in enumerate(zip(pieces.begin, pieces.end, pieces.sample, strict=True)):
        tokens = pieces.order[begin:end] if end > begin else pieces.order[:0]
        assert len(tokens) <= PIECE_ROWS
        assert (index[tokens] == sample).all()
        if len(tokens):
            assert pieces.edges[sample] <= number < pieces.edges[sample + 1]
        held += tokens.tolist()
    assert sorted(held) == list(range(len(index)))
    assert int(pieces.edges[-1]) == sum(-(-length // PIECE_ROWS) for length in PACKS[pack])


def test_pieces_of_another_pack_are_refused():
    pytest.importorskip("triton", reason="triton is not installed")
    rows = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="pieces of 4 samples.* of 3"):
        gated_add(torch.zeros(6, 4), torch.zeros(6, 4), rows, INDEX, pieces=sample_pieces(INDEX, 4))


def test_there_are_no_kernels_for_a_cpu():
    assert not fused_available(torch.device("cpu"))


def draw(*size, seed=0):
    generator = torch.Generator().manual_seed(sum(size) + 100 * seed)
    return torch.randn(size, generator=generator, dtype=F64, requires_grad=True)


def test_plain_gradients_are_those_of_the_written_out_formulas():
    x, y, rows, weight = draw(6, 4), draw(6, 4, seed=1), draw(3, 4), draw(4)
    group = single_process_groups().model.tp

    def norm(x, rows, weight=None):
        return modulated_norm(x, rows, 2 * rows, INDEX, eps=1e-6, weight=weight)

    def gate(x, y, rows, bias):
        return gated_add(x, y, rows, INDEX, bias=bias)

    angle = draw(6, 1, 2).detach()

    def turn(heads, weight):
        rotary = (angle.cos(), angle.sin())
        return norm_and_rotate(heads, (weight,), rotary, group=group, eps=1e-6, fused=False)

    heads, wide = draw(6, 2, 2, 4), draw(8)
    assert torch.autograd.gradcheck(norm, (x, rows))
    assert torch.autograd.gradcheck(norm, (x, rows, weight))
    assert torch.autograd.gradcheck(gate, (x, y, rows, weight))
    assert torch.autograd.gradcheck(turn, (heads, wide))

    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x, rows), normed * (1 + 2 * rows[INDEX]) + rows[INDEX])
    normed = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(norm(x, rows, weight), normed * (1 + 2 * rows[INDEX]) + rows[INDEX])
    torch.testing.assert_close(gate(x, y, rows, weight), x + (y + weight) * rows[INDEX])
    query, value = turn(heads, wide)
    raw = heads[:, :, 0]
    normed = raw / (raw.square().mean((1, 2), keepdim=True) + 1e-6).sqrt() * wide.view(2, 4)
    torch.testing.assert_close(query, rotate(normed, angle.cos(), angle.sin()))
    assert torch.equal(value, heads[:, :, 1])


def test_plain_operations_keep_nothing_of_the_size_of_the_rows_times_tokens():
    x, rows = draw(6, 4), draw(3, 4)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        modulated_norm(x, rows, rows, INDEX, eps=1e-6)
        gated_add(x, x, rows, INDEX)
    assert kept.count((6, 4)) == 3  # x, the normed x and the update, once each
    assert all(shape in {(6, 4), (3, 4), (6,), (6, 1)} for shape in kept)


def test_bf16_tokens_are_modulated_and_gated_in_fp32():
    x = torch.full((6, 4), 1.0078125, dtype=BF16)
    gate = torch.full((3, 4), 1e-3)
    exact = (x.float() + x.float() * gate[INDEX]).to(BF16)
    assert torch.equal(gated_add(x, x, gate, INDEX), exact)
    rough = torch.linspace(-2, 2, 24).view(6, 4).to(BF16)
    normed = torch.nn.functional.layer_norm(rough, (4,), eps=1e-6)
    exact = (normed.float() * (1 + gate[INDEX])).to(BF16)
    assert torch.equal(modulated_norm(rough, torch.zeros(3, 4), gate, INDEX, eps=1e-6), exact)
