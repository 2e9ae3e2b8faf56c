"""What is asked for while a recovery is under way is done once, and when it is over."""

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from goku_infra import slurm
from goku_infra.control.allocation import Allocation
from goku_infra.control.fleet import Node
from goku_infra.control.metrics_tail import MetricsTail
from goku_infra.control.recovery import Recovery
from goku_infra.control.run_state import RunState
from goku_infra.pages.alerts import Alerts
from goku_infra.record.journal import Journal
from goku_infra.settings import Settings
from goku_infra.views import Finding


class Deaf:
    """Connections to agents that answer nothing; `said` is what was sent to all of them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.said: list[dict[str, Any]] = []

    def send_all(self, message: dict[str, Any], names: Any = None) -> None:
        self.said.append(message)


def test_a_stop_asked_for_during_an_alert_lets_the_ranks_save_and_leaves_once(tmp_path: Path):
    """A slow rank without a spare: nothing is done about it, but it is looked into for some seconds."""
    settings = Settings(run_dir=str(tmp_path), command=("train",), job_id="local-1", nodes=1, min_nodes=1,
                        ranks_per_node=1)  # fmt: skip

    async def story(state: RunState, connections: Deaf) -> None:
        recovery = Recovery(state, connections, Allocation(state, connections))
        recovery.open(Finding(cause="straggler", ranks=(0,), node="n0"))
        recovery.stop(save=True, requeue=False, reason="by the operator")
        while recovery.busy:
            await asyncio.sleep(0.01)
        assert state.status == "stopping" and connections.said[-1] == {"kind": "ask_ranks", "stop": "save"}
        recovery.all_left()  # the ranks have saved
        while recovery.busy:
            await asyncio.sleep(0.01)

    with Journal(tmp_path, 1) as journal:
        state = running(settings, journal)
        asyncio.run(story(state, Deaf()))
    assert state.exit_code == 0
    assert [event.kind for event in journal.events].count("finished") == 1


@pytest.mark.parametrize("requeue", [False, True])
def test_the_step_that_ranks_took_just_before_they_left_is_in_the_last_word(tmp_path: Path, monkeypatch, requeue: bool):
    """They are gone before their agent has looked at their last beat; what rank 0 has written down is there."""
    settings = Settings(run_dir=str(tmp_path), command=("train",), job_id="7", nodes=1, min_nodes=1, ranks_per_node=1)
    monkeypatch.setattr(slurm, "job", lambda job_id: SimpleNamespace(state="RUNNING"))
    monkeypatch.setattr(slurm, "requeue", lambda job_id: None)

    async def story(state: RunState, connections: Deaf) -> None:
        recovery = Recovery(state, connections, Allocation(state, connections))
        recovery.stop(save=True, requeue=requeue, reason="its time is up")
        beat = {"rank": 0, "step": 19, "phase": "data", "phase_age_s": 0.1, "alive_age_s": 0.1}
        state.fleet.observe([beat], time.monotonic())
        rows = [{"step": step, "loss": 1.0, "gradient_norm": 1.0} for step in range(20)]
        state.tail.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recovery.all_left()
        while recovery.busy:
            await asyncio.sleep(0.01)

    with Journal(tmp_path, 1) as journal:
        state = running(settings, journal)
        asyncio.run(story(state, Deaf()))
    (finished,) = [event for event in journal.events if event.kind == "finished"]
    assert (finished.data["status"], finished.data["step"]) == ("requeued" if requeue else "stopped", 20)


def running(settings: Settings, journal: Journal) -> RunState:
    """A run of one rank on one node."""
    folder = Path(settings.run_dir)
    state = RunState(settings, folder, journal, "h", MetricsTail(folder / "metrics.jsonl"), Alerts(""))
    node = state.fleet.nodes["n0"] = Node("n0", 0, slots=1, connected=True)
    state.fleet.begin([node], 1)
    state.status = "running"
    return state
