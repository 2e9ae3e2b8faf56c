"""A run in words: how it is, what happened last, what is odd. The command line and the status page say the same."""

from typing import Any

from goku_infra.pages.oddities import node_oddity, odd_ranks
from goku_infra.record.incidents import from_json, seconds, sentence

TELL_WHY = ("waiting", "stopping", "finished")
"""What has a reason of its own; a run that starts again or recovers does so for an incident, which says more."""


def described(snapshot: dict[str, Any]) -> dict[str, Any]:
    """The snapshot with what is to be said of it: headline, last_event, odd_ranks, odd_nodes, incidents' sentences."""
    return {
        **snapshot,
        "headline": headline(snapshot),
        "last_event": last_event(snapshot),
        "odd_ranks": _odd_ranks(snapshot),
        "odd_nodes": {node["name"]: reason for node in snapshot["nodes"] if (reason := node_oddity(node))},
        "incidents": [
            {**incident, "sentence": sentence(from_json(incident))} for incident in snapshot["incidents"]
        ],
    }  # fmt: skip


def headline(snapshot: dict[str, Any]) -> str:
    """`running: step 1,260 on 4 nodes, 8 ranks`; of a run that has ended, how: `finished, failed (...)`."""
    nodes = sum(node["role"] == "training" for node in snapshot["nodes"])
    step = f"step {snapshot['step'] or 0:,}"
    ranks = len(snapshot["ranks"])
    where = f" on {nodes} node{'s' * (nodes != 1)}, {ranks} rank{'s' * (ranks != 1)}" if ranks else ""
    why = f" ({snapshot['reason']})" if snapshot["reason"] and snapshot["status"] in TELL_WHY else ""
    outcome = snapshot.get("outcome")
    ended = f", {outcome['status']} with exit code {outcome['exit_code']}" if outcome else ""
    return f"{snapshot['status']}{ended}{why}: {step}{where}"


def last_event(snapshot: dict[str, Any]) -> str:
    """What an operator should look at: an open incident, ranks that look odd now, or the newest incident."""
    incidents = snapshot["incidents"]
    open_ones = _open(snapshot)
    if open_ones:
        return sentence(from_json(open_ones[-1]))
    odd = _odd_ranks(snapshot)
    if odd:
        rank, reason = next(iter(odd.items()))
        more = f"; {len(odd) - 1} more below" if len(odd) > 1 else ""
        return f"no incident is open, but rank {rank} is odd: {reason}{more}"
    if not incidents:
        return "no incident so far"
    ago = seconds(snapshot["time_s"] - incidents[-1]["detected_s"])
    return f"{ago} ago, {sentence(from_json(incidents[-1]))}"


def _open(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    return [incident for incident in snapshot["incidents"] if incident["status"] == "open"]


def _odd_ranks(snapshot: dict[str, Any]) -> dict[int, str]:
    """Ranks that have ended with the run are not odd."""
    return odd_ranks(snapshot["ranks"], _open(snapshot)) if snapshot["status"] != "finished" else {}
