"""The time model: what must hold whatever its shares are, and two published figures that it has to be near."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.config.training import RecomputeConfig
from goku_mega.model.sizes import SIZES, ModelShape
from goku_mega.parallel.layout import Layout
from goku_mega.plan.activations import Numerics
from goku_mega.plan.devices import GPUS
from goku_mega.plan.memory import POLICIES
from goku_mega.plan.speed import StepTime, step_time, utilisation
from goku_mega.plan.workload import Kind, Workload

H100 = GPUS["H100"]
LONG, SHORT = 219_600, 8_192


def seconds(layout: Layout, *, tokens: int = LONG, samples: int = 64, policy: str = "off", **options) -> StepTime:  # type: ignore[no-untyped-def]
    work = Workload((Kind(tokens, 256, 1.0),), samples, tokens)
    recompute = RecomputeConfig(policy=policy)
    return step_time(SIZES["8b"], layout, work, Numerics(), H100, recompute=recompute, **options)


@settings(max_examples=30, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 8]), cp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 4]),
    tokens=st.sampled_from([SHORT, LONG]),
)  # fmt: skip
def test_more_recomputation_takes_more_time_and_parts_add_up(tp, cp, pp, tokens):
    layout = Layout(tp=tp, ulysses=cp, pp=pp, dp_shard=8, sequence_parallel=tp > 1)
    off, selective, full = (seconds(layout, tokens=tokens, policy=policy) for policy in POLICIES)
    assert off.total <= selective.total * (1 + 1e-9) and selective.total <= full.total * (1 + 1e-9)
    assert off.recomputed == 0 < selective.recomputed < full.recomputed
    assert off.total == pytest.approx(sum(getattr(off, name) for name in off.__dataclass_fields__))


def test_a_pipeline_waits_its_stages_less_one_over_its_packs_and_chunks():
    one, two = Layout(pp=4, dp_shard=4), Layout(pp=4, chunks=2, dp_shard=4)
    busy = seconds(one)  # 64 samples over 4 ranks: 16 packs
    computing = busy.products + busy.attention + busy.between
    assert busy.bubble == pytest.approx(3 / 16 * computing)
    assert seconds(two).bubble == pytest.approx(busy.bubble / 2)


def test_a_ring_hides_behind_long_attention_and_shows_with_short_packs():
    ring = Layout(ring=8, dp_shard=8)
    assert seconds(ring).context == 0
    assert seconds(ring, tokens=SHORT).context > 0
    # Over the network it shows sooner.
    assert seconds(Layout(ring=64), tokens=SHORT).context > seconds(ring, tokens=SHORT).context


def test_tensor_parallelism_pays_for_the_same_bytes_with_and_without_sequence_parallelism():
    plain, split = Layout(tp=4, dp_shard=16), Layout(tp=4, dp_shard=16, sequence_parallel=True)
    assert seconds(plain).tensor == seconds(split).tensor > 0
    assert seconds(Layout(dp_shard=64)).tensor == 0


def test_gathering_weights_shows_only_where_packs_are_short():
    far = Layout(dp_shard=64)
    first_block_only = seconds(far).shards / seconds(far).total
    assert first_block_only < 0.01
    assert seconds(far, tokens=SHORT, samples=64).shards / seconds(far, tokens=SHORT, samples=64).total > 0.3
    assert seconds(Layout(dp_shard=8, dp_replicate=8), tokens=SHORT).shards < seconds(far, tokens=SHORT).shards


def test_fp8_speeds_the_products_and_nothing_else():
    plain, fp8 = seconds(Layout(dp_shard=64)), seconds(Layout(dp_shard=64), fp8=True)
    assert fp8.products == pytest.approx(plain.products / 1.5)
    assert replace(fp8, products=0.0, shards=0.0) == replace(plain, products=0.0, shards=0.0)


@pytest.mark.parametrize(
    ("tokens", "layout", "published"),
    [
        (8_192, Layout(tp=2, dp_shard=128, sequence_parallel=True), 0.52),
        (74_000, Layout(tp=2, ulysses=4, dp_shard=32, sequence_parallel=True), 0.44),
    ],
)
def test_a_7b_video_transformer_on_256_gpus_is_near_its_published_utilisation(tokens, layout, published):
    """arXiv 2503.12964. Their data parallelism moves gradients once a step; ours is left out of the comparison."""
    shape = ModelShape(layers=28, hidden_size=4096, ffn_hidden_size=16384, heads=32)
    work = Workload((Kind(tokens, 512, 1.0),), 2 * layout.dp, tokens)
    time = step_time(shape, layout, work, Numerics(), H100, recompute=RecomputeConfig())
    assert utilisation(shape, layout, work, H100, time.total - time.shards) == pytest.approx(published, abs=0.03)
