"""The journal's events become incidents that say who, when, what was done and what it cost."""

import json
from dataclasses import asdict

import pytest
from journals import Story

from goku_infra.causes import CAUSES
from goku_infra.record.incidents import from_json, incidents, number_ranges, seconds, sentence, subject


def stopped_rank() -> Story:
    """Rank 5 on n2 is stopped at step 60; the newest checkpoint is of step 40."""
    story = Story().run().start().train(39, save_s=1.0).train(20).fault("hang", rank=None, node="", found_s=3.25)
    story.after(0.5).write(
        "incident_blamed", incident=1, cause="stopped_process", ranks=[5], node="n2", detail="state T for 3.2 s",
        evidence=1,
    )  # fmt: skip
    story.act("exclude", node="n2").act("restart").after(0.25).start(incident=1, takes_s=1.0)
    return story


def test_an_incident_tells_its_times_its_culprit_and_its_cost():
    story = stopped_rank()
    fault_s = story.now - 5.0
    (incident,) = incidents(story.events)
    assert (incident.number, incident.cause, incident.ranks, incident.node) == (1, "stopped_process", (5,), "n2")
    times = (incident.fault_s, incident.detected_s, incident.blamed_s, incident.restarted_s, incident.recovered_s)
    assert [time_s - fault_s for time_s in times] == [0.0, 3.25, 3.75, 4.0, 5.0]
    assert (incident.step, incident.resumed_step, incident.lost_steps, incident.status) == (60, 40, 20, "recovered")
    assert [(action, reason) for _, action, reason in incident.actions] == [
        ("exclude", "because"), ("restart", "because"),
    ]  # fmt: skip
    assert incident.evidence == 1


def test_the_sentence_names_the_culprit_the_repair_and_the_loss():
    (incident,) = incidents(stopped_rank().events)
    assert sentence(incident) == (
        "incident 1: rank 5 on n2 is stopped (SIGSTOP or a debugger): state T for 3.2 s; "
        "found 3.2 s after the last sign of health; restarted without n2; "
        "training again since step 40, 5.0 s after the fault; 20 steps lost"
    )


def test_an_open_incident_says_that_the_run_does_not_train():
    story = Story().run().start().train(5).fault(rank=0, node="n0", found_s=0.21)
    (incident,) = incidents(story.events)
    assert incident.status == "open"
    assert sentence(incident) == (
        "incident 1: rank 0 on n0 was killed by a signal: found 0.21 s after the last sign of health; "
        "not training again yet"
    )


def test_one_start_ends_all_incidents_that_waited_for_it_but_not_a_slow_rank():
    story = Story().run().start().train(5).fault("straggler").train(5).fault("killed").fault("node_lost").act()
    story.start(incident=3)
    slow, killed, lost = incidents(story.events)
    assert (slow.status, slow.restarted_s) == ("open", None)
    assert killed.status == lost.status == "recovered"
    assert killed.recovered_s == lost.recovered_s == story.now


def test_a_start_that_fails_is_not_the_recovery():
    story = Story().run().start().train(5).fault().act().start(incident=1, resume=False).after(1.0)
    story.fault(found_s=0.5).act().start(incident=2, takes_s=1.0)
    first, second = incidents(story.events)
    assert first.recovered_s == second.recovered_s == story.now
    assert first.restarted_s == second.restarted_s == story.now - 1.0


def test_an_incident_may_close_without_a_restart():
    story = Story().run().start().train(5).fault("straggler").train(5).close()
    (incident,) = incidents(story.events)
    assert (incident.status, incident.restarted_s, incident.recovered_s) == ("recovered", None, story.now)


def test_a_run_that_ends_ends_its_open_incidents_and_a_requeue_does_not():
    story = Story().run().start().train(5).fault()
    assert [incident.status for incident in incidents(story.finish("failed").events)] == ["ended"]
    story = Story().run().start().train(5).fault().finish("requeued").run().start(incident=1)
    assert [incident.status for incident in incidents(story.events)] == ["recovered"]


def test_an_incident_that_went_through_the_queue_ends_with_the_next_first_step():
    story = Story().run().start().train(40).fault("node_lost", rank=None).finish("requeued")
    story.after(60).run().start()
    (incident,) = incidents(story.events)
    assert incident.status == "recovered" and incident.recovered_s == story.now


def test_data_that_is_left_out_is_named():
    story = Story().run().start().train(5).fault("nan_loss").act("restart", skip_steps=[41, 42]).start(incident=1)
    (incident,) = incidents(story.events)
    assert "restarted, leaving out data step 41-42;" in sentence(incident)


def test_an_incident_of_a_snapshot_reads_as_the_journal_s():
    (incident,) = incidents(stopped_rank().events)
    assert sentence(from_json(json.loads(json.dumps(asdict(incident))))) == sentence(incident)


@pytest.mark.parametrize("cause", [*CAUSES, "never heard of"])
def test_every_cause_has_a_sentence_for_a_rank_for_ranks_for_a_node_and_for_none(cause):
    texts = {subject(cause, ranks, node) for ranks in ((), (3,), (3, 4, 9)) for node in ("", "n1")}
    assert len(texts) == 6
    assert any(text.startswith("3 ranks on n1 (3-4, 9): each ") for text in texts)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.214, "0.21 s"), (-1, "0.00 s"), (3.21, "3.2 s"), (12.4, "12 s"), (250, "4 min 10 s"), (7500, "2 h 05 min")],
)
def test_durations_read_as_people_say_them(value, text):
    assert seconds(value) == text


def test_numbers_are_gathered_into_ranges():
    assert number_ranges([7, 0, 1, 2, 2, 3]) == "0-3, 7"
    assert number_ranges([]) == ""
