"""What a soak says of itself: right, wrong and missed blame, and what happened around each mistake."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chaos import Fault, first_other_step, judge, worlds
from journals import Story


def judged(told: Story, *faults: Fault) -> Any:
    rows = [{"step": step, "data_step": step} for step in range(told.step)]
    run: Any = SimpleNamespace(events=lambda: told.events, metrics=lambda: rows)
    storm: Any = SimpleNamespace(faults=list(faults))
    return judge(run, storm, seed=1)


def killed(rank: int) -> tuple[Story, float]:
    """A run of which the controller says that a rank was killed, and when that was."""
    story = Story().run().start().train(60, save_s=0.1).train(60).fault("killed", rank=rank, found_s=0.2)
    found_s = story.now
    return story.act("restart").start(incident=1).close().train(200), found_s


def test_the_right_rank_is_right_and_another_one_is_told_with_all_that_struck_and_the_journal() -> None:
    story, found_s = killed(rank=0)
    right = judged(story, Fault("kill", found_s - 0.2, rank=0))
    assert (right.blamed_rightly, right.wrongly, right.missed) == (1, [], [])
    wrong = judged(story, Fault("kill", found_s - 0.2, rank=1), Fault("stop", found_s - 500, rank=1))
    (mistake,) = wrong.wrongly
    assert wrong.blamed_rightly == 0 and "incident 1 (killed): rank 0" in mistake.what
    assert mistake.faults == ["-0.20 s kill of rank 1"]
    kinds = [line.split()[3] for line in mistake.events]
    assert "incident_opened" in kinds and "generation_started" in kinds
    assert "+0.00 s g1 incident_opened" in next(line for line in mistake.events if "incident_opened" in line)


def test_a_fault_of_a_healthy_run_that_nobody_has_found_is_missed() -> None:
    story, found_s = killed(rank=0)
    quiet_s = found_s + 60
    report = judged(story, Fault("kill", found_s - 0.2, rank=0), Fault("stop", quiet_s, rank=1))
    (mistake,) = report.missed
    assert mistake.what == "stop of rank 1" and mistake.faults[-1] == "+0.00 s stop of rank 1"
    assert not report.wrongly and report.blamed_rightly == 1
    never: Any = Fault("segfault", quiet_s, rank=1, striking=str(Path("/nowhere/0")))
    assert not judged(story, Fault("kill", found_s - 0.2, rank=0), never).missed, "it has never struck"


@pytest.mark.parametrize("size", [1, 3])
def test_steps_of_other_layouts_are_told_from_those_of_the_first(size) -> None:
    story = Story().run().start().train(60, save_s=0.1).train(30).fault("node_lost", rank=None, node="n1")
    story.start(incident=1).close()
    resumed_from = story.events[-3].data.get("resumed_from") or story.committed
    for event in story.events:
        if event.kind == "generation_started" and event.generation == 2:
            event.data["world_size"] = size
    assert worlds(story.events) == [4, size]
    assert first_other_step(story.events, 4) == resumed_from
    assert first_other_step(story.events[:-6], 4) > 10**9
