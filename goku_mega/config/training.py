"""What a training run is: its sections, and the runs of the transformer and of the codec."""

from dataclasses import dataclass, field
from typing import Literal

from goku_mega.config.checks import require, require_at_least

TimeSampler = Literal["uniform", "logit_normal"]
Precision = Literal["auto", "fp32", "bf16", "fp64"]
AttentionBackend = Literal["auto", "sdpa", "varlen", "cudnn", "flash3"]


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Degrees of parallelism asked for; `parallel.layout` fits them to a number of processes."""

    tp: int = 1
    """Tensor parallel ranks: each layer's weights are split."""
    cp: int = 1
    """Context parallel ranks: the tokens of a packed batch are split."""
    cp_ring: int = -1
    """Ring degree inside cp, the rest is Ulysses: 1 is all Ulysses, cp is all ring. -1 takes the smallest ring
    that the heads allow (28 heads over cp=8: Ulysses 4 x ring 2)."""
    pp: int = 1
    """Pipeline stages."""
    pp_chunks: int = 1
    """Model chunks of a stage; above 1 the interleaved schedule runs."""
    pp_layers: tuple[int, ...] = ()
    """Layers of each chunk in the model's order, pp x pp_chunks numbers; empty: as even as can be."""
    dp_replicate: int = 1
    """Copies of the sharded model, each on other samples."""
    dp_shard: int = -1
    """FSDP ranks that share one copy; -1 takes what the other degrees leave."""
    sequence_parallel: bool = True
    """Split the tokens between the tensor-parallel layers too (no effect at tp=1)."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory; the update runs there."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "tp", "cp", "pp", "pp_chunks", "dp_replicate", section="layout.")
        require(
            self.cp_ring == -1 or self.cp_ring >= 1,
            f"layout.cp_ring is {self.cp_ring}; it must be 1 or more, or -1 for the smallest the heads allow",
        )
        require(
            not self.pp_layers or (min(self.pp_layers) >= 1 and len(self.pp_layers) == self.pp * self.pp_chunks),
            f"layout.pp_layers is {list(self.pp_layers)}; give pp x pp_chunks = {self.pp * self.pp_chunks} "
            "numbers, each 1 or more",
        )
        require(
            self.dp_shard == -1 or self.dp_shard >= 1,
            f"layout.dp_shard is {self.dp_shard}; it must be 1 or more, or -1 for all ranks that are left",
        )


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of being kept."""

    policy: Literal["off", "selective", "full", "auto"] = "off"
    """selective: keep what matrix products and attention give, compute the rest again; full: keep a block's
    input only; auto: the cheapest that fits the memory, by the plan."""
    every: int = 1
    """Recompute every k-th block."""
    first: int = -1
    """Recompute only among the first n blocks; -1: among all."""
    memory_gb: float = 0.0
    """Memory of one rank that `auto` may fill, GB (10^9 bytes); 0: the device's."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "every", section="recompute.")
        require_at_least(-1, self, "first", section="recompute.")
        require_at_least(0, self, "memory_gb", section="recompute.")

    def covers(self, block: int) -> bool:
        """Whether the policy is for a block, by its number from 0 in the whole model."""
        among = self.first == -1 or block < self.first
        return self.policy != "off" and among and block % self.every == 0


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """The engine of the layers and the precision of their matrix products."""

    engine: Literal["local", "te"] = "local"
    """local: megatron-core's torch layers; te: TransformerEngine's, on NVIDIA GPUs."""
    fp8: Literal["off", "delayed", "current", "blockwise", "mxfp8"] = "off"
    """FP8 recipe of the blocks' matrix products. The local engine has `current` (one scale a tensor, from the
    tensor itself), by torch's own scaled product."""
    first_layers_bf16: int = 1
    """Blocks at the start that stay in bf16 under FP8."""
    last_layers_bf16: int = 1
    """Blocks at the end that stay in bf16 under FP8."""
    attention: AttentionBackend = "auto"
    """Kernel of the core attention. varlen: torch's packed flash attention; cudnn: cuDNN's, sample by sample;
    flash3: FlashAttention 3; sdpa: what torch takes by itself. auto: varlen in half precision on a GPU, else sdpa.
    Under a ring it is varlen or sdpa: the others give no logsumexp to join blocks by."""
    fused: Literal["auto", "off"] = "auto"
    """Triton kernels for the work between the matrix products; auto: on a GPU."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "first_layers_bf16", "last_layers_bf16", section="compute.")
        require(
            self.engine == "te" or self.fp8 in ("off", "current"),
            f"compute.fp8={self.fp8} needs TransformerEngine; set compute.engine=te, or compute.fp8=current",
        )

    @property
    def token_multiple(self) -> int:
        """A rank's tokens of a pack are filled up to a multiple of this: TransformerEngine's FP8 products need it."""
        if self.engine == "local" or self.fp8 == "off":
            return 1
        return 32 if self.fp8 == "mxfp8" else 16


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the encoded samples are and how they are batched."""

    path: str
    """What `goku-mega encode` wrote: a folder, or an fsspec URL such as s3://bucket/data."""
    samples_per_step: int = 32
    """Samples in a global batch, on average; every step gets an equal share of an epoch's FLOPs."""
    max_tokens_per_rank: int = 32768
    """Token cap of one packed micro-batch; a rank with more runs several and accumulates."""
    caption_dropout: float = 0.1
    """Share of samples trained with the empty caption, for classifier-free guidance."""
    prefetch_steps: int = 2
    """Packed batches prepared ahead in a thread; the bytes of as many steps after them are read ahead, too."""
    read_threads: int = 8
    """Reads of a store (a path that is a URL) that are under way at once, on each rank; s3fs has ten connections."""
    read_retries: int = 10
    """Times that a read that failed is asked for again, after pauses from 0.25 s to 8 s: about 48 s in all."""
    slow_read_s: float = 30.0
    """A read of a store without an answer after this time is asked for again beside the first."""
    cache_folder: str = ""
    """Folder on the node's own disk for what was read of a store, shared by the node's ranks and kept for the next
    run; empty: none."""
    cache_gb: float = 100.0
    """Largest size of the cache_folder, GB (10^9 bytes); what was used longest ago goes first."""
    skip_steps: tuple[int, ...] = ()
    """Positions of the data's order, from 0, that are left out: a step takes the next one that is not listed. Those
    a run has not come to yet may be added when it is resumed; a checkpoint that has come further is passed over."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "samples_per_step", "max_tokens_per_rank", "read_threads", section="data.")
        require_at_least(0, self, "prefetch_steps", "read_retries", section="data.")
        for name in ("slow_read_s", "cache_gb"):
            require(getattr(self, name) > 0, f"data.{name} is {getattr(self, name)}; it must be above 0")
        require(
            all(step >= 0 for step in self.skip_steps),
            f"data.skip_steps is {list(self.skip_steps)}; positions are 0 or more",
        )
        require(0 <= self.caption_dropout < 1, f"data.caption_dropout is {self.caption_dropout}; use a value in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How training times are drawn (paper section 2.3)."""

    time_sampler: TimeSampler = "logit_normal"
    logit_mean: float = 0.0
    """Mean of logit(t) under `logit_normal`."""
    logit_std: float = 1.0
    """Standard deviation of logit(t) under `logit_normal`."""
    shift_base_tokens: int = 0
    """Tokens at which times are unshifted; larger samples are shifted towards noise. 0: no shift."""

    def __post_init__(self) -> None:
        require(self.logit_std > 0, f"flow.logit_std is {self.logit_std}; it must be above 0")
        require_at_least(0, self, "shift_base_tokens", section="flow.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its schedule, clipping, and the moving average of the weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the matrices of the blocks, AdamW for everything else."""
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 100
    """Steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up; `cosine` falls to `final_rate_fraction` at the last step."""
    final_rate_fraction: float = 0.1
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    ema_decay: float = 0.9999
    """Decay of the weights' moving average, reached along (1 + step) / (10 + step)."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; use a value in [0, 1)")
        fraction = self.final_rate_fraction
        require(0 <= fraction <= 1, f"optimizer.final_rate_fraction is {fraction}; use a value from 0 to 1")
        require_at_least(0, self, "warmup_steps", "clip_grad_norm", "weight_decay", "eps", section="optimizer.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves itself and how many checkpoints it keeps."""

    every_steps: int = 1000
    keep: int = 3
    """Newest committed checkpoints kept; older ones are deleted after a newer one is committed."""
    keep_every_steps: int = 0
    """Checkpoints of every multiple of this many steps are kept for ever; 0: none."""
    keep_best: int = 0
    """This many with the lowest training loss since the save before are kept, too."""
    store: str = ""
    """Folder of the checkpoints that all ranks see: a path, or an fsspec URL such as s3://bucket/run; empty:
    `checkpoints` in the run folder."""
    node_folder: str = ""
    """Folder on each node's own disk or memory, such as /dev/shm/run: checkpoints are committed there first, each
    node's files on another node, too, and then go on into the store; empty: straight into the store."""
    store_every: int = 1
    """With a node_folder: every how many saves one goes on into the store."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "every_steps", "keep", "store_every", section="checkpoint.")
        require(
            self.store_every == 1 or bool(self.node_folder),
            f"checkpoint.store_every is {self.store_every}; saves that skip the store need a checkpoint.node_folder",
        )
        require_at_least(0, self, "keep_every_steps", "keep_best", section="checkpoint.")


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Checks for numbers that hardware has changed or computed wrongly. They change nothing in a run."""

    every_steps: int = 0
    """Every how many steps, and before each checkpoint, ranks compare what they hold in common and compute a part of
    another rank's step; between updates every rank then guards its own memory. 0: never."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "every_steps", section="audit.")

    def due(self, step: int) -> bool:
        """Whether a step, by its number from 0, is one that ranks compare."""
        return self.every_steps > 0 and (step + 1) % self.every_steps == 0


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights that a new run starts from; its optimizer and its steps are new."""

    checkpoint: str = ""
    """A run folder (its newest intact checkpoint is used) or one checkpoint folder; empty: weights from the seed."""
    weights: Literal["ema", "model"] = "ema"
    fresh: tuple[str, ...] = ()
    """Patterns of names of parameters that keep their values from the seed: those the checkpoint lacks, or has in
    another shape (`image_projection.*`)."""

    def __post_init__(self) -> None:
        require(not self.fresh or bool(self.checkpoint), "init.fresh is set; it needs init.checkpoint")


@dataclass(frozen=True, kw_only=True)
class FlowRun:
    """`goku-mega train` with `task: flow`: train the transformer on encoded samples."""

    task: Literal["flow"] = "flow"
    run_dir: str
    """Checkpoints, metrics and the resolved configuration go here; a run found here is resumed."""
    size: str = "tiny"
    """A name in `model.sizes`: tiny, pilot-1b, 1b, 2b, 8b."""
    steps: int
    seed: int = 0
    precision: Precision = "auto"
    """auto: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    threads_per_rank: int = 1
    """CPU threads of a process when there is no GPU."""
    data: DataConfig
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    ignore_plan: bool = False
    """Train even where `goku-mega plan` says that the layout cannot fit."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        require_at_least(1, self, "steps", "threads_per_rank")


@dataclass(frozen=True, kw_only=True)
class VaeRun:
    """`goku-mega train` with `task: vae`: train a small CogVideoX VAE on a corpus."""

    task: Literal["vae"] = "vae"
    corpus: str
    """Folder written by `goku-mega corpus`."""
    output: str
    """Folder for `config.json` and the safetensors; diffusers loads it."""
    steps: int
    seed: int = 0
    batch_samples: int = 8
    """Clips in a batch; batches of single images hold four times as many."""
    learning_rate: float = 2e-2
    """Muon's peak rate; Adam, for the vectors, takes a tenth."""
    warmup_steps: int = 50
    kl_weight: float = 2e-4
    """Weight of the mean KL divergence of a latent number from N(0, 1)."""
    latent_noise: float = 0.0
    """Noise on the latents the decoder learns from, as a share of each channel's deviation in the batch."""
    block_channels: tuple[int, ...] = (16, 32, 48, 64)
    """Channels at strides 1, 2, 4 and 8."""
    latent_channels: int = 16
    frames: int = 9
    """Frames of a training clip: 8n + 1, whole groups of diffusers' decoder."""
    threads: int = 1
    resume_every_steps: int = 200
    """Steps between saved states; a killed run goes on from the newest one."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "steps", "batch_samples", "latent_channels", "threads", "resume_every_steps")
        require_at_least(0, self, "warmup_steps", "kl_weight", "latent_noise")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be above 0")
        require(
            len(self.block_channels) == 4 and min(self.block_channels) >= 1,
            f"block_channels is {list(self.block_channels)}; give four widths, for strides 1, 2, 4 and 8",
        )
        require(
            self.frames >= 1 and self.frames % 8 == 1, f"frames is {self.frames}; use 8n + 1: 1 for images, 9, 17, ..."
        )
