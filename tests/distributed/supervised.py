"""A supervised run on this machine as a test sees it: started by `goku-ops run`, watched through its journal, broken by
real signals.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from goku_infra.messages import ask, read_address, supervisor_folder
from goku_infra.node.scratch import remove_scratch_folder
from goku_infra.record.incidents import Incident, incidents
from goku_infra.record.journal import Event

LIMIT_S = 180.0
"""A test waits no longer than this for a state; these machines are slow at times."""
POLL_S = 0.01
REPOSITORY = Path(__file__).parents[2]
IMPORTED_FROM = (REPOSITORY, REPOSITORY / "infra", Path(__file__).parent)
EMPTY_S = 60.0
"""After its end a run has no process any more within so long."""


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds the package and the tests' helpers wherever it is started."""
    path = os.pathsep.join([*map(str, IMPORTED_FROM), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


class Supervised:
    """A context manager: the run of `command` under `goku-ops run`, killed with all its processes at the end."""

    def __init__(self, run_dir: Path, command: list[str], *, ranks: int = 2, options: tuple[str, ...] = ()) -> None:
        self.run_dir = run_dir
        self.folder = supervisor_folder(run_dir)
        self.words = [
            sys.executable, "-m", "goku_infra.cli", "run", "--ranks", str(ranks), "--run-dir", str(run_dir),
            *options, "--", *command,
        ]  # fmt: skip
        self.process: subprocess.Popen[str]
        self._events: list[Event] = []
        self._journal_read = 0

    def __enter__(self) -> "Supervised":
        self.process = subprocess.Popen(
            self.words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.communicate()
        remove_scratch_folder(self.run_dir, socket.gethostname())  # which the keeper could not

    def finish(self, code: int = 0, limit_s: float = LIMIT_S) -> str:
        """Wait for the end with an exit code, of which nothing is left; what was printed."""
        output, _ = self.process.communicate(timeout=limit_s)
        assert self.process.returncode == code, f"{self.process.returncode}\n{output}{self.story()}"
        self.wait_until_empty()
        return output

    def wait_until_empty(self) -> None:
        deadline = time.monotonic() + EMPTY_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        left = [" ".join(process.cmdline()) for process in self.processes()]
        assert not left, left

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return ask(self.run_dir, command, **arguments)

    def incident(self, number: int = -1) -> Incident:
        """By default the newest."""
        return incidents(self.events())[number]

    def break_by(self, fault: Callable[[], Any], *, count: int = 1) -> Incident:
        """Let the run reach a state that can be lost, do something to it, and wait until it trains again.

        Args:
            count: incidents that it takes.
        """
        before = len(self.events("incident_closed"))
        self.wait_until_it_runs()
        fault()
        self.wait_for("incident_closed", before + count)
        return self.incident()

    def wait_until_it_runs(self) -> None:
        """Until it is beyond every step that it has ever done, and beyond its newest checkpoint."""

        def runs() -> bool:
            state = self.state()
            return (
                state is not None
                and state["status"] == "running"
                and state["generation"] == max(event.generation for event in self.events())
                and state["step"] >= state["highest_step"] > 0
                and state["step"] > state["committed_step"] > 0
            )

        self.until(runs, "steps beyond a checkpoint")

    def events(self, kind: str = "") -> list[Event]:
        with suppress(FileNotFoundError), (self.folder / "journal.jsonl").open("rb") as journal:
            journal.seek(self._journal_read)
            new = journal.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._journal_read += len(whole)
            self._events += [Event(**json.loads(line)) for line in whole.splitlines()]
        return [event for event in self._events if not kind or event.kind == kind]

    def wait_for(self, kind: str, count: int = 1, **data: Any) -> Event:
        """The `count`-th event of a kind with these data, once it is there."""

        def found() -> Event | None:
            fitting = [e for e in self.events(kind) if all(e.data.get(name) == value for name, value in data.items())]
            return fitting[count - 1] if len(fitting) >= count else None

        return self.until(found, f"event {kind} {data} no. {count}")

    def wait_for_step(self, step: int) -> None:
        """Until every rank of the present generation has done that many steps."""
        self.until(lambda: (state := self.state()) is not None and state["step"] >= step, f"step {step}")

    def until(self, found: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if result := found():
                return result
            if self.process.poll() is not None and not (result := found()):
                output, _ = self.process.communicate()
                raise AssertionError(f"the run ended before {what}\n{output}\n{self.story()}")
            time.sleep(POLL_S)
        raise AssertionError(f"no {what} within {limit_s} s\n{self.story()}")

    def state(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / "state.json").read_text())
        except (OSError, ValueError):
            return None

    def rank_pid(self, rank: int) -> int:
        """The process of a rank of the newest generation."""

        def found() -> int | None:
            state = self.state()
            newest = max((event.generation for event in self.events("generation_started")), default=0)
            if state is None or state["generation"] != newest:
                return None
            return next((row["pid"] for row in state["ranks"] if row["rank"] == rank and row["pid"]), None)

        return self.until(found, f"pid of rank {rank}")

    def signal_rank(self, rank: int, number: signal.Signals) -> float:
        """Send a rank a signal; the unix time of it."""
        pid = self.rank_pid(rank)
        os.kill(pid, number)
        return time.time()

    def controller_pid(self) -> int:
        address = read_address(self.folder)
        assert address is not None
        return int(address["pid"])

    def agent_pid(self) -> int:
        return next(p.pid for p in self.processes() if "goku_infra.node.agent" in p.cmdline())

    def processes(self) -> list[psutil.Process]:
        """Every process on this machine that belongs to the run."""
        run_dir, found = str(self.run_dir), []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                output = os.readlink(f"/proc/{process.pid}/fd/1")  # a rank is known by its log alone
                if output.startswith(f"{run_dir}/") or run_dir in process.cmdline():
                    found.append(process)
        return [process for process in found if process.pid != os.getpid()]

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def story(self) -> str:
        """For a test that fails: the ends of the journal and of the logs, and where all of it is."""
        return tell(self.folder, self.events(), sorted((self.folder / "logs").rglob("*.log")))


def faults_in(events: list[Event]) -> list[Incident]:
    """Incidents but for slow ranks, of which a busy machine has its own."""
    return [incident for incident in incidents(events) if incident.cause != "straggler"]


def committed_before(events: list[Event], time_s: float) -> int:
    """The newest step that the controller knew to be committed at a time; -1: none."""
    steps = [e.data["committed_step"] for e in events if e.kind == "progress" and e.time_s < time_s]
    return max((step for step in steps if step is not None), default=-1)


def tell(folder: Path, events: list[Event], logs: list[Path]) -> str:
    """Few lines, for several failures must fit what a CI shows; a file in `folder` has many."""

    def lines(log: Path, count: int) -> list[str]:
        return [f"-- {log.name}", *log.read_text(errors="replace").splitlines()[-count:]] if log.exists() else []

    story = [f"{e.time_s:.2f} g{e.generation} e{e.epoch} {e.kind} {json.dumps(e.data)[:300]}" for e in events]
    everything = [*story, *(line for log in logs for line in lines(log, 40))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "story.txt").write_text("\n".join(everything))
    newest = sorted((log for log in logs if log.exists()), key=lambda log: log.stat().st_mtime)[-3:]
    short = [line[:160] for line in story[-14:]] + [line[:160] for log in newest for line in lines(log, 3)]
    return "\n".join([*short, f"(all of it: {folder}/story.txt)"])
