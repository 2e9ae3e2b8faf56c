"""What the controller knows at a moment: plain values that detectors, the policy and the pages read.

Ages are seconds on one monotonic clock, the controller's: an age that an agent reports grows on here by itself.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Role = Literal["training", "spare", "excluded", "lost"]
Status = Literal["waiting", "starting", "running", "recovering", "stopping", "finished"]


@dataclass(frozen=True, kw_only=True)
class RankView:
    """One rank of the present generation."""

    rank: int
    node: str
    local_rank: int
    pid: int = 0
    step: int = 0
    """Steps done."""
    phase: str = "start"
    """One of `heartbeat.PHASES`."""
    phase_age_s: float = 0.0
    """How long it has been in this phase of this step."""
    alive_age_s: float = 0.0
    """Since its own liveness thread last ran: grows if the process is stopped, dead, or holds Python's lock."""
    heard_age_s: float = 0.0
    """Since its agent described it."""
    process_state: str = "?"
    """From /proc/PID/stat: R, S, D (uninterruptible), T (stopped), t (traced), Z (dead); `-` when it is gone."""
    cpu_s: float = 0.0
    """CPU seconds of the process so far."""
    delayed_s: float = 0.0
    """Seconds in which its main thread could have run so far, but no core was free."""
    busy_s: float = 0.0
    """Seconds of its main thread at work, by samples of its own liveness thread."""
    waiting_s: float = 0.0
    """Seconds of its main thread inside a collective or another wait for other ranks."""
    committed_step: int = -1
    """Newest checkpoint it knows to be committed; -1: none."""
    loss: float | None = None
    gradient_norm: float | None = None
    rss_bytes: int = 0
    exit_code: int | None = None
    """Negative: the signal that ended it."""
    left_early: bool = False
    """It ended with exit code 0 and in the middle of its work."""
    last_lines: tuple[str, ...] = ()
    """The end of its log, once it has ended."""

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return bool(self.exit_code) or self.left_early


class GpuView(TypedDict):
    """What one GPU of a node does; None: it does not tell. A dictionary, for it goes through messages as it is."""

    index: int
    busy: float | None
    """Share of the last second or so in which a kernel ran, one that waits for other GPUs included."""
    memory_bytes: int | None
    """In use, by whomever."""
    power_w: float | None
    temperature_c: int | None


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """One node that has an agent, or had one."""

    name: str
    host: str
    role: Role
    slots: int
    """Ranks that it can run."""
    heard_age_s: float = 0.0
    """Since its agent was last heard."""
    reason: str = ""
    """Why it is excluded or lost."""
    health: tuple[str, ...] = ()
    """Present findings of its health checks, one line each; empty: healthy."""
    gpus: tuple[GpuView, ...] = ()
    """As of its last health check."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a detector has seen: enough to blame and to act."""

    cause: str
    """A key of `causes.CAUSES`: killed, out_of_memory, hang, node_lost, ..."""
    ranks: tuple[int, ...] = ()
    """The ranks at fault, not those that wait for them; empty: not known yet, or a whole node."""
    node: str = ""
    detail: str = ""
    """One line for the operator."""
    fault_age_s: float = 0.0
    """How long ago the last sign of health was."""
    data: dict[str, Any] = field(default_factory=dict)
    """Further figures, by the cause: `data_step` for a loss that is not finite, ..."""
