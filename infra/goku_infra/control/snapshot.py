"""What the status page, `goku-ops status` and Prometheus see of a controller: one JSON object, DESIGN's words."""

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from goku_infra.control.run_state import RunState
from goku_infra.messages import replace_file
from goku_infra.record.history import RECENT, History

FILE = "state.json"
SNAPSHOT_S = 0.5
SHARE = 0.05
"""Of a core: in a large run snapshots come less often."""
SNAPSHOT_LIMIT_S = 5.0
"""However large the run, they come at least so often."""
RANKS_AT_A_TIME = 200
"""A snapshot is made in parts of so many, and agents are heard between them."""


class Snapshots:
    """Takes them at a steady pace and when the run's status changes; `newest` is what everybody sees."""

    def __init__(self, state: RunState) -> None:
        self.newest: dict[str, Any] = {}
        self._state = state
        self._history = History()
        self._due_at = 0.0
        self._taking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def look(self, now: float) -> None:
        """Called at every tick."""
        is_news = self._state.status != self.newest.get("status")
        if (now >= self._due_at or is_news) and not self._taking.locked():
            self._due_at = now + SNAPSHOT_S
            self._task = asyncio.create_task(self.take())

    async def take(self) -> None:
        """Take one now, in small parts, and write it beside the loop: the file system may be slow."""
        async with self._taking:
            began_cpu_s, spent_s = time.thread_time(), 0.0
            state = self._without_ranks()
            views = self._state.fleet.rank_views(time.monotonic())
            ranks: list[dict[str, Any]] = []
            texts: list[str] = []
            for first in range(0, len(views), RANKS_AT_A_TIME):
                # `asdict` copies every value, which takes forty times as long
                part = [dict(vars(view)) for view in views[first : first + RANKS_AT_A_TIME]]
                ranks += part
                texts.append(json.dumps(part)[1:-1])
                spent_s += time.thread_time() - began_cpu_s
                await asyncio.sleep(0)
                began_cpu_s = time.thread_time()
            self.newest = {**state, "ranks": ranks}
            text = f'{json.dumps(state)[:-1]}, "ranks": [{", ".join(texts)}]}}'
            spent_s += time.thread_time() - began_cpu_s
            self._due_at = time.monotonic() + min(SNAPSHOT_LIMIT_S, max(SNAPSHOT_S, spent_s / SHARE))
            with suppress(OSError):  # it is only shown
                await asyncio.to_thread(replace_file, self._state.folder / FILE, text)

    def _without_ranks(self) -> dict[str, Any]:
        """The run as its controller knows it now, but for its ranks: they may be thousands."""
        state, now = self._state, time.monotonic()
        self._history.follow(state.journal.events)
        accounts = self._history.ledger.totals(time.time())
        total = sum(accounts.values())
        row = state.tail.last
        return {
            "run_dir": state.settings.run_dir,
            "job_id": state.settings.job_id,
            "command": list(state.settings.command),
            "epoch": state.journal.epoch,
            "generation": state.journal.generation,
            "status": state.status,
            "reason": state.reason,
            "step": state.fleet.step(),
            "highest_step": state.highest_step,
            "committed_step": state.committed_step,
            "loss": row.get("loss"),
            "gradient_norm": row.get("gradient_norm"),
            "tokens_per_s": row.get("tokens_per_s"),
            "samples_per_s": row.get("samples_per_s"),
            "time_s": time.time(),
            "accounts": accounts,
            "goodput": accounts["productive"] / total if total else 0.0,
            "nodes": [vars(node.view(now)) for node in sorted(state.fleet.nodes.values(), key=lambda node: node.index)],
            "incidents": [asdict(incident) for incident in self._history.incidents.newest(RECENT)],
            "requests": list(state.requests.values()),
            "alerts": list(self._history.alerts),
        }
