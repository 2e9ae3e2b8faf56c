"""What a run is: frozen dataclasses with the units in the names, validated once, at the door.

`load` reads a YAML recipe, lays dotted overrides over it and refuses every key it does not know.
The parts of the program receive their own section or single values, never a whole run.
"""

from dataclasses import dataclass, field
from typing import Literal

from goku_mega.errors import ConfigError

TimeSampler = Literal["uniform", "logit_normal"]
Precision = Literal["auto", "fp32", "bf16", "fp64"]
AttentionBackend = Literal["auto", "sdpa", "varlen", "cudnn", "flash3"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_at_least(smallest: int, config: object, *names: str, section: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= smallest, f"{section}{name} is {value}; it must be {smallest} or more")


def _require_side(name: str, pixels: int) -> None:
    """Height or width: the codec's stride of 8, and patches of two cells."""
    _require(pixels >= 16 and pixels % 16 == 0, f"{name} is {pixels}; it must be a multiple of 16")


def _require_clip_length(frames: int) -> None:
    """The codec's strides: one latent frame for the first frame, one for every four after it."""
    _require(frames >= 1 and frames % 4 == 1, f"frames is {frames}; use 1 for an image, or 4n + 1: 5, 9, 13, ...")


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
        _require_at_least(1, self, "tp", "cp", "pp", "pp_chunks", "dp_replicate", section="layout.")
        _require(
            self.cp_ring == -1 or self.cp_ring >= 1,
            f"layout.cp_ring is {self.cp_ring}; it must be 1 or more, or -1 for the smallest the heads allow",
        )
        _require(
            not self.pp_layers or (min(self.pp_layers) >= 1 and len(self.pp_layers) == self.pp * self.pp_chunks),
            f"layout.pp_layers is {list(self.pp_layers)}; give pp x pp_chunks = {self.pp * self.pp_chunks} "
            "numbers, each 1 or more",
        )
        _require(
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
        _require_at_least(1, self, "every", section="recompute.")
        _require_at_least(-1, self, "first", section="recompute.")
        _require_at_least(0, self, "memory_gb", section="recompute.")

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
        _require_at_least(0, self, "first_layers_bf16", "last_layers_bf16", section="compute.")
        _require(
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
    """Folder written by `goku-mega encode`."""
    samples_per_step: int = 32
    """Samples in a global batch, on average; every step gets an equal share of an epoch's FLOPs."""
    max_tokens_per_rank: int = 32768
    """Token cap of one packed micro-batch; a rank with more runs several and accumulates."""
    caption_dropout: float = 0.1
    """Share of samples trained with the empty caption, for classifier-free guidance."""
    prefetch_steps: int = 2
    """Packed batches prepared ahead in a thread."""
    skip_steps: tuple[int, ...] = ()
    """Positions of the data's order, from 0, that are left out: a step takes the next one that is not listed. Those
    a run has not come to yet may be added when it is resumed; a checkpoint that has come further is passed over."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "samples_per_step", "max_tokens_per_rank", section="data.")
        _require_at_least(0, self, "prefetch_steps", section="data.")
        _require(
            all(step >= 0 for step in self.skip_steps),
            f"data.skip_steps is {list(self.skip_steps)}; positions are 0 or more",
        )
        _require(
            0 <= self.caption_dropout < 1, f"data.caption_dropout is {self.caption_dropout}; use a value in [0, 1)"
        )


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
        _require(self.logit_std > 0, f"flow.logit_std is {self.logit_std}; it must be above 0")
        _require_at_least(0, self, "shift_base_tokens", section="flow.")


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
        _require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}; use a value in [0, 1)")
        fraction = self.final_rate_fraction
        _require(0 <= fraction <= 1, f"optimizer.final_rate_fraction is {fraction}; use a value from 0 to 1")
        _require_at_least(0, self, "warmup_steps", "clip_grad_norm", "weight_decay", "eps", section="optimizer.")


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
        _require_at_least(1, self, "every_steps", "keep", "store_every", section="checkpoint.")
        _require(
            self.store_every == 1 or bool(self.node_folder),
            f"checkpoint.store_every is {self.store_every}; saves that skip the store need a checkpoint.node_folder",
        )
        _require_at_least(0, self, "keep_every_steps", "keep_best", section="checkpoint.")


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Checks for numbers that hardware has changed or computed wrongly. They change nothing in a run."""

    every_steps: int = 0
    """Every how many steps, and before each checkpoint, ranks compare what they hold in common and compute a part of
    another rank's step; between updates every rank then guards its own memory. 0: never."""

    def __post_init__(self) -> None:
        _require_at_least(0, self, "every_steps", section="audit.")

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
        _require(not self.fresh or bool(self.checkpoint), "init.fresh is set; it needs init.checkpoint")


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
        _require_at_least(1, self, "steps", "threads_per_rank")


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
        _require_at_least(1, self, "steps", "batch_samples", "latent_channels", "threads", "resume_every_steps")
        _require_at_least(0, self, "warmup_steps", "kl_weight", "latent_noise")
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be above 0")
        _require(
            len(self.block_channels) == 4 and min(self.block_channels) >= 1,
            f"block_channels is {list(self.block_channels)}; give four widths, for strides 1, 2, 4 and 8",
        )
        _require(
            self.frames >= 1 and self.frames % 8 == 1, f"frames is {self.frames}; use 8n + 1: 1 for images, 9, 17, ..."
        )


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """`goku-mega corpus shapes`: write captioned clips and images of moving shapes."""

    output: str
    videos: int = 2000
    images: int = 600
    seed: int = 0
    level: Literal["one", "two", "mixed"] = "one"
    """one: one object on a plain ground; two: two objects, positions, textured grounds; mixed: half and half."""
    height: int = 64
    """Height of most clips, px."""
    width: int = 64
    """Width of most clips, px."""
    frames: int = 9
    """Length of most clips; frames - 1 is a multiple of 4."""
    varied_fraction: float = 0.15
    """Share of clips with another size, aspect ratio or length."""
    workers: int = 2

    def __post_init__(self) -> None:
        _require_at_least(0, self, "videos", "images")
        _require_at_least(1, self, "workers")
        _require(0 <= self.varied_fraction <= 1, f"varied_fraction is {self.varied_fraction}; use a value from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """`goku-mega encode`: a corpus to latents and text embeddings in tar shards."""

    corpus: str
    output: str
    vae: str = "tiny"
    """`tiny`: the VAE that ships with the package; else a local folder or a hub name."""
    text: str = "tiny"
    """`tiny`: a small T5 with a sentencepiece model trained on the captions; else a folder or a hub name."""
    samples_per_shard: int = 256
    max_frames: int = 241
    """Longer videos are cut to this many frames; lengths are cut to 4n + 1."""
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _require_at_least(1, self, "samples_per_shard", "max_frames", "workers")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """`goku-mega sample`: a prompt to an image or a video file."""

    checkpoint: str
    """A run folder (its newest intact checkpoint is used), one checkpoint folder, or exported weights."""
    prompt: str
    output: str
    """.mp4, .gif or .png decide what is written; a .png of a video is a contact sheet of its frames."""
    weights: Literal["ema", "model"] = "ema"
    seed: int = 0
    steps: int = 20
    guidance: float = 2.5
    """Classifier-free guidance scale; 1 is none."""
    solver: Literal["euler", "heun"] = "euler"
    height: int = 64
    width: int = 64
    frames: int = 9
    """1 makes an image; else 4n + 1."""
    fps: int = 8
    threads: int = 2

    def __post_init__(self) -> None:
        _require_at_least(1, self, "steps", "fps", "threads")
        for name in ("height", "width"):
            _require_side(name, getattr(self, name))
        _require_clip_length(self.frames)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`goku-mega evaluate shapes`: sample prompts and score them with the exact detector."""

    checkpoint: str
    prompts: str
    """`prompts.jsonl` written by `goku-mega corpus shapes`."""
    samples_per_prompt: int = 1
    max_prompts: int = 0
    """Score only this many prompts of each split, spread evenly over the file; 0: all."""
    untrained: bool = False
    """Also score the same model before training."""
    weights: Literal["ema", "model"] = "ema"
    seed: int = 1000
    steps: int = 20
    guidance: float = 2.5
    solver: Literal["euler", "heun"] = "euler"
    height: int = 64
    width: int = 64
    frames: int = 9
    """1 makes images; else 4n + 1."""
    batch_samples: int = 32
    """Samples drawn in one pack."""
    sheet: str = ""
    """Path of a PNG that shows the prompts and their frames; empty: none."""
    table: str = ""
    """Path of a JSON file for the scores; empty: none."""
    threads: int = 2

    def __post_init__(self) -> None:
        _require_at_least(1, self, "samples_per_prompt", "steps", "batch_samples", "threads")
        _require_at_least(0, self, "max_prompts")


@dataclass(frozen=True, kw_only=True)
class CheckpointFolder:
    """`goku-mega checkpoint list` and `verify`."""

    path: str
    """A run folder, its `checkpoints`, or one checkpoint; a path or a URL."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`goku-mega checkpoint inspect`: what one checkpoint holds, from its lists alone."""

    path: str
    """One checkpoint, or a run folder of which the newest is taken; a path or a URL."""
    tensors: str = ""
    """Pattern of names of tensors to list (`ema/*`); empty: none."""


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """`goku-mega checkpoint diff`: where two checkpoints differ."""

    first: str
    """A run folder (its newest intact checkpoint is used) or one checkpoint; a path or a URL."""
    second: str
    """The other one."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """`goku-mega checkpoint prune`: delete checkpoints that are no longer wanted."""

    path: str
    """A run folder or its `checkpoints`; a path or a URL."""
    keep: int = 3
    """Newest intact checkpoints to keep."""
    keep_every_steps: int = 0
    """Keep those of every multiple of this many steps, too; 0: none."""
    keep_best: int = 0
    """Keep this many with the lowest training loss, too."""
    delete: bool = False
    """Delete them; without it, only say which would go."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "keep")
        _require_at_least(0, self, "keep_every_steps", "keep_best")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`goku-mega checkpoint export`: a checkpoint's weights to files that others read."""

    checkpoint: str
    """A run folder (its newest intact checkpoint is used) or one checkpoint folder."""
    output: str
    """The folder to write; it must not exist yet."""
    style: Literal["safetensors", "diffusers"] = "safetensors"
    """safetensors: the transformer's weights with a model card; diffusers: a folder each for the transformer, its
    encoders and its scheduler."""
    weights: Literal["ema", "model"] = "ema"
    dtype: Literal["stored", "bf16", "fp16", "fp32", "fp64"] = "stored"
    """What the numbers are written as; stored: as they are in the checkpoint."""
    max_file_gb: float = 5.0
    """Largest file of weights, GB; more than that is divided over files with an index. 0: one file."""

    def __post_init__(self) -> None:
        _require_at_least(0, self, "max_file_gb")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """`goku-mega checkpoint import`: weights in safetensors to a checkpoint to sample or to train from."""

    source: str
    """A .safetensors file, a folder with one or with several and their index, or a folder in diffusers' style."""
    output: str
    """The folder of checkpoints to write; it must not hold any yet."""
    weights: Literal["both", "ema", "model"] = "both"
    """Stored as the model's weights, as their moving average, or as both."""
    vae: str = ""
    """VAE to sample with: `tiny`, a folder or a hub name; empty: the one that the source has or names."""
    text: str = ""
    """Text encoder to sample with: a folder or a hub name; empty: the one that the source has or names."""


@dataclass(frozen=True, kw_only=True)
class ReshardConfig:
    """`goku-mega checkpoint reshard`: a checkpoint in other files, or in another dtype."""

    checkpoint: str
    """A run folder (its newest intact checkpoint is used) or one checkpoint folder."""
    output: str
    """The folder of checkpoints to write; it must not hold any yet."""
    files: int = 1
    """Data files, of equal size."""
    dtype: Literal["stored", "bf16", "fp16", "fp32", "fp64"] = "stored"
    """What floating-point numbers are written as, those of the optimizer, too; stored: as they are."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "files")


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """What `goku-mega plan --goodput` supposes; where the figures come from is in docs/goodput.md."""

    per_1000_node_days: float = 6.5
    """Failures of nodes of 8 GPUs, of all kinds; 3.8 is Llama 3's."""
    step_s: float = 0.0
    """Seconds of a step; 0: those of the fastest layout that fits."""
    save_every_steps: int = 0
    """Steps between saves; 0: the plan chooses."""
    restart_s: float = 0.0
    """From the detection to the first step, without the load; 0: worked out from the number of GPUs."""
    start_s: float = 0.0
    """A cold start, at first and after a requeue; 0: worked out from the number of nodes."""
    repair_hours: float = 24.0
    """Until a node that was replaced is a spare."""
    spares: int = -1
    """Spare nodes; -1: enough in 99% of all moments."""
    group_nodes: int = 16
    """Nodes that the job does without for each that no spare replaces: those of a replica of the model."""
    days: float = 30.0
    """Length of the job."""
    repeats: int = 200
    """Jobs that are simulated."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require_at_least(0, self, "per_1000_node_days", "step_s", "save_every_steps", section="faults.")
        _require_at_least(0, self, "restart_s", "start_s", "repair_hours", section="faults.")
        _require_at_least(-1, self, "spares", section="faults.")
        _require_at_least(1, self, "group_nodes", "repeats", section="faults.")
        _require(self.days > 0, f"faults.days is {self.days}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """`goku-mega plan`: which layouts fit a number of GPUs, and how fast they are."""

    size: str = "8b"
    """A name in `model.sizes`: tiny, pilot-1b, 1b, 2b, 8b."""
    gpus: int
    gpu: str = "H100"
    """A name in `plan.devices`: A100, H100, H200, B200, and the cards with `PCIe` or `NVL` in their names."""
    frames: tuple[int, ...] = (241,)
    """Frames of each kind of sample: 1 is an image, else 4n + 1."""
    height: tuple[int, ...] = (720,)
    """Height of each kind, px; one number is for all."""
    width: tuple[int, ...] = (1280,)
    """Width of each kind, px; one number is for all."""
    share: tuple[float, ...] = ()
    """Each kind's share of the samples, in any unit; empty: equal shares."""
    text_tokens: int = 256
    """Text tokens of a sample."""
    samples_per_step: int = 0
    """Samples in a global batch; 0: as many as there are GPUs."""
    max_tokens_per_rank: int = 0
    """Token cap of one packed micro-batch, as `data.max_tokens_per_rank`; 0: the longest sample."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    fp8: bool = False
    """Matrix products of the blocks in FP8."""
    fused: bool = True
    """Triton kernels between the matrix products."""
    policies: tuple[str, ...] = ("off", "selective", "full")
    """Recomputation policies to consider."""
    top: int = 10
    """Layouts to print."""
    goodput: bool = False
    """Instead of the layouts: the share of the time that trains when nodes fail, and how often to save."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def __post_init__(self) -> None:
        _require_at_least(1, self, "gpus", "top")
        _require_at_least(0, self, "text_tokens", "samples_per_step", "max_tokens_per_rank")
        for name in ("frames", "height", "width"):
            _require(len(getattr(self, name)) > 0, f"{name} is empty; give a number for every kind of sample")
        for name in ("height", "width", "share"):
            count = len(getattr(self, name))
            _require(
                count in (1, len(self.frames)) or (name == "share" and count == 0),
                f"{name} has {count} numbers but frames has {len(self.frames)}; give as many, or one for all",
            )
        for frames in self.frames:
            _require_clip_length(frames)
        for name in ("height", "width"):
            for pixels in getattr(self, name):
                _require_side(name, pixels)
        _require(min(self.share, default=1.0) > 0, f"share is {list(self.share)}; each must be above 0")
        unknown = [policy for policy in self.policies if policy not in ("off", "selective", "full")]
        _require(
            bool(self.policies) and not unknown,
            f"policies is {list(self.policies)}; give one or more of off, selective, full",
        )


@dataclass(frozen=True, kw_only=True)
class NoConfig:
    """A command without settings."""
