"""A supervised run as a SLURM job on the cluster, as a test sees it: submitted by launch/sbatch, watched through its
journal, broken by what befalls nodes.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster import CONTROL, Cluster
from supervised import tell

from goku_infra.messages import read_address, supervisor_folder
from goku_infra.record.journal import Event, read_events

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/sbatch/train.sbatch"
LIMIT_S = 300.0
"""A test waits no longer than this for a state; these machines are slow at times."""
POLL_S = 0.02
OURS = re.compile(r"goku_infra|goku_mega|goku-ops|multiprocessing\.(forkserver|resource_tracker)")
"""Command lines of a run's processes."""


class SupervisedJob:
    """A context manager: the job of `goku-mega train` with `overrides`, on `nodes` nodes and `spares` more.

    What is left of it at the end of the context is cancelled.
    """

    def __init__(
        self,
        cluster: Cluster,
        run_dir: Path,
        overrides: Sequence[str],
        *,
        nodes: int = 3,
        spares: int = 0,
        min_nodes: int = 0,
        options: Sequence[str] = (),
        environment: Mapping[str, str] = {},
        prefix: Sequence[str] = (),
    ) -> None:
        """options: of sbatch. prefix: goes before sbatch, such as another user."""
        self.cluster = cluster
        self.run_dir = run_dir
        self.folder = supervisor_folder(run_dir)
        self.log = run_dir.parent / f"{run_dir.name}.log"
        settings = {
            "GOKU_SPARES": str(spares), "GOKU_MIN_NODES": str(min_nodes or nodes), "GOKU_RANKS_PER_NODE": "1",
            "GOKU_RUN_DIR": str(run_dir), "GOKU_AGENT_OPTIONS": "--hang-limit 10", "GOKU_CHECK": "off", "VENV": "",
            **environment,
        }  # fmt: skip
        self._environment = {**cluster.environment, **settings}
        train = [sys.executable, "-m", "goku_mega.cli", "train", f"run_dir={run_dir}", *overrides]
        self._command = [
            *prefix, "sbatch", "--parsable", f"--chdir={ROOT}", f"--nodes={nodes + spares}", "--gpus-per-node=0",
            "--time=60", f"--output={self.log}", *options, str(SCRIPT), *train,
        ]  # fmt: skip
        self.job_id = ""

    def __enter__(self) -> "SupervisedJob":
        answer = self.cluster.exec(CONTROL, self._command, env=self._environment)
        self.job_id = answer.strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cluster.exec(CONTROL, ["scancel", self.job_id])

    # -- what it does -------------------------------------------------------------------------------------------

    def slurm(self) -> dict[str, str]:
        """What `scontrol show job` says of it, by field."""
        answer = self.cluster.exec(CONTROL, ["scontrol", "--oneliner", "show", "job", self.job_id])
        return dict(word.split("=", 1) for word in answer.split() if "=" in word)

    def finish(self, state: str = "COMPLETED", limit_s: float = LIMIT_S) -> dict[str, str]:
        """Wait for the end of the job in this state of SLURM's; the job's fields."""

        def ended() -> dict[str, str] | None:
            fields = self.slurm()
            if fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                assert fields["JobState"] == state, f"{fields}\n{self.story()}"
                return fields
            return None

        return self.until(ended, f"end of the job as {state}", limit_s)

    def events(self, kind: str = "") -> list[Event]:
        events = read_events(self.folder / "journal.jsonl")
        return [event for event in events if not kind or event.kind == kind]

    def wait_for(self, kind: str, count: int = 1, **data: Any) -> Event:
        """The `count`-th event of a kind with these data, once it is there."""

        def found() -> Event | None:
            fitting = [e for e in self.events(kind) if all(e.data.get(name) == value for name, value in data.items())]
            return fitting[count - 1] if len(fitting) >= count else None

        return self.until(found, f"event {kind} {data} no. {count}")

    def wait_for_more_steps(self, count: int) -> int:
        """Until the present generation has done that many steps more; the step."""
        state = self.until(lambda: (s := self.state()) and s["status"] == "running" and s, "a running run")
        goal = state["step"] + count

        def reached() -> int:
            now = self.state()
            return now["step"] if now and now["status"] == "running" and now["step"] >= goal else 0

        return self.until(reached, f"step {goal}")

    def until(self, found: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if result := found():
                return result
            time.sleep(POLL_S)
        raise AssertionError(f"no {what} within {limit_s} s\n{self.story()}")

    def state(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / "state.json").read_text())
        except (OSError, ValueError):
            return None

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def ops(self, *words: str, node: str = CONTROL, prefix: Sequence[str] = ()) -> str:
        """What `goku-ops WORDS` prints on a node; RuntimeError with what it says if it fails."""
        return self.cluster.exec(node, [*prefix, "goku-ops", *words])

    def story(self) -> str:
        """For a test that fails: the ends of the journal and of the logs, and where all of it is."""
        return tell(self.folder, self.events(), [self.log, *sorted((self.folder / "logs").rglob("*.log"))])

    # -- its processes -------------------------------------------------------------------------------------------

    def processes(self, node: str) -> dict[int, str]:
        """Those of the run on a node, by their ids on the host."""
        return {pid: words for pid, words in self.cluster.processes(node).items() if OURS.search(words)}

    def ranks(self, node: str) -> list[int]:
        """The processes on a node that train, by their ids on the host: each writes to its log."""
        logs, found = str(self.folder / "logs/g"), []
        for pid in self.processes(node):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/1").startswith(logs):
                    found.append(pid)
        return found

    def controller_node(self) -> str:
        address = read_address(self.folder)
        assert address is not None
        return next(name for name, host in self.cluster.addresses.items() if host == address["host"])

    def kill_controller(self) -> float:
        """SIGKILL; the unix time of it."""
        return self._kill(self.controller_node(), "goku_infra.control.controller")

    def kill_agent(self, node: str) -> float:
        """SIGKILL; the unix time of it."""
        return self._kill(node, "goku_infra.node.agent")

    def _kill(self, node: str, module: str) -> float:
        for pid, words in self.processes(node).items():
            if f"-m {module} " in words:
                os.kill(pid, signal.SIGKILL)
                return time.time()
        raise AssertionError(f"no {module} on {node}: {self.processes(node)}")
