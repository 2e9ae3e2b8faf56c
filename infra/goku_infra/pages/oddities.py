"""What is odd about a rank or a node, in a few words: the pages show these and leave the healthy ones in one line.

Works on the dictionaries of a snapshot, so that it reads a live run's and a dead controller's alike.
"""

from collections.abc import Sequence
from typing import Any

SILENT_S = 2.0
"""A rank's liveness thread writes every 50 ms and an agent reports more often than this."""
STUCK_S = 1.0
"""How long a rank must have been in the same phase before an uninterruptible sleep is worth a word."""
PROCESS_STATES = {
    "T": "stopped (SIGSTOP)",
    "t": "stopped by a debugger",
    "Z": "dead, not yet reaped",
    "-": "gone",
}


def rank_oddity(rank: dict[str, Any], top_step: int) -> str:
    """Why a rank is not like a healthy one; empty if it is. `top_step`: the step of the fastest rank."""
    exit_code = rank.get("exit_code")
    if exit_code is not None:
        return f"killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    state = rank.get("process_state", "?")
    if state in PROCESS_STATES:
        return PROCESS_STATES[state]
    if state == "D" and rank["phase_age_s"] > STUCK_S:
        return f"in uninterruptible sleep, {rank['phase']} for {rank['phase_age_s']:.1f} s"
    if rank["alive_age_s"] > SILENT_S:
        return f"no sign of life for {rank['alive_age_s']:.1f} s"
    if top_step - rank["step"] > 1:
        return f"{top_step - rank['step']} steps behind"
    return ""


def odd_ranks(ranks: Sequence[dict[str, Any]], open_incidents: Sequence[dict[str, Any]]) -> dict[int, str]:
    """The ranks to look at, with the reason: what is seen of them, and the open incidents that name them.

    Once the ranks have been started again, a number stands for another process, which is not at fault.
    """
    top_step = max((rank["step"] for rank in ranks), default=0)
    found = {rank["rank"]: reason for rank in ranks if (reason := rank_oddity(rank, top_step))}
    for incident in open_incidents:
        for rank in () if incident["restarted_s"] is not None else incident["ranks"]:
            named = f"at fault in incident {incident['number']} ({incident['cause']})"
            found[rank] = f"{named}; {found[rank]}" if rank in found else named
    known = {rank["rank"] for rank in ranks}
    return {rank: found[rank] for rank in sorted(found) if rank in known}


def node_oddity(node: dict[str, Any]) -> str:
    """Why a node is not like a healthy one; empty if it is."""
    if node["role"] in ("lost", "excluded"):
        return f"{node['role']}: {node['reason'] or 'no reason given'}"
    if node["health"]:
        return "; ".join(node["health"])
    if node["heard_age_s"] > SILENT_S:
        return f"its agent was last heard {node['heard_age_s']:.1f} s ago"
    return ""
