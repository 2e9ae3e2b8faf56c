"""Whether an agent has died alone or its node with it, by the port of what keeps it."""

import asyncio
from pathlib import Path

import pytest

from goku_infra.control.connections import Connections
from goku_infra.control.fleet import Node
from goku_infra.control.metrics_tail import MetricsTail
from goku_infra.control.node_watch import RECONNECT_S, NodeWatch
from goku_infra.control.recovery import Recovery
from goku_infra.control.run_state import RunState
from goku_infra.pages.alerts import Alerts
from goku_infra.record.journal import Journal
from goku_infra.settings import Settings


@pytest.mark.parametrize(
    ("open_s", "is_back", "said"), [(60.0, True, "its agent was killed"), (RECONNECT_S / 2, False, "does not answer")]
)
def test_a_keeper_whose_port_closes_after_the_agent_is_gone_with_it(tmp_path: Path, open_s, is_back, said) -> None:
    """The kernel answers for a killed process until the last of its threads has ended."""
    settings = Settings(run_dir=str(tmp_path), command=("train",), job_id="7", nodes=1, min_nodes=1, ranks_per_node=1)

    async def gone(state: RunState) -> Node:
        keeper = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = keeper.sockets[0].getsockname()[1]
        node = state.fleet.nodes["n0"] = Node("n0", 0, "127.0.0.1", keeper_port=port, connected=True)
        closing = asyncio.get_running_loop().call_later(open_s, keeper.close)
        # A node without ranks needs no recovery.
        watch = NodeWatch(state, Connections(state, None), Recovery.__new__(Recovery))
        await watch.gone("n0")
        closing.cancel()
        keeper.close()
        return node

    with Journal(tmp_path, 1) as journal:
        state = RunState(settings, tmp_path, journal, "h", MetricsTail(tmp_path / "metrics.jsonl"), Alerts(""))
        node = asyncio.run(gone(state))
    assert (node.back_since is not None) == is_back and said in node.lost
