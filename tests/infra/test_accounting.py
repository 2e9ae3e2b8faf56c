"""Every second of a run is in exactly one class of time, whatever befalls the run and its controller."""

import itertools
import random

import pytest
from journals import START_S, Story

from goku_infra.record.accounting import CLASSES, Ledger, account, end_s, goodput
from goku_infra.record.journal import Event


def totals(story: Story) -> dict[str, float]:
    """What is not zero; the sum is checked every time."""
    accounts = account(story.events, story.now)
    assert sum(accounts.values()) == story.now - START_S
    assert set(accounts) == set(CLASSES)
    return {kind: seconds for kind, seconds in accounts.items() if seconds}


def test_a_quiet_run_starts_up_then_produces_and_saves():
    story = Story().run().start(takes_s=2.0).train(40, save_s=1.5).train(40)
    assert totals(story) == {"start_up": 2.5, "productive": 40.0, "saving": 1.5}
    assert goodput(account(story.events, story.now)) == 40 / 44


def test_a_killed_rank_costs_detection_a_restart_and_the_steps_done_again():
    story = Story().run().start().train(39, save_s=1.0).train(20).fault(found_s=0.25).act().after(0.25)
    story.start(incident=1, takes_s=1.25).close().train(40)
    # Steps 41-60 are done again: 41 before `first_step`, so 20 step times until step 61 is there.
    assert totals(story) == {
        "start_up": 1.5, "saving": 1.0, "detection": 0.25, "restart": 1.5, "recomputed": 10.0,
        "productive": 19.5 + 10.0 + 10.0,
    }  # fmt: skip


def test_time_without_enough_nodes_is_waiting_and_the_start_after_it_a_restart():
    story = Story().run().start().train(20).fault("node_lost", found_s=2.0).act("exclude", node="n1").after(1.0)
    story.write("waiting", reason="1 node of 2").after(60).start(incident=1, takes_s=2.0)
    assert totals(story) == {
        "start_up": 1.5, "productive": 10.0, "detection": 2.0, "restart": 3.0, "waiting_for_nodes": 60.0,
    }  # fmt: skip


def test_a_job_that_waits_for_its_first_nodes_waits():
    story = Story().run().write("waiting", reason="2 of 4 nodes").after(30).start(takes_s=2.0)
    assert totals(story) == {"start_up": 2.5, "waiting_for_nodes": 30.0}


def test_a_run_that_has_not_begun_to_train_is_starting_up():
    assert totals(Story().run().after(5)) == {"start_up": 5.5}
    assert account([], 5.0) == dict.fromkeys(CLASSES, 0.0)
    assert goodput(account([], 5.0)) == 0


def test_an_incident_is_a_pause_from_the_moment_it_is_found():
    story = Story().run().start().train(20).fault(found_s=3.0)
    assert totals(story) == {"start_up": 1.5, "productive": 10.0, "detection": 3.0}
    assert totals(story.after(1.0))["restart"] == 1.0


def test_overlapping_incidents_are_detected_once_and_restarted_once():
    story = Story().run().start().train(20).fault(found_s=3.0).after(1.0).fault("node_lost", found_s=1.0).act()
    story.start(incident=2, takes_s=1.0).close()
    assert totals(story) == {"start_up": 1.5, "productive": 10.0, "detection": 3.0, "restart": 3.0}


def test_a_fault_during_recovery_is_detection_again():
    story = Story().run().start().train(20).fault(found_s=1.0).act().start(incident=1, resume=False).after(2.0)
    story.fault(found_s=0.5).act().start(incident=2, takes_s=1.0)
    # The pause before the second start of ranks: 2 s of restart, 0.5 s of detection.
    assert totals(story) == {"start_up": 1.5, "productive": 10.0, "detection": 1.5, "restart": 3.0}


def test_a_fault_older_than_the_start_of_its_ranks_takes_nothing_from_the_ranks_before():
    story = Story().run().start().train(20).fault(found_s=1.0).act().start(incident=1, takes_s=1.0)
    story.write("incident_opened", incident=2, cause="hang", ranks=[0], step=story.step, fault_s=START_S - 50)
    assert totals(story) == {"start_up": 1.5, "productive": 10.0, "detection": 2.0}


def test_a_controller_that_is_replaced_while_the_ranks_run_costs_nothing():
    story = Story().run().start().train(20).after(1.0).controller()
    for node in ("n0", "n1"):
        story.after(0.5).write("node_joined", node=node, host="", slots=2, running=1)
    assert totals(story.train(20)) == {"start_up": 1.5, "productive": 22.0}


def test_a_slow_rank_is_no_pause_until_the_ranks_are_restarted_because_of_it():
    story = Story().run().start().train(20).fault("straggler", found_s=10.0).train(40)
    assert totals(story) == {"start_up": 1.5, "productive": 40.0}
    story.act("save_and_restart").after(0.5).start(incident=1, takes_s=1.0)
    assert totals(story) == {"start_up": 1.5, "productive": 40.0, "restart": 1.5}


def test_an_incident_that_did_not_stop_the_ranks_gives_its_seconds_back():
    story = Story().run().start().train(20).fault("disk_full", found_s=0.5).train(40)
    assert totals(story) == {"start_up": 1.5, "productive": 30.5}


def test_the_time_between_two_jobs_is_waiting_for_nodes():
    story = Story().run().start().train(20).finish("requeued").after(120).run().start(takes_s=1.0)
    assert totals(story) == {"start_up": 3.0, "productive": 10.0, "waiting_for_nodes": 120.0}


def test_a_job_that_vanished_has_trained_until_its_last_event():
    story = Story().run().start().train(19).after(300).run().start(takes_s=1.0)
    assert totals(story) == {"start_up": 3.0, "productive": 9.5, "waiting_for_nodes": 300.0}


def test_a_finished_run_needs_no_more_time():
    story = Story().run().start().train(20).finish()
    assert end_s(story.events, story.now + 1000) == story.now
    assert end_s(story.events[:-1], story.now + 1000) == story.now + 1000
    requeued = Story().run().start().finish("requeued")
    assert end_s(requeued.events, requeued.now + 9) == requeued.now + 9


def test_a_clock_that_jumps_back_takes_no_time_away():
    story = Story().run().start().train(20)
    story.now -= 100
    story.write("progress", step=21, committed_step=0, loss=1.0, saving_s=0.0)
    accounts = account(story.events, START_S + 20)
    assert sum(accounts.values()) == 20 and accounts["productive"] == 18.5


@pytest.mark.parametrize("seed", range(200))
def test_any_sequence_of_events_sums_to_its_time(seed):
    """Also nonsense: restarts without an incident, incidents before a start, closes of nothing."""
    rng = random.Random(seed)
    story = Story()
    for _ in range(rng.randrange(1, 60)):
        verb = rng.choice(("train", "save", "fault", "old", "start", "half", "act", "close", "wait", "controller",
                           "join", "job", "finish", "caught_up"))  # fmt: skip
        match verb:
            case "train":
                story.train(rng.randrange(30))
            case "save":
                story.train(1, save_s=rng.randrange(9) / 4)
            case "fault":
                story.fault(rng.choice(("killed", "hang", "straggler", "node_lost")), found_s=rng.randrange(20) / 4)
            case "old":
                story.write("incident_opened", incident=99, cause="hang", step=None, fault_s=rng.choice((None, 0, 1e9)))
            case "start" | "half":
                named = rng.choice([None, *range(1, story.incidents + 1)])
                story.start(incident=named, takes_s=rng.randrange(20) / 4, resume=verb == "start")
            case "act":
                story.act()
            case "close":
                story.close()
            case "wait":
                story.write("waiting", reason="")
            case "controller":
                story.controller()
            case "join":
                story.write("node_joined", node="n0", host="", slots=2, running=rng.randrange(3))
            case "job":
                story.run()
            case "finish":
                story.finish(rng.choice(("done", "requeued", "failed")))
            case "caught_up":
                story.write("caught_up", step=story.step)
        story.after(rng.randrange(40) / 4)
    accounts = account(story.events, story.now)
    began = story.events[0].time_s if story.events else story.now
    assert sum(accounts.values()) == story.now - began  # quarters of seconds: exact in binary
    assert all(seconds >= 0 for seconds in accounts.values())


def test_spans_follow_each_other_without_a_gap():
    story = Story().run().start().train(20, save_s=0.5).train(21).fault(found_s=1.0).after(2.0)
    ledger = Ledger()
    for event in story.events:
        ledger.add(event)
    spans = ledger.recent_spans(story.now + 1)
    assert [span.kind for span in spans] == ["start_up", "productive", "saving", "productive", "detection", "restart"]
    assert all(left.end_s == right.start_s for left, right in itertools.pairwise(spans))


def test_a_month_of_events_is_accounted_in_little_time():
    ledger, time_s = Ledger(), 0.0
    ledger.add(Event(0, "run_started", 0.0, 1, 0))
    ledger.add(Event(1, "generation_started", 0.0, 1, 1, {"incident": None}))
    ledger.add(Event(2, "first_step", 0.0, 1, 1, {"step": 1}))
    for report in range(100_000):
        time_s += 10.0
        saving = report // 60 * 0.5
        ledger.add(Event(report, "progress", time_s, 1, 1, {"step": report, "saving_s": saving}))
    assert ledger.totals(time_s)["saving"] == pytest.approx(99_999 // 60 * 0.5)
