"""The ladder of recovery, rung by rung: every row of the table is one fault and what is done about it."""

from dataclasses import replace

import pytest
from journals import Story

from goku_infra.causes import CAUSES
from goku_infra.control.policy import (
    BACKOFF_S,
    EXIT_BAD_INPUT,
    EXIT_CRASH_LOOP,
    NO_PROGRESS_LIMIT,
    RESTART_LIMIT,
    SKIP_LIMIT,
    WINDOW_S,
    PolicyState,
    decide,
    describe,
    progressed,
    requeues_in_vain,
)
from goku_infra.views import Finding

ALONE = PolicyState(has_trained=True)
"""One node, nothing to spare."""
WITH_SPARE = PolicyState(has_trained=True, spares=1, removable=1)
SHRINKABLE = PolicyState(has_trained=True, spares=0, removable=1)


def finding(cause: str, **data) -> Finding:
    return Finding(cause=cause, ranks=(5,), node="n2", detail="a line", data=data)


def kinds(state: PolicyState, cause: str, **data) -> list[str]:
    return [action.kind for action in decide(state, finding(cause, **data), 0.0)[1]]


@pytest.mark.parametrize(
    ("cause", "alone", "with_spare"),
    [
        ("killed", ["restart"], ["restart"]),
        ("exception", ["restart"], ["restart"]),
        ("out_of_memory", ["restart"], ["restart"]),
        ("data_error", ["restart"], ["restart"]),
        ("disk_full", ["restart"], ["restart"]),
        ("early_exit", ["restart"], ["restart"]),
        ("stopped_process", ["restart"], ["restart"]),
        ("hang", ["restart"], ["restart"]),
        ("other_collective", ["restart"], ["restart"]),
        ("collective_timeout", ["restart"], ["restart"]),
        ("agent_lost", ["restart"], ["restart"]),
        ("node_lost", ["restart"], ["restart"]),
        ("link_lost", ["restart"], ["restart"]),
        ("crashed", ["restart"], ["exclude", "restart"]),
        ("device_error", ["restart"], ["exclude", "restart"]),
        ("corruption", ["restart"], ["exclude", "restart"]),
        ("unkillable", ["exclude", "restart"], ["exclude", "restart"]),
        ("straggler", ["alert"], ["alert", "exclude", "save_and_restart"]),
        ("unhealthy_node", ["alert"], ["alert", "exclude", "save_and_restart"]),
        ("operator", ["save_and_restart"], ["save_and_restart"]),
        ("nodes_back", ["save_and_restart"], ["save_and_restart"]),
        ("bad_input", ["stop"], ["stop"]),
        ("nan_loss", ["restart"], ["restart"]),
        ("unknown", ["restart"], ["restart"]),
    ],
)
def test_a_first_fault_takes_the_cheapest_rung_that_helps(cause, alone, with_spare):
    assert kinds(ALONE, cause) == alone
    assert kinds(WITH_SPARE, cause) == with_spare


def test_every_cause_has_an_answer():
    for cause in CAUSES:
        assert kinds(WITH_SPARE, cause), cause


def test_a_second_suspicion_of_a_nodes_hardware_shrinks_the_run_but_never_ends_it():
    state, actions = decide(SHRINKABLE, finding("device_error"), 0.0)
    assert [action.kind for action in actions] == ["restart"]
    _, actions = decide(state, finding("device_error"), 10.0)
    assert [(action.kind, action.node) for action in actions] == [("exclude", "n2"), ("restart", "")]
    state, _ = decide(ALONE, finding("device_error"), 0.0)
    assert kinds(state, "device_error") == ["restart"]  # the only node there is


def test_a_node_that_is_lost_twice_may_not_come_back():
    state, _ = decide(SHRINKABLE, finding("node_lost"), 0.0)
    assert kinds(replace(state, removable=0), "link_lost") == ["exclude", "restart"]


def test_strikes_are_forgotten_after_a_day():
    state, _ = decide(SHRINKABLE, finding("device_error"), 0.0)
    _, actions = decide(state, finding("device_error"), 86_401.0)
    assert [action.kind for action in actions] == ["restart"]


def test_a_crash_loop_is_stopped_with_its_reason_and_restarts_without_progress_wait_longer():
    state, delays = ALONE, []
    for _ in range(NO_PROGRESS_LIMIT):
        state, (restart,) = decide(state, finding("exception"), 0.0)
        delays.append(restart.delay_s)
    assert delays == list(BACKOFF_S[:NO_PROGRESS_LIMIT])
    _, (stop,) = decide(state, finding("exception"), 0.0)
    assert (stop.kind, stop.exit_code) == ("stop", EXIT_CRASH_LOOP)
    assert "crash loop" in stop.reason and "a line" in stop.reason and "rank 5 on n2" in stop.reason


def test_a_new_step_ends_the_count_of_a_crash_loop():
    state = ALONE
    for _ in range(20):
        state, (action,) = decide(state, finding("exception"), 0.0)
        assert (action.kind, action.delay_s) == ("restart", 0.0)
        state = progressed(state)


def test_a_storm_of_restarts_is_stopped_though_each_gets_further():
    state = ALONE
    for number in range(RESTART_LIMIT):
        state = progressed(decide(state, finding("killed"), number)[0])
    assert decide(state, finding("killed"), RESTART_LIMIT)[1][0].kind == "stop"
    assert decide(state, finding("killed"), WINDOW_S + RESTART_LIMIT)[1][0].kind == "restart"


def test_a_loss_that_is_not_finite_is_tried_again_and_then_its_data_is_left_out():
    state, (first,) = decide(ALONE, finding("nan_loss", data_step=120), 0.0)
    assert (first.kind, first.skip_steps) == ("restart", ())
    state, (second,) = decide(state, finding("nan_loss", data_step=120), 0.0)
    assert (second.kind, second.skip_steps) == ("restart", (120,))
    state, (other,) = decide(progressed(state), finding("nan_loss", data_step=121), 0.0)
    assert other.skip_steps == (120,)  # what is left out stays out


def test_a_jump_leaves_out_its_step_and_the_one_that_caused_it():
    _, (restart,) = decide(ALONE, finding("loss_spike", data_step=40), 0.0)
    assert restart.skip_steps == (39, 40)
    _, (restart,) = decide(ALONE, finding("gradient_spike", data_step=40), 0.0)  # found at its second step
    assert restart.skip_steps == (38, 39, 40)
    _, (restart,) = decide(ALONE, finding("gradient_spike", data_step=1), 0.0)
    assert restart.skip_steps == (0, 1)


def test_loss_rules_have_a_budget():
    state = PolicyState(skip_steps=tuple(range(SKIP_LIMIT)))
    assert kinds(state, "loss_spike", data_step=5000) == ["stop"]


def test_bad_input_stops_with_the_commands_own_exit_code():
    (stop,) = decide(WITH_SPARE, finding("bad_input"), 0.0)[1]
    assert (stop.exit_code, stop.reason) == (EXIT_BAD_INPUT, "a line")


def test_a_finding_is_one_line_that_names_who():
    assert describe(finding("killed")) == "rank 5 on n2 was killed by a signal: a line"
    assert describe(Finding(cause="node_lost", node="n3")) == "node n3 is gone"
    many = Finding(cause="hang", ranks=tuple(range(20)))
    assert describe(many) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... makes no progress"


def test_data_that_cannot_be_read_before_any_step_is_bad_input():
    _, (stop,) = decide(PolicyState(), finding("data_error"), 0.0)
    assert (stop.kind, stop.exit_code) == ("stop", EXIT_BAD_INPUT)
    _, (restart,) = decide(progressed(ALONE), finding("data_error"), 0.0)
    assert restart.kind == "restart"


def test_requeues_count_until_the_run_gets_further():
    story = Story().run().start().train(40, save_s=1.0)
    assert requeues_in_vain(story.events) == 0
    for number in (1, 2):
        story.finish("requeued").after(60).run()
        assert requeues_in_vain(story.events) == number
    story.start().train(40)
    assert requeues_in_vain(story.events) == 0
