"""Hangs, slow ranks and jumps are found in time, and nothing is found in a sound run."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from odd_ranks import ODD, odd_ranks, views, wait_until

from goku_infra.diagnosis.detectors import FLOORS_S, PhaseLimits, Spikes, Stragglers, find_hang
from goku_infra.heartbeat import PHASES
from goku_infra.node.observe import observe
from goku_infra.views import RankView

STEP_PHASES = ("data", "forward", "backward", "optimizer")
TICK_S = 0.1


def rank(number: int = 0, **fields) -> RankView:
    defaults = {"step": 7, "phase": "forward", "phase_age_s": 0.0, "process_state": "S", "pid": 100 + number}
    return RankView(rank=number, node=f"node{number}", local_rank=0, **{**defaults, **fields})


def learn(limits: PhaseLimits, phase: str, ages_s: list[float], first_step: int = 0) -> None:
    """Show the limits a rank that stays in `phase` of successive steps for these times."""
    for step, age_s in enumerate(ages_s, first_step):
        limits.observe([rank(step=step, phase=phase, phase_age_s=age_s / 2)])
        limits.observe([rank(step=step, phase=phase, phase_age_s=age_s)])
        limits.observe([rank(step=step + 1, phase="data")])


def test_every_phase_has_a_floor() -> None:
    assert set(FLOORS_S) == set(PHASES)
    limits = PhaseLimits(floor_s=3)
    assert {limits.limit_s(phase, 5) for phase in STEP_PHASES} == {3}
    assert limits.limit_s("start", 0) == limits.limit_s("load", 0) == 30


def test_limits_are_five_times_the_longest_after_three_steps() -> None:
    limits = PhaseLimits()
    learn(limits, "forward", [40, 50])
    assert limits.limit_s("forward", 9) == FLOORS_S["forward"]
    learn(limits, "forward", [30], first_step=2)
    assert limits.limit_s("forward", 9) == 250
    learn(limits, "backward", [1, 1, 1, 1], first_step=3)
    assert limits.limit_s("backward", 9) == FLOORS_S["backward"]


def test_the_age_of_a_hang_does_not_raise_its_own_limit() -> None:
    limits = PhaseLimits(floor_s=3)
    learn(limits, "forward", [0.5] * 5)
    for tenth in range(1000):
        limits.observe([rank(step=9, phase_age_s=tenth / 10)])
    assert limits.limit_s("forward", 9) == 3


def test_the_first_step_of_a_start_may_be_slow() -> None:
    limits = PhaseLimits()
    assert limits.limit_s("forward", 500) == 600  # no rank has come so far yet
    limits.observe([rank(step=500, phase="data")])
    assert limits.limit_s("forward", 500) == 600
    assert limits.limit_s("forward", 501) == 120
    limits.begin_generation()
    assert limits.limit_s("forward", 501) == 600


def test_limits_outlive_the_controller() -> None:
    limits, other = PhaseLimits(), PhaseLimits()
    learn(limits, "forward", [50, 50, 50])
    other.restore(json.loads(json.dumps(limits.to_json())))
    for phase in PHASES:
        for step in (0, 9):
            assert other.limit_s(phase, step) == limits.limit_s(phase, step)


@pytest.mark.parametrize("state", ["S", "T"])
@pytest.mark.parametrize("phase", STEP_PHASES)
def test_a_rank_that_falls_silent_is_found_within_its_limit_and_half_a_second(phase, state) -> None:
    limits = PhaseLimits(floor_s=3)
    learn(limits, phase, [0.05] * 10)
    for tick in range(100):
        age_s = tick * TICK_S
        others = [rank(number, step=12, phase=phase, phase_age_s=age_s, alive_age_s=0.05) for number in (0, 2)]
        odd = rank(1, step=12, phase=phase, phase_age_s=age_s, alive_age_s=age_s, process_state=state)
        finding = find_hang([others[0], odd, others[1]], limits)
        if finding:
            break
    assert finding is not None and 3 < age_s <= 3.5
    assert finding.ranks == (1,) and finding.node == "node1"
    assert finding.cause == ("stopped_process" if state == "T" else "locked")


def test_a_stopped_rank_is_found_long_before_a_long_limit() -> None:
    ranks = [rank(0, phase_age_s=4), rank(1, phase_age_s=4, alive_age_s=4, process_state="T")]
    finding = find_hang(ranks, PhaseLimits())
    assert finding and finding.ranks == (1,)
    assert find_hang([ranks[0], replace(ranks[1], alive_age_s=1)], PhaseLimits()) is None  # a tool looks at it
    assert find_hang([ranks[0], replace(ranks[1], process_state="S")], PhaseLimits()) is None


def test_a_rank_that_is_not_up_yet_has_the_time_of_a_start() -> None:
    starting = rank(1, step=0, phase="start", phase_age_s=200, alive_age_s=200)
    assert find_hang([rank(0), starting], PhaseLimits()) is None
    finding = find_hang([rank(0), replace(starting, phase_age_s=601, alive_age_s=601)], PhaseLimits())
    assert finding and finding.ranks == (1,)


def test_ranks_that_do_not_leave_are_found() -> None:
    leaving = [rank(number, phase="leave", phase_age_s=601) for number in range(2)]
    finding = find_hang(leaving, PhaseLimits())
    assert finding and finding.cause == "hang" and finding.ranks == ()
    finding = find_hang([leaving[0], rank(1, phase="checkpoint", phase_age_s=601)], PhaseLimits())
    assert finding and finding.ranks == (1,)


def test_a_look_for_slow_ranks_takes_each_median_once(monkeypatch) -> None:
    """Of 10,000 ranks, one for each of them would take seconds."""
    detector, taken = Stragglers(), []
    median = statistics.median
    monkeypatch.setattr(statistics, "median", lambda values: taken.append(1) or median(values))
    for second in range(200):
        detector.observe([rank(n, step=second, busy_s=second * 0.9, waiting_s=second * 0.1) for n in range(20)])
    assert detector.finding() is None
    assert 0 < len(taken) < 1000


def test_ranks_that_have_ended_do_not_hang() -> None:
    assert find_hang([rank(0, phase_age_s=9e9, exit_code=0)], PhaseLimits()) is None


@pytest.mark.slow
def test_no_false_alarm_in_10000_healthy_steps() -> None:
    noise = random.Random(5)
    limits = PhaseLimits(floor_s=3)
    limits.observe([rank(0, step=0, phase="load"), rank(1, step=0, phase="load")])
    for step in range(10_000):
        for phase in (*STEP_PHASES, *["checkpoint"] * (step % 100 == 99)):
            length_s = 0.5 * noise.lognormvariate(0, 0.3)
            if step == 0:
                length_s = 2.9  # it compiles; under the floor that the operator has set
            if phase == "checkpoint":
                length_s = 2.0 * noise.lognormvariate(0, 0.1) * (1 + step / 10_000)  # it grows to twice its time
            for share in (0.5, 0.95, 1.0):
                late = noise.random() * 0.2
                now = [rank(n, step=step, phase=phase, phase_age_s=length_s * share, alive_age_s=late) for n in (0, 1)]
                assert find_hang(now, limits) is None, (step, phase, length_s)
                limits.observe(now)


def seen(age_s: float, *, delayed: dict[int, float], **fields) -> list[RankView]:
    """Three ranks that have been in a phase of step 12 for so long and waited for a core as long as told."""
    return [
        rank(n, **{"step": 12, "phase_age_s": age_s, "alive_age_s": 0.05, "delayed_s": delayed.get(n, 0.0)} | fields)
        for n in range(3)
    ]


def held_for_hung_after(share: float, floor_s: float) -> float:
    """Of a run that stands still while rank 1 gets no core for a share of the time."""
    limits = PhaseLimits(floor_s=floor_s)
    learn(limits, "forward", [0.05] * 5)
    ages = (tick * TICK_S for tick in range(1000))
    return next(age_s for age_s in ages if find_hang(seen(age_s, delayed={1: 100 + share * age_s}), limits))


@pytest.mark.parametrize(("share", "after_s"), [(0.0, 3), (0.2, 3.75), (0.5, 6), (1.0, 12)])  # the last: not for ever
def test_time_in_which_no_core_was_free_is_no_hang(share, after_s) -> None:
    assert held_for_hung_after(share, floor_s=3) == pytest.approx(after_s, abs=2 * TICK_S)


def test_what_a_rank_waited_for_a_core_in_earlier_steps_does_not_count() -> None:
    limits = PhaseLimits(floor_s=3)
    assert find_hang(seen(0.1, delayed={1: 5.0}), limits) is None
    assert find_hang(seen(0.1, delayed={1: 50.0}, step=13), limits) is None
    assert find_hang(seen(3.2, delayed={1: 50.1}, step=13), limits)
    limits.begin_generation()
    assert find_hang(seen(3.2, delayed={1: 90.0}, step=13), limits)


def test_who_is_stopped_is_found_in_time_on_a_starved_machine_too() -> None:
    limits = PhaseLimits(floor_s=3)
    assert find_hang(seen(0.1, delayed={0: 1.0}), limits) is None
    now = seen(3.2, delayed={0: 4.0})
    assert find_hang(now, limits) is None
    now[2] = replace(now[2], process_state="T", alive_age_s=3.2)
    finding = find_hang(now, limits)
    assert finding and (finding.cause, finding.ranks) == ("stopped_process", (2,))


def test_ranks_that_nobody_has_described_for_a_while_are_not_held_for_hung() -> None:
    """The agent, or the controller itself, has stood still: what the ranks did meanwhile is not known yet."""
    limits = PhaseLimits(floor_s=3)
    for unheard_s in (0.0, 0.5, 2.0, 30.0):
        aged = seen(0.2 + unheard_s, delayed={}, heard_age_s=unheard_s, alive_age_s=0.05 + unheard_s)
        assert find_hang(aged, limits) is None
    assert find_hang(seen(3.5, delayed={}, heard_age_s=0.3), limits), "what was seen is believed"


def test_a_real_process_that_gets_no_core_is_told_from_one_that_stands_still() -> None:
    core = min(os.sched_getaffinity(0))
    on_one_core = f"import os, time; os.sched_setaffinity(0, [{core}])\n"
    busy, idle = "while True: pass", "time.sleep(600)"
    processes = [subprocess.Popen([sys.executable, "-c", on_one_core + words]) for words in [busy] * 8 + [idle]]
    watched = {"starved": processes[0], "still": processes[-1]}
    try:
        wait_until(lambda: all(os.sched_getaffinity(process.pid) == {core} for process in processes))  # at their work
        floor_s = 1.5
        limits = {name: PhaseLimits(floor_s=floor_s) for name in watched}
        began, told = {}, {}
        while "still" not in told or time.monotonic() - began["still"] < 2 * floor_s:
            for name, process in watched.items():
                view = RankView(**observe(0, 0, process.pid, time.monotonic(), None), node="n0")
                age_s = time.monotonic() - began.setdefault(name, time.monotonic())
                if find_hang([replace(view, phase="forward", phase_age_s=age_s, alive_age_s=0.0)], limits[name]):
                    told.setdefault(name, age_s)
            time.sleep(0.02)
        assert told.keys() == {"still"}, told
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def sampled(steps_s: np.ndarray, seed: int, interval_s: float = 0.05) -> list[list[RankView]]:
    """Snapshots, one a second, of ranks that work [steps, ranks] seconds and then wait for the slowest."""
    communication_s = 0.03
    noise = np.random.default_rng(seed)
    ends = np.cumsum(steps_s.max(axis=1) + communication_s)
    starts = np.concatenate([[0.0], ends[:-1]])
    seconds = np.arange(0, int(ends[-1]))
    columns = []
    for work_s in steps_s.T:
        times = np.cumsum(noise.uniform(0.5, 1.5, int(ends[-1] / interval_s)) * interval_s)
        times = times[times < ends[-1]]
        step = np.searchsorted(ends, times, side="right")
        busy = times - starts[step] < work_s[step]
        lengths = np.diff(times, prepend=0.0)
        sample = np.searchsorted(times, seconds)
        sums = [np.concatenate([[0.0], np.cumsum(lengths * kind)])[sample] for kind in (busy, ~busy)]
        columns.append((*sums, np.searchsorted(ends, seconds, side="right")))
    return [
        [
            rank(number, step=int(step[at]), busy_s=float(busy_s[at]), waiting_s=float(waiting_s[at]))
            for number, (busy_s, waiting_s, step) in enumerate(columns)
        ]
        for at in range(len(seconds))
    ]


def work(ranks: int, steps: int, seed: int, step_s: float = 0.3, noise: float = 0.05) -> np.ndarray:
    """Seconds of work, [steps, ranks]: steps differ, and ranks by noise."""
    draw = np.random.default_rng(seed)
    return step_s * draw.lognormal(0, 0.1, (steps, 1)) * draw.lognormal(0, noise, (steps, ranks))


def first_finding(snapshots: list[list[RankView]]):
    """The first finding and the second at which it was made."""
    detector = Stragglers()
    for second, ranks in enumerate(snapshots):
        detector.observe(ranks)
        finding = detector.finding()
        if finding:
            return second, finding
    return None, None


@pytest.mark.parametrize("ranks", [4, 16, 64])
@pytest.mark.parametrize("seed", range(5))
def test_a_rank_slower_by_a_tenth_is_named_in_five_windows(ranks, seed) -> None:
    seconds = work(ranks, 300, seed)
    seconds[:, ranks // 2] *= 1.10
    second, finding = first_finding(sampled(seconds, seed))
    assert finding is not None and finding.ranks == (ranks // 2,)
    assert finding.cause == "straggler" and finding.node == f"node{ranks // 2}"
    assert second <= 5 * 11  # a window ends with the first snapshot after its ten seconds


def test_rare_samples_take_more_windows() -> None:
    seconds = work(16, 600, seed=3)
    seconds[:, 5] *= 1.10
    second, finding = first_finding(sampled(seconds, 3, interval_s=0.1))
    assert finding is not None and finding.ranks == (5,)
    assert second <= 15 * 11


@pytest.mark.parametrize("ranks", [2, 4, 16, 64])
def test_no_rank_is_slow_under_equal_load(ranks) -> None:
    for seed in range(3):
        second, finding = first_finding(sampled(work(ranks, 1000, seed), seed))
        assert finding is None, (second, finding)


def test_a_pause_is_no_slow_machine() -> None:
    seconds = work(8, 600, seed=1)
    seconds[40, 3] += 6.0
    assert first_finding(sampled(seconds, 1)) == (None, None)


def test_pipeline_stages_of_unlike_work_are_no_stragglers() -> None:
    seconds = work(16, 600, seed=1)
    seconds[:, 12:] *= 1.3
    assert first_finding(sampled(seconds, 1)) == (None, None)


@pytest.mark.parametrize(("delayed", "told"), [(0.0, False), (0.5, True)])
def test_a_slow_rank_whose_cores_others_have_is_told_from_a_slow_machine(delayed, told) -> None:
    seconds = work(4, 300, seed=5)
    seconds[:, 2] *= 1.3
    snapshots = [
        [replace(view, delayed_s=delayed * view.busy_s if view.rank == 2 else 0.0) for view in ranks]
        for ranks in sampled(seconds, 5)
    ]
    _, finding = first_finding(snapshots)
    assert finding is not None and finding.ranks == (2,)
    assert ("others had the cores of node2" in finding.detail) == told


@pytest.mark.parametrize(("excess", "named"), [(1.15, False), (1.9, True)])
def test_where_all_ranks_wait_for_cores_only_a_rank_slower_than_that_is_named(excess, named) -> None:
    seconds = work(4, 300, seed=6)
    seconds[:, 2] *= excess
    snapshots = [[replace(view, delayed_s=0.4 * view.busy_s) for view in ranks] for ranks in sampled(seconds, 6)]
    _, finding = first_finding(snapshots)
    assert (finding is not None and finding.ranks == (2,)) if named else finding is None


def test_a_new_start_begins_anew() -> None:
    slow = work(4, 300, seed=2)
    slow[:, 1] *= 1.3
    detector = Stragglers()
    snapshots = sampled(slow, 2)
    for ranks in snapshots:
        detector.observe(ranks)
    assert detector.finding() is not None
    assert detector.finding() is None  # told once
    for one in range(2):
        detector.observe([replace(view, pid=view.pid + 1000) for view in snapshots[one]])
    assert detector.finding() is None


@pytest.mark.slow
def test_the_slow_one_of_real_ranks_is_named(tmp_path) -> None:
    detector, found = Stragglers(window_s=0.8, windows=4), []
    with odd_ranks(tmp_path, "slow") as ranks:
        wait_until(lambda: len([view for view in views(tmp_path, ranks) if view.step > 0]) == len(ranks.processes))

        def is_found() -> bool:
            detector.observe(views(tmp_path, ranks))
            found.extend(filter(None, [detector.finding()]))
            return bool(found)

        wait_until(is_found)
    assert found[0].ranks == (ODD,)


def feed(spikes: Spikes, steps: int, seed: int = 0) -> None:
    noise = random.Random(seed)
    for step in range(1, steps + 1):
        assert spikes.observe(step, 2 * noise.lognormvariate(0, 0.2), noise.lognormvariate(0, 0.5)) is None


@pytest.mark.parametrize(
    ("loss", "norm", "cause"),
    [
        (11.0, 1.0, "loss_spike"),
        (2.0, 9.0, None),
        (math.nan, 1.0, "nan_loss"),
        (2.0, math.inf, "nan_loss"),
        (9.0, 4.0, None),
    ],
)
def test_a_jump_is_found_at_its_step_and_told_once(loss, norm, cause) -> None:
    spikes = Spikes()
    feed(spikes, 200)
    finding = spikes.observe(201, loss, norm)
    assert (finding and finding.cause) == cause
    assert finding is None or finding.data["step"] == 201
    assert spikes.observe(201, loss, norm) is None
    assert spikes.observe(202, 2.0, 1.0) is None


@pytest.mark.parametrize(("norms", "found_at"), [((9, 1, 40, 1), None), ((9, 8), 202), ((1, 9, 8), 203)])
def test_a_high_gradient_norm_is_found_at_its_second_step_in_a_row(norms, found_at) -> None:
    spikes = Spikes()
    feed(spikes, 200)
    findings = [spikes.observe(step, 2.0, float(norm)) for step, norm in enumerate(norms, start=201)]
    assert [(finding.cause, finding.data["step"]) for finding in findings if finding] == (
        [("gradient_spike", found_at)] if found_at else []
    )


def test_a_high_gradient_norm_before_a_rollback_does_not_count_after_it() -> None:
    spikes = Spikes()
    feed(spikes, 200)
    assert spikes.observe(201, 2.0, 9.0) is None
    assert spikes.observe(190, 2.0, 1.0) is None
    assert spikes.observe(191, 2.0, 9.0) is None


def test_a_jump_needs_twenty_steps_of_history_but_nan_does_not() -> None:
    spikes = Spikes()
    feed(spikes, 19)
    assert spikes.observe(20, 100.0, 1.0) is None
    found = Spikes().observe(1, math.nan, 1.0)
    assert found and found.cause == "nan_loss"


def test_after_a_rollback_the_history_is_that_of_an_undisturbed_run() -> None:
    spikes, undisturbed = Spikes(window=30), Spikes(window=30)
    feed(spikes, 60)
    feed(undisturbed, 60)
    for step in range(61, 66):
        spikes.observe(step, 500.0, 1.0)
    spikes.observe(61, 2.0, 1.0)
    undisturbed.observe(61, 2.0, 1.0)
    assert spikes.to_json()["last"] == undisturbed.to_json()["last"]
    finding, expected = spikes.observe(62, 50.0, 1.0), undisturbed.observe(62, 50.0, 1.0)
    assert finding and expected and finding.cause == expected.cause == "loss_spike"
    assert finding.data["median"] == pytest.approx(expected.data["median"], rel=0.1)


def test_a_step_that_jumps_again_after_a_rollback_is_found_again() -> None:
    spikes = Spikes()
    feed(spikes, 50)
    assert spikes.observe(51, 100.0, 1.0)
    assert spikes.observe(51, 101.0, 1.0)


def test_spikes_outlive_the_controller() -> None:
    spikes, other = Spikes(), Spikes()
    feed(spikes, 50)
    other.restore(json.loads(json.dumps(spikes.to_json())))
    assert other.observe(50, *spikes.to_json()["last"][1:]) is None
    finding = other.observe(51, 100.0, 1.0)
    assert finding == spikes.observe(51, 100.0, 1.0) and finding
