"""Journals of runs for tests, told in the words of what happens: `Story().run().train(60).kill(rank=5)`."""

from typing import Any

from goku_infra.record.journal import KINDS, Event

START_S = 1_000_000.0


class Story:
    """Events of a run on a clock of its own; every verb lets time pass and writes what the controller would."""

    def __init__(self, start_s: float = START_S, step_s: float = 0.5) -> None:
        self.events: list[Event] = []
        self.now = start_s
        self.step_s = step_s
        self.epoch = self.generation = self.step = self.highest = self.incidents = 0
        self.committed = 0
        self.saving_s = 0.0

    def write(self, kind: str, **data: Any) -> "Story":
        assert kind in KINDS, kind
        self.events.append(Event(len(self.events), kind, self.now, self.epoch, self.generation, data))
        return self

    def after(self, seconds: float) -> "Story":
        self.now += seconds
        return self

    def run(self, nodes: int = 2) -> "Story":
        """A job begins: its controller, then its nodes."""
        self.controller()
        self.write("run_started", command=["train"], ranks_per_node=2, nodes=nodes, spares=1, min_nodes=1, job_id="7")
        for node in range(nodes):
            self.after(0.25).write(
                "node_joined", node=f"n{node}", place=node, host=f"10.0.0.{node}", keeper_port=9, slots=2, running=0
            )  # fmt: skip
        return self

    def controller(self) -> "Story":
        self.epoch += 1
        return self.write("controller_started", host="n0", pid=100 + self.epoch)

    def start(self, *, incident: int | None = None, takes_s: float = 1.0, resume: bool = True) -> "Story":
        """The ranks are started and finish a first step."""
        self.generation += 1
        self.write("generation_started", nodes=["n0", "n1"], world_size=4, reason="", incident=incident, skip_steps=[])
        return self.after(takes_s).first_step() if resume else self

    def first_step(self) -> "Story":
        self.saving_s = 0.0
        self.step = self.committed + 1
        self.write("first_step", step=self.step, resumed_from=self.committed)
        if self.step > self.highest:
            self.highest = self.step
            self.write("caught_up", step=self.step)
        return self

    def train(self, steps: int, *, save_s: float = 0.0) -> "Story":
        """Steps, with a report every 20, and a save at the end if it takes any time."""
        for _ in range(steps):
            self.after(self.step_s)
            self.step += 1
            if self.step > self.highest and self.highest < self.step:
                caught_up = self.highest and self.step == self.highest + 1 and self._behind()
                self.highest = self.step
                if caught_up:
                    self.write("caught_up", step=self.step)
            if self.step % 20 == 0:
                self.progress()
        if save_s:
            self.after(save_s)
            self.saving_s += save_s
            self.committed = self.step
            self.progress()
        return self

    def progress(self) -> "Story":
        return self.write("progress", step=self.step, committed_step=self.committed, loss=1.0, saving_s=self.saving_s)

    def fault(
        self, cause: str = "killed", *, rank: int | None = 3, node: str = "n1", found_s: float = 0.25, **data: Any
    ) -> "Story":
        """A fault now, found after `found_s`."""
        self.incidents += 1
        fault_s = self.now
        ranks = [] if rank is None else [rank]
        return self.after(found_s).write(
            "incident_opened", incident=self.incidents, cause=cause, ranks=ranks, node=node, step=self.step,
            fault_s=fault_s, detail="", data=data,
        )  # fmt: skip

    def act(self, action: str = "restart", **data: Any) -> "Story":
        return self.write("action", incident=self.incidents, action=action, reason="because", **data)

    def close(self) -> "Story":
        return self.write("incident_closed", incident=self.incidents, step=self.step, lost_steps=0)

    def finish(self, status: str = "done") -> "Story":
        return self.write("finished", status=status, step=self.step, reason="", exit_code=0)

    def _behind(self) -> bool:
        last = [event.kind for event in self.events if event.kind in ("first_step", "caught_up")]
        return last[-1:] == ["first_step"]
