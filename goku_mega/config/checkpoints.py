"""What the commands on checkpoints and weights are given."""

from dataclasses import dataclass
from typing import Literal

from goku_mega.config.checks import require_at_least


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
        require_at_least(1, self, "keep")
        require_at_least(0, self, "keep_every_steps", "keep_best")


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
        require_at_least(0, self, "max_file_gb")


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
        require_at_least(1, self, "files")
