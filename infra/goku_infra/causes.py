"""Everything that can befall a run, by name: the vocabulary of incidents, of the policy's table and of the alerts."""

from typing import NamedTuple


class Cause(NamedTuple):
    """What a cause means for those who decide."""

    text: str
    """For people: completes "rank 3 ..."."""
    blames_node: bool
    """Whether the hardware is suspect, so that it counts against the node."""
    of_node: bool = False
    """Whether it befalls a whole node: completes "node n2 ..."."""


CAUSES = {
    "killed": Cause("was killed by a signal", blames_node=False),
    "crashed": Cause("crashed in native code", blames_node=True),
    "exception": Cause("raised a Python exception", blames_node=False),
    "out_of_memory": Cause("ran out of host memory", blames_node=False),
    "device_out_of_memory": Cause("ran out of GPU memory", blames_node=False),
    "device_error": Cause("got an error from its GPU", blames_node=True),
    "collective_timeout": Cause("waited in a collective until its timeout", blames_node=False),
    "data_error": Cause("could not read its data", blames_node=False),
    "disk_full": Cause("found the disk full", blames_node=False),
    "bad_input": Cause("refused its settings", blames_node=False),
    "early_exit": Cause("ended before the run was done", blames_node=False),
    "stopped_process": Cause("is stopped (SIGSTOP or a debugger)", blames_node=False),
    "unkillable": Cause("is stuck in the kernel and cannot be killed", blames_node=True),
    "hang": Cause("makes no progress", blames_node=False),
    "locked": Cause("holds Python's lock and makes no progress", blames_node=False),
    "other_collective": Cause("waits in another collective than the rest", blames_node=False),
    "straggler": Cause("is slower than the rest", blames_node=True),
    "agent_lost": Cause("lost its agent", blames_node=False, of_node=True),
    "node_lost": Cause("is gone", blames_node=True, of_node=True),
    "link_lost": Cause("cannot be reached", blames_node=True, of_node=True),
    "unhealthy_node": Cause("failed a health check", blames_node=True, of_node=True),
    "nan_loss": Cause("met a loss that is not finite", blames_node=False),
    "loss_spike": Cause("met a jump of the loss", blames_node=False),
    "gradient_spike": Cause("met a jump of the gradient norm", blames_node=False),
    "corruption": Cause("holds or computes other numbers than its replicas", blames_node=True),
    "nodes_back": Cause("can train on more nodes again", blames_node=False),
    "operator": Cause("was restarted by the operator", blames_node=False),
    "unknown": Cause("failed", blames_node=False),
}
