"""What is asked for while a recovery is under way is done once, and when it is over."""

import asyncio
from pathlib import Path
from typing import Any

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
        state = RunState(settings, tmp_path, journal, "h", MetricsTail(tmp_path / "metrics.jsonl"), Alerts(""))
        node = state.fleet.nodes["n0"] = Node("n0", 0, slots=1, connected=True)
        state.fleet.begin([node], 1)
        state.status = "running"
        asyncio.run(story(state, Deaf()))
    assert state.exit_code == 0
    assert [event.kind for event in journal.events].count("finished") == 1
