"""What the plan on paper is given."""

from dataclasses import dataclass, field
from typing import Literal

from goku_mega.config.checks import require, require_at_least, require_clip_length, require_side


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
        require_at_least(0, self, "per_1000_node_days", "step_s", "save_every_steps", section="faults.")
        require_at_least(0, self, "restart_s", "start_s", "repair_hours", section="faults.")
        require_at_least(-1, self, "spares", section="faults.")
        require_at_least(1, self, "group_nodes", "repeats", section="faults.")
        require(self.days > 0, f"faults.days is {self.days}; it must be above 0")


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
        require_at_least(1, self, "gpus", "top")
        require_at_least(0, self, "text_tokens", "samples_per_step", "max_tokens_per_rank")
        for name in ("frames", "height", "width"):
            require(len(getattr(self, name)) > 0, f"{name} is empty; give a number for every kind of sample")
        for name in ("height", "width", "share"):
            count = len(getattr(self, name))
            require(
                count in (1, len(self.frames)) or (name == "share" and count == 0),
                f"{name} has {count} numbers but frames has {len(self.frames)}; give as many, or one for all",
            )
        for frames in self.frames:
            require_clip_length(frames)
        for name in ("height", "width"):
            for pixels in getattr(self, name):
                require_side(name, pixels)
        require(min(self.share, default=1.0) > 0, f"share is {list(self.share)}; each must be above 0")
        unknown = [policy for policy in self.policies if policy not in ("off", "selective", "full")]
        require(
            bool(self.policies) and not unknown,
            f"policies is {list(self.policies)}; give one or more of off, selective, full",
        )
