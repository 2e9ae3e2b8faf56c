"""What a supervised run is started with: the same words on every node, so any of them can raise the controller."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from goku_infra.messages import replace_file, supervisor_folder

FILE = "settings.json"
RESTART_LIMIT = 100
"""Restarts within the policy's window: a storm, even when each of them gets a little further. A run may set another."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a job's nodes are used and watched."""

    run_dir: str
    command: tuple[str, ...]
    job_id: str
    """SLURM's, or one made by `goku-ops run`."""
    nodes: int
    """Nodes to train on; those beyond are hot spares."""
    min_nodes: int
    """Fewest nodes to train on when some are lost."""
    ranks_per_node: int
    hang_limit_s: float = 0.0
    """Shortest limit of any phase; 0: those of `detectors.PhaseLimits`."""
    node_silence_s: float = 1.0
    """A node whose agent is silent for longer is asked, and is lost if it does not answer."""
    restart_limit: int = RESTART_LIMIT
    """Restarts within half an hour until it is a storm, and the run is stopped."""
    webhook: str = ""
    """Alerts are posted there."""
    page_actions: bool = False
    """Whether the status page may act."""

    @property
    def on_one_machine(self) -> bool:
        """Started by `goku-ops run`: no other node can come."""
        return self.job_id.startswith("local-")

    @property
    def in_slurm(self) -> bool:
        return self.job_id.isdigit()


def write_settings(settings: Settings) -> None:
    folder = supervisor_folder(Path(settings.run_dir))
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    replace_file(folder / FILE, json.dumps(asdict(settings), indent=1))


def read_settings(run_dir: Path) -> Settings:
    fields = json.loads((supervisor_folder(run_dir) / FILE).read_text())
    return Settings(**{**fields, "command": tuple(fields["command"])})
