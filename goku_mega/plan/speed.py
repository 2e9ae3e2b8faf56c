"""Seconds of a training step in a layout, on paper. No torch.

Every share of a peak stands here with its source. The model has not been held against a GPU yet: it ranks layouts,
and its seconds are an estimate.
"""

from dataclasses import dataclass, fields

from goku_mega.config.training import RecomputeConfig
from goku_mega.model.sizes import ModelShape
from goku_mega.parallel.layout import Layout
from goku_mega.plan.activations import Numerics, block_bytes
from goku_mega.plan.devices import Gpu
from goku_mega.plan.flops import TRAINING_PASSES
from goku_mega.plan.memory import model_numbers
from goku_mega.plan.workload import Workload

PRODUCT_SHARE = 0.78
"""Of the bf16 peak that large matrix products reach: 769 to 798 of 989 TFLOP/s were seen on an H200 at 8192^3."""
FP8_GAIN = 1.5
"""Linear layers in FP8 against bf16. Whole runs gain 1.37 (415 to 570 TFLOP/s on H100, arXiv 2411.08719), attention
and the rest of them unchanged."""
TRAFFIC_PASSES = 5
"""Reads and writes of what a block keeps, by the work between the products: two forward, three backward."""
FORWARD_TRAFFIC_PASSES = 2
LINK_SHARE = 0.8
"""Of a link's rate that a collective reaches, and of the memory's rate that a kernel does: an assumption."""
UPDATE_NUMBERS = 14
"""Reads and writes for each parameter in clipping (3), AdamW (7), the average (3) and clearing gradients (1)."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds; the communication is what nothing hides."""

    products: float
    """Matrix products."""
    attention: float
    between: float
    """Norms, modulation, rotation, GELU: bound by memory."""
    recomputed: float
    tensor: float
    """Tensor parallel: all-gathers and reduce-scatters (or all-reduces) around the layers."""
    context: float
    """Ulysses' all-to-alls, and of the ring what outlasts attention."""
    shards: float
    """FSDP's gathers and reductions, and the replicas', beyond the computation they run beside."""
    bubble: float
    """Pipeline stages that wait at the start and the end."""
    update: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def communication(self) -> float:
        """Exposed."""
        return self.tensor + self.context + self.shards


def step_time(
    shape: ModelShape,
    layout: Layout,
    work: Workload,
    numerics: Numerics,
    gpu: Gpu,
    *,
    recompute: RecomputeConfig,
    fp8: bool = False,
) -> StepTime:
    """Seconds of a step whose work is spread evenly over the GPUs."""
    of_attention = work.attention_flops(shape) / layout.world_size
    of_products = work.forward_flops(shape) / layout.world_size - of_attention
    peak = 1e12 * gpu.tflops["bf16"]
    products = of_products / (peak * PRODUCT_SHARE * (FP8_GAIN if fp8 else 1.0))
    attention = of_attention / (peak * gpu.attention_share)
    between = _traffic(shape, layout, work, numerics) / (1e9 * gpu.memory_gb_per_s * LINK_SHARE)
    again = sum(recompute.covers(block) for block in range(shape.layers)) / shape.layers
    recomputed = FORWARD_TRAFFIC_PASSES * between
    if recompute.policy == "full":
        recomputed += products + attention
    tensor = _tensor_seconds(shape, layout, work, numerics, gpu, again)
    ulysses, ring = _context_seconds(shape, layout, work, numerics, gpu, again)
    context = ulysses + max(0.0, ring - TRAINING_PASSES * attention)
    computing = TRAINING_PASSES * (products + attention) + TRAFFIC_PASSES * between + again * recomputed
    shards = _shard_seconds(shape, layout, work, numerics, gpu)
    blocks = shape.layers / layout.pp
    # A block's weights travel while the one before computes; those of the first do not.
    exposed = max(shards - computing, shards / blocks)
    micro_batches = work.micro_batches(layout)
    bubble = (layout.pp - 1) / (micro_batches * layout.chunks) * (computing + tensor + context)
    return StepTime(
        products=TRAINING_PASSES * products,
        attention=TRAINING_PASSES * attention,
        between=TRAFFIC_PASSES * between,
        recomputed=again * recomputed,
        tensor=tensor,
        context=context,
        shards=exposed,
        bubble=bubble,
        update=_update_seconds(shape, layout, numerics, gpu),
    )


def utilisation(shape: ModelShape, layout: Layout, work: Workload, gpu: Gpu, seconds: float) -> float:
    """Model FLOPs (recomputation counts nothing) over what the GPUs' bf16 peak allows in that time."""
    flops = TRAINING_PASSES * work.forward_flops(shape)
    return flops / (seconds * layout.world_size * 1e12 * gpu.tflops["bf16"])


def _rank_tokens(layout: Layout, work: Workload) -> float:
    """Tokens of a step on one context-parallel rank."""
    return work.tokens / layout.dp / layout.cp


def _traffic(shape: ModelShape, layout: Layout, work: Workload, numerics: Numerics) -> float:
    """Bytes that one pass over what a rank keeps of a step moves."""
    pack = work.fullest_pack(layout)
    kept = block_bytes(shape, layout, pack, numerics).off * shape.layers / layout.pp
    return kept * work.tokens / layout.dp / pack.tokens


def _tensor_seconds(
    shape: ModelShape, layout: Layout, work: Workload, numerics: Numerics, gpu: Gpu, again: float
) -> float:
    """Three pairs of layers a block, each gathering and scattering once forward and once backward.

    Without sequence parallelism the same bytes go into all-reduces. What sequence parallelism gathers again for
    the weights' gradients runs beside a product.
    """
    if layout.tp == 1:
        return 0.0
    volume = _rank_tokens(layout, work) * shape.hidden_size * numerics.computed * (layout.tp - 1) / layout.tp
    transfers = 12 + 6 * again
    return transfers * volume * shape.layers / layout.pp / _link(gpu, layout.tp)


def _context_seconds(
    shape: ModelShape, layout: Layout, work: Workload, numerics: Numerics, gpu: Gpu, again: float
) -> tuple[float, float]:
    """Seconds of Ulysses' exchanges (query, key, value and result, both ways) and of the ring's keys and values.

    The ring's backward pass carries the keys and values again and their gradients in fp32 besides.
    """
    layers = shape.layers / layout.pp
    numbers_of_one = _rank_tokens(layout, work) * shape.hidden_size / layout.tp
    exchanged = (8 + 4 * again) * numbers_of_one * numerics.computed * (layout.ulysses - 1) / layout.ulysses
    passed = 2 * numbers_of_one * (2 * (layout.ring - 1) * numerics.computed + layout.ring * numerics.wide)
    ulysses = layers * exchanged / _link(gpu, layout.tp * layout.ulysses)
    ring = layers * passed / _link(gpu, layout.tp * layout.cp) if layout.ring > 1 else 0.0
    return ulysses, ring


def _shard_seconds(shape: ModelShape, layout: Layout, work: Workload, numerics: Numerics, gpu: Gpu) -> float:
    """Seconds of FSDP's two gathers and one reduction a micro-batch, and of the replicas' all-reduce."""
    whole = model_numbers(shape, layout.tp) / layout.pp
    shards = layout.dp_shard * layout.cp
    volume = whole * (2 * numerics.computed + numerics.wide) * (shards - 1) / shards
    seconds = volume / _link(gpu, layout.tp * shards)
    if layout.dp_replicate > 1:
        reduced = 2 * whole / shards * numerics.wide * (layout.dp_replicate - 1) / layout.dp_replicate
        seconds += reduced / _link(gpu, layout.tp * shards * layout.dp_replicate)
    return work.micro_batches(layout) * seconds


def _update_seconds(shape: ModelShape, layout: Layout, numerics: Numerics, gpu: Gpu) -> float:
    shards = layout.dp_shard * layout.cp
    held = model_numbers(shape, layout.tp, shards) / layout.pp
    return UPDATE_NUMBERS * numerics.stored * held / (1e9 * gpu.memory_gb_per_s * LINK_SHARE)


def _link(gpu: Gpu, ranks: int) -> float:
    """Bytes a second between so many neighbouring ranks."""
    return 1e9 * LINK_SHARE * (gpu.node_gb_per_s if ranks <= gpu.per_node else gpu.network_gb_per_s)
