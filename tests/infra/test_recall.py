"""What a new controller knows from the journal alone is what the one before it knew."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from journals import START_S, Story

from goku_infra.control import policy
from goku_infra.control.metrics_tail import MetricsTail
from goku_infra.control.recall import LATE_S, Inheritance, recall
from goku_infra.control.run_state import RunState
from goku_infra.pages.alerts import Alerts
from goku_infra.record.journal import Journal
from goku_infra.settings import Settings
from goku_infra.views import Finding


@pytest.fixture
def recalled(tmp_path: Path):
    """The state that a controller begins with, and what it inherits, after a story."""

    def after(story: Story, job_id: str = "7", now: float = START_S + 1e6) -> tuple[RunState, Inheritance]:
        settings = Settings(
            run_dir=str(tmp_path), command=("train",), job_id=job_id, nodes=2, min_nodes=1, ranks_per_node=2
        )
        with Journal(tmp_path, 99) as journal:
            journal.events, journal.generation = story.events, story.generation
            tail = MetricsTail(tmp_path / "metrics.jsonl")
            state = RunState(settings, tmp_path, journal, "h", tail, Alerts(""))
            with patch("time.time", return_value=now):
                return state, recall(state)

    return after


def test_nothing_is_known_of_a_new_run(recalled):
    state, left = recalled(Story())
    assert (state.status, state.highest_step, state.incident, state.leaving) == ("waiting", 0, None, "")
    assert left.nodes == () and left.over is None


def test_a_run_in_the_middle(recalled):
    story = Story().run().start().train(40, save_s=2.0).train(20).progress()
    state, left = recalled(story)
    assert (state.highest_step, state.committed_step) == (story.step, story.committed)
    assert left.nodes == ("n0", "n1") and left.saved_s == story.saving_s
    assert state.policy.has_trained and not state.policy.without_progress


def test_an_open_incident_and_what_it_has_cost_the_budgets(recalled):
    story = Story().run().start().train(40).fault().act().start(incident=1, resume=False)
    state, _ = recalled(story)
    assert (state.incident, state.incidents) == (1, 1)
    assert len(state.policy.restarts) == 1 and state.policy.without_progress == 1


def test_steps_that_nobody_watched_are_progress(recalled, tmp_path):
    row = {"step": 100, "loss": 1.0, "gradient_norm": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    story = Story().run().start().train(40).fault().act().start(incident=1, resume=False)
    state, _ = recalled(story)
    assert (state.highest_step, state.policy.without_progress) == (101, 0)


def test_a_closed_incident_is_over(recalled):
    story = Story().run().start().train(40).fault().act().start(incident=1).close().train(80)
    state, _ = recalled(story)
    assert (state.incident, state.incidents, state.policy.without_progress) == (None, 1, 0)


@pytest.mark.parametrize("requeue", [False, True])
def test_a_stop_that_was_asked_for_is_not_forgotten(recalled, requeue):
    story = Story().run().start().train(40)
    story.write("stop_requested", reason="by the operator", after_save=True, requeue=requeue)
    state, left = recalled(story)
    assert (state.leaving, state.reason) == ("requeue" if requeue else "stop", "by the operator")
    assert left.stop_after_save and left.nodes == ("n0", "n1")
    state, left = recalled(story.finish("requeued" if requeue else "stopped"), now=START_S + 1e6)
    assert state.leaving == "" and left.nodes == ()


@pytest.mark.parametrize(("job", "requeues"), [("8", 0), ("7", 1)])
def test_the_next_job_does_not_stop_because_the_last_was_asked_to(recalled, monkeypatch, job, requeues):
    """Which has died before it could."""
    story = Story().run().start().train(40)
    story.write("stop_requested", reason="its time is up", after_save=True, requeue=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(requeues))
    state, left = recalled(story, job_id=job)
    assert state.leaving == "" and left.nodes == ()


def test_the_next_job_has_all_of_its_restarts(recalled):
    story = Story().run().start().train(40)
    for number in (1, 2, 3):
        story.fault().act().start(incident=number, resume=False)
    assert recalled(story)[0].policy.without_progress == 3
    assert recalled(story, job_id="8")[0].policy.without_progress == 0


def test_what_the_operator_asked_for_spends_no_restarts(recalled):
    story = Story().run().start().train(40).fault("operator", rank=None).act("save_and_restart")
    state, _ = recalled(story.start(incident=1, resume=False))
    assert state.policy.restarts == () and state.policy.without_progress == 0


def test_strikes_against_a_node_outlive_the_controller(recalled):
    story = Story().run().start().train(40).fault("node_lost", rank=None).act().start(incident=1).close()
    state, _ = recalled(story)
    _, actions = policy.decide(
        replace(state.policy, spares=0, removable=1), Finding(cause="node_lost", node="n1"), story.now
    )
    assert [action.kind for action in actions] == ["exclude", "restart"]


def test_data_that_was_suspected_once_is_left_out_the_second_time(recalled):
    story = Story().run().start().train(40).fault("nan_loss", data_step=41).act().start(incident=1).close()
    state, _ = recalled(story)
    _, actions = policy.decide(state.policy, Finding(cause="nan_loss", data={"data_step": 41}), story.now)
    assert actions[-1].skip_steps == (41,)


def test_excluded_nodes_and_open_requests(recalled):
    story = Story().run().start()
    for node in ("n0", "n1"):
        story.write("node_excluded", node=node, reason="sick")
    story.write("node_readmitted", node="n0", reason="by the operator")
    for number in (1, 2):
        story.write("request", request=number, text="drain", command="approve", node="n1")
    story.write("request_answered", request=1, approved=True, by="an administrator")
    state, _ = recalled(story)
    assert {name: node.excluded for name, node in state.fleet.nodes.items()} == {"n0": "", "n1": "sick"}
    assert list(state.requests) == [2]


def test_nodes_for_which_slurm_was_not_asked_to_the_end_are_asked_for_again(recalled):
    story = Story().run(nodes=4).start()
    for node in ("n0", "n1", "n2", "n3"):
        story.write("node_excluded", node=node, reason=f"{node} is sick")
    story.write("node_drained", node="n0")
    story.write("node_readmitted", node="n1", reason="by the operator")
    story.write("request", request=1, text="drain", command="approve", node="n2")
    _, left = recalled(story)
    assert left.undrained == {"n3": "n3 is sick"}


def test_left_out_data_stays_left_out(recalled):
    story = Story().run().start().train(40)
    story.generation += 1
    story.write("generation_started", nodes=["n0"], world_size=2, reason="", incident=None, skip_steps=[3, 4])
    state, left = recalled(story)
    assert state.skip_steps == state.policy.skip_steps == (3, 4) and left.nodes == ("n0",)


@pytest.mark.parametrize(
    ("status", "job", "late_s", "over"),
    [
        ("done", "7", 1.0, 0),
        ("done", "8", 1.0, None),  # another job goes on with the run
        ("done", "7", LATE_S + 1, None),  # the same job runs the command once more
        ("requeued", "7", 1.0, None),
    ],
)
def test_an_agent_that_comes_late_is_told_of_the_end(recalled, status, job, late_s, over):
    story = Story().run().start().train(40).finish(status)
    state, left = recalled(story, job_id=job, now=story.now + late_s)
    assert left.over == over and (state.status == "finished") == (over is not None)
