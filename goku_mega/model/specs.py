"""What a block is assembled from: one ModuleSpec per engine, one model.

`local` is megatron-core's own torch layers; it runs on CPUs and GPUs, in FP8 through `kernels.fp8`. `te` is
TransformerEngine's linear layers and attention, in FP8 by its recipes. This is the only file that knows
TransformerEngine; its names are looked up when an engine is made, for without it megatron-core hands out mocks.

TransformerEngine's norms have no place: they come fused with the linear layer behind them or on their own, and
here every norm is followed by a modulation, which `kernels.fused` joins with it.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from goku_mega.config.training import AttentionBackend, ComputeConfig
from goku_mega.errors import ConfigError, LayoutError, MissingExtra
from goku_mega.kernels import fp8
from goku_mega.model.attention import GokuCrossAttention, GokuSelfAttention
from goku_mega.model.block import GokuBlock, GokuBlockSubmodules
from goku_mega.model.core_attention import PackedAttention
from goku_mega.model.packed import RingSegments, Segments
from goku_mega.model.sizes import ModelShape


class Linears(NamedTuple):
    """An engine's tensor-parallel linear layers."""

    column: type[nn.Module]
    row: type[nn.Module]
    text: type[nn.Module]
    """Column-parallel, for the captions, which come in any number of tokens."""


LOCAL = Linears(ColumnParallelLinear, RowParallelLinear, ColumnParallelLinear)
LOCAL_FP8 = Linears(fp8.Fp8ColumnParallelLinear, fp8.Fp8RowParallelLinear, fp8.Fp8ColumnParallelLinear)


class ModulationLinear(ColumnParallelLinear):
    """The layer of the modulations, the same for every engine, with its parameters on torch's default device.

    It multiplies one row a sample, too few to gain from FP8; and TransformerEngine's cannot gather its output.
    """

    def __init__(self, *sizes: int, config: TransformerConfig, **settings: Any) -> None:
        config = copy.copy(config)
        config.use_cpu_initialization = True
        super().__init__(*sizes, config=config, **settings)


def block_spec(
    linears: Linears = LOCAL,
    *,
    cross_attention: bool,
    self_core_attention: Callable[..., nn.Module] = PackedAttention,
    block: ModuleSpec | type[GokuBlock] = GokuBlock,
) -> ModuleSpec:
    """The spec of a Goku block.

    Args:
        linears: the engine's layers.
        cross_attention: False for the class-conditional pilot.
        self_core_attention: builder of self-attention's core; context parallelism wraps it from outside.
            Cross-attention keeps torch's: its keys are few, and its segments may have no queries on a rank.
        block: the block's class, or a spec with settings of its own.
    """
    cross = ModuleSpec(
        module=GokuCrossAttention,
        submodules=CrossAttentionSubmodules(
            linear_q=linears.column,
            linear_kv=linears.text,
            core_attention=PackedAttention,
            linear_proj=linears.row,
        ),
    )
    spec = block if isinstance(block, ModuleSpec) else ModuleSpec(module=block)
    return ModuleSpec(
        module=spec.module,
        params=spec.params,
        submodules=GokuBlockSubmodules(
            modulation_linear=ModulationLinear,
            self_attention=ModuleSpec(
                module=GokuSelfAttention,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.column, core_attention=self_core_attention, linear_proj=linears.row
                ),
            ),
            cross_attention=cross if cross_attention else None,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row)),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The layers of a model's blocks, and what megatron-core has to know of them."""

    linears: Linears = LOCAL
    fp8_linears: Linears = LOCAL
    """Those of the blocks that run in FP8."""
    fp8_blocks: range = range(0)
    """Numbers of the blocks that run in FP8."""
    core_attention: Callable[..., PackedAttention] = PackedAttention
    te_recipe: bool = False
    """FP8 is a context of TransformerEngine's around a block."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of megatron-core's configuration."""

    @property
    def columns(self) -> tuple[type[nn.Module], ...]:
        """Layers whose weight is split along its first axis."""
        return (ColumnParallelLinear, self.linears.column)

    @property
    def rows(self) -> tuple[type[nn.Module], ...]:
        """Layers whose weight is split along its second axis."""
        return (RowParallelLinear, self.linears.row)

    def block(self, number: int, **parts: Any) -> ModuleSpec:
        """The spec of block `number`, counted from 0; `parts` as for `block_spec`."""
        in_fp8 = number in self.fp8_blocks
        linears = self.fp8_linears if in_fp8 else self.linears
        if self.te_recipe:
            parts["block"] = ModuleSpec(module=TeBlock, params={"in_fp8": in_fp8})
        return block_spec(linears, **parts)

    def around_blocks(self, config: TransformerConfig, tp_group: dist.ProcessGroup) -> AbstractContextManager[None]:
        """What a forward through the blocks runs in.

        Delayed scaling renews its scales where the outermost context ends, which must not be inside a forward.
        """
        delayed = config.fp8_recipe == "delayed"
        return _fp8_context(config, tp_group) if self.te_recipe and delayed else nullcontext()


def make_engine(
    compute: ComputeConfig, shape: ModelShape, *, tp: int, device: torch.device, dtype: torch.dtype, recomputes: bool
) -> Engine:
    """The engine of a run, if this machine has it.

    Args:
        dtype: type of the matrix products outside FP8.
        recomputes: whether activations are computed again in the backward pass.

    Raises:
        UserError: TransformerEngine is missing, or the device, the type or the layout cannot do what is asked.
    """
    if compute.engine == "te":
        _require_te(device, dtype)
    fp8_blocks = range(0)
    if compute.fp8 != "off":
        _require_fp8(compute, shape, tp=tp, device=device, dtype=dtype)
        fp8_blocks = range(compute.first_layers_bf16, shape.layers - compute.last_layers_bf16)
    if compute.fp8 == "delayed" and recomputes:
        raise ConfigError(
            "compute.fp8=delayed takes its scales from the forward passes before, which recomputation would repeat; "
            "use compute.fp8=current, or recompute.policy=off"
        )
    _require_attention(compute.attention, device, dtype)
    core = functools.partial(PackedAttention, backend=compute.attention)
    if compute.engine == "local":
        return Engine(fp8_linears=LOCAL_FP8, fp8_blocks=fp8_blocks, core_attention=core)
    return _te_engine(compute, fp8_blocks, TeAttention if compute.attention == "auto" else core)


def _te_engine(compute: ComputeConfig, fp8_blocks: range, core_attention: Callable[..., PackedAttention]) -> Engine:
    settings: dict[str, Any] = {
        # Parameters on no memory yet: TransformerEngine does not ask torch's default device.
        "use_cpu_initialization": False,
        "init_model_with_meta_device": True,
        # An FP8 copy of a weight, kept over micro-batches, would outlive FSDP's gathered weight, and the update.
        "disable_parameter_transpose_cache": True,
        "attention_dropout": 0.0,
    }
    if compute.fp8 != "off":
        settings |= {"fp8": _FORMATS[compute.fp8], "fp8_recipe": _RECIPES[compute.fp8]}
    linears = te_linears(text_multiple=compute.token_multiple)
    return Engine(
        linears=linears,
        fp8_linears=linears,
        fp8_blocks=fp8_blocks,
        core_attention=core_attention,
        te_recipe=compute.fp8 != "off",
        settings=settings,
    )


_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}
# Scales of small blocks reach far enough for gradients in e4m3 too, which is TransformerEngine's default for them.
_FORMATS = {"delayed": "hybrid", "current": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


def _require_te(device: torch.device, dtype: torch.dtype) -> None:
    if not te_layers.HAVE_TE:
        raise MissingExtra(
            "compute.engine=te needs TransformerEngine, which is not installed; "
            "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.9,<2.12', "
            "or set compute.engine=local"
        )
    if device.type != "cuda":
        raise ConfigError("compute.engine=te needs an NVIDIA GPU and found none; set compute.engine=local")
    if dtype != torch.bfloat16:
        raise ConfigError(f"compute.engine=te computes in bf16, not {dtype}; set precision=bf16, or engine=local")


def _require_attention(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> None:
    if backend in ("auto", "sdpa"):
        return
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"compute.attention={backend} needs an NVIDIA GPU and bf16, not {dtype} on {device.type}; use auto"
        )
    if backend == "flash3" and importlib.util.find_spec("flash_attn_interface") is None:
        raise MissingExtra(
            "compute.attention=flash3 needs FlashAttention 3, which is not installed; build the hopper folder of "
            "github.com/Dao-AILab/flash-attention, or use auto"
        )


def _require_fp8(
    compute: ComputeConfig, shape: ModelShape, *, tp: int, device: torch.device, dtype: torch.dtype
) -> None:
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"compute.fp8={compute.fp8} goes with bf16 or fp32 around it, not {dtype}")
    if device.type == "cuda" and (lacking := _lacking_for_fp8(compute, device)):
        raise ConfigError(f"compute.fp8={compute.fp8}: {lacking} Choose another recipe, or compute.fp8=off")
    multiple = max(fp8.ALIGNMENT, compute.token_multiple)
    for name, width in (("hidden width", shape.hidden_size), ("FFN width", shape.ffn_hidden_size)):
        if width % (tp * multiple):
            raise LayoutError(
                f"{name} {width} over tp={tp} is no multiple of {multiple}, as compute.fp8={compute.fp8} needs; "
                "lower layout.tp or set compute.fp8=off"
            )


def _lacking_for_fp8(compute: ComputeConfig, device: torch.device) -> str:
    """What the GPU lacks for a recipe, a sentence; empty: nothing."""
    if compute.engine == "local":
        found = torch.cuda.get_device_capability(device)
        return "" if found >= (8, 9) else f"FP8 needs compute capability 8.9 or more, this GPU has {found}."
    from transformer_engine import pytorch as te

    available = {"blockwise": te.is_fp8_block_scaling_available, "mxfp8": te.is_mxfp8_available}
    _, reason = available.get(compute.fp8, te.is_fp8_available)(return_reason=True)
    return reason


@functools.cache
def te_linears(text_multiple: int) -> Linears:
    """TransformerEngine's tensor-parallel layers; captions are filled up to `text_multiple` tokens inside theirs."""

    class TeTextLinear(te_layers.TEColumnParallelLinear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            out, bias = super().forward(F.pad(x, (0, 0, 0, -x.shape[0] % text_multiple)))
            return out[: x.shape[0]], bias

    return Linears(te_layers.TEColumnParallelLinear, te_layers.TERowParallelLinear, TeTextLinear)


def _fp8_context(
    config: TransformerConfig, tp_group: dist.ProcessGroup, *, enabled: bool = True
) -> AbstractContextManager[None]:
    from transformer_engine.pytorch import autocast

    # megatron-core's own `get_fp8_context` would ask `parallel_state` for the group and, finding none, take the whole
    # job: stages with other layers would meet in one reduction. Ranks that share a matrix have to share its scale.
    return autocast(enabled=enabled, recipe=get_fp8_recipe(config), amax_reduction_group=tp_group)


class TeBlock(GokuBlock):
    """A block under an FP8 recipe of TransformerEngine's, or kept out of the one around it.

    The context belongs to the block and not to the model, so that a recomputed block enters it again.
    """

    def __init__(self, config: TransformerConfig, *args: Any, in_fp8: bool, **parts: Any) -> None:
        super().__init__(config, *args, **parts)
        self.config = config
        self.in_fp8 = in_fp8
        self.tp_group = parts["pg_collection"].tp

    def forward(self, *inputs: Any) -> Tensor:
        with _fp8_context(self.config, self.tp_group, enabled=self.in_fp8):
            return super().forward(*inputs)


class TeAttention(PackedAttention):
    """TransformerEngine's attention as the core attention of a packed batch.

    It runs on whole samples; over heads `parallel.context` puts its own all-to-all around it, since
    TransformerEngine's wants every sample dealt to the ranks, and ours are cut where the pack is. Over a ring its
    own exchange of keys (`p2p`) is used where it can be: it wants every sample in equal, even parts, so other packs
    are refused by `takes` and go through our ring. Its `a2a+p2p` knows no packed samples at all (2.11: "thd format
    is not supported with hierarchical CP"); heads and ring together are our all-to-all around its `p2p`.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        heads: int | None = None,
        ring: dist.ProcessGroup | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        """
        Args:
            heads: heads of one call on this rank; None: the model's, over tensor-parallel ranks.
            ring: ranks that hold the parts of every sample.
        """
        super().__init__(config=config, softmax_scale=softmax_scale)
        config, groups = copy.copy(config), copy.copy(pg_collection)
        if heads is not None:
            config.num_attention_heads = config.num_query_groups = heads * config.tensor_model_parallel_size
        config.context_parallel_size = 1 if ring is None else ring.size()
        groups.cp = ring
        self.parts = config.context_parallel_size
        self.inner = te_layers.TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.padding,
            attention_type=attention_type,
            attention_dropout=0.0,
            softmax_scale=self.softmax_scale,
            cp_comm_type="p2p",
            pg_collection=groups,
        )

    def takes(self, segments: Segments | RingSegments) -> bool:
        """Whether TransformerEngine can attend over these samples."""
        if isinstance(segments, Segments):
            return self.parts == 1
        first, *others = segments.lengths
        even = all(length % 2 == 0 for length in first) and all(part == first for part in others)
        return even and len(segments.lengths) == self.parts

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | RingSegments) -> Tensor:
        """query, key, value and result: [tokens (/ring), heads, head_dim]."""
        if isinstance(segments, RingSegments):
            whole = tuple(sum(parts) for parts in zip(*segments.lengths, strict=True))
            segments = Segments(whole, whole)
        cu_q, cu_kv = segments.edges(query.device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_q,
            cu_seqlens_kv=cu_kv,
            max_seqlen_q=max(segments.q_lengths),
            max_seqlen_kv=max(segments.kv_lengths),
        )
        if self.parts > 1:  # asked for there; nothing lies between the samples
            packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded = cu_q, cu_kv
        attended = self.inner(query, key, value, None, AttnMaskType.padding, packed_seq_params=packed)
        return attended.view(query.shape)
