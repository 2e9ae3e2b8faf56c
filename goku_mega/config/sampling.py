"""What sampling and evaluation are given."""

from dataclasses import dataclass
from typing import Literal

from goku_mega.config.checks import require_at_least, require_clip_length, require_side


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
        require_at_least(1, self, "steps", "fps", "threads")
        for name in ("height", "width"):
            require_side(name, getattr(self, name))
        require_clip_length(self.frames)


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
        require_at_least(1, self, "samples_per_prompt", "steps", "batch_samples", "threads")
        require_at_least(0, self, "max_prompts")
