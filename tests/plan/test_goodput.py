"""What failures cost: the simulation keeps its books, and agrees with the closed form where that holds."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goku_mega.config.planning import FaultsConfig, PlanConfig
from goku_mega.errors import ConfigError
from goku_mega.plan import failures
from goku_mega.plan.failures import CAUSES, DAY_S, Cause, cold_start_s, spares_needed
from goku_mega.plan.fit import plan
from goku_mega.plan.goodput import CLASSES, Scenario, closed_form, effective_share, simulate, steps_between_saves
from goku_mega.plan.goodput_report import byterobust, megascale, scenario_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STATE_BYTES = 133.7e9


def job(mean_s: float, *, recovery_s: float = 0.0, **settings) -> Scenario:  # type: ignore[no-untyped-def]
    """One cause, a failure every `mean_s` seconds, a third of the recovery until it is detected."""
    cause = Cause("any", DAY_S / mean_s, recovery_s / 3, recovery_s * 2 / 3, False)
    return Scenario(causes=(cause,), **settings)


def share(scenario: Scenario, days: float = 30.0, *, repeats: int = 128) -> float:
    return effective_share(scenario, days=days, repeats=repeats, seed=0)


def a_plan(gpus: int, **faults: float) -> Scenario:
    return scenario_of(FaultsConfig(**faults), gpus, 8, 20.0, STATE_BYTES)[0]  # type: ignore[arg-type]


def test_every_second_is_in_exactly_one_class():
    for scenario in (a_plan(1024), a_plan(16_384), a_plan(16_384, spares=0), a_plan(8), job(500, interval_s=70)):
        seconds = simulate(scenario, days=7, repeats=50, seed=3)
        assert set(seconds) == set(CLASSES)
        assert all((values >= 0).all() for values in seconds.values())
        np.testing.assert_allclose(sum(seconds.values()), 7 * DAY_S, rtol=1e-12)


@pytest.mark.parametrize(
    ("mean_s", "recovery_s", "interval_s", "blocked_s"),
    [(10_000, 100, 300, 1), (3600, 600, 600, 10), (1000, 500, 200, 5), (86_400, 60, 1800, 30), (400, 0, 300, 40)],
)
def test_the_simulation_is_dalys_closed_form_where_that_is_exact(mean_s, recovery_s, interval_s, blocked_s):
    scenario = job(mean_s, recovery_s=recovery_s, interval_s=interval_s, blocked_s=blocked_s)
    assert share(scenario, days=300 * mean_s / DAY_S) == pytest.approx(closed_form(scenario), rel=0.01)


@pytest.mark.parametrize("gpus", [1024, 4096, 10_000, 16_384])
def test_a_whole_plan_is_near_its_closed_form(gpus):
    """Late commits and recoveries of several lengths; no cold start and spares enough, which it leaves out."""
    scenario = replace(a_plan(gpus), start_s=0.0, spares=300)
    assert share(scenario) == pytest.approx(closed_form(scenario), rel=0.01)


def test_without_failures_only_the_saves_and_the_start_cost():
    scenario = job(math.inf, interval_s=90.0, blocked_s=10.0, start_s=400.0)
    seconds = simulate(scenario, days=1000.0 * 100 / DAY_S, repeats=3, seed=0)
    assert seconds["start_up"] == pytest.approx(400.0)
    assert seconds["saving"] == pytest.approx(996 * 10.0)
    assert seconds["productive"] == pytest.approx(996 * 90.0)
    faults = FaultsConfig(step_s=20.0, repeats=2, days=3, per_1000_node_days=0)
    found = plan(PlanConfig(gpus=1024, goodput=True, faults=faults))
    assert found["ettr_percent"] > 99.6 and found["limits_for_97%"] == []


def test_a_save_that_is_not_committed_does_not_count():
    """What is computed again is the time since the last commit: half an interval and the commit, on average."""
    scenario = job(50_000, interval_s=100.0, commit_s=70.0)
    seconds = simulate(scenario, days=300.0, repeats=200, seed=0)
    count = 300.0 * DAY_S / 50_000
    assert float(seconds["recomputed"].mean()) / count == pytest.approx(50.0 + 70.0, rel=0.03)


def test_what_only_the_store_has_is_further_back():
    near = a_plan(10_000)
    recomputed = [
        float(simulate(replace(near, both_lost=lost), days=30, repeats=100, seed=0)["recomputed"].mean())
        for lost in (0.0, 0.5, 1.0)
    ]
    assert recomputed == sorted(recomputed) and recomputed[0] < recomputed[2]


@pytest.mark.parametrize("worse", ["failures", "restart", "detection", "blocked", "commit"])
def test_nothing_that_gets_worse_makes_more_time(worse):
    def at(times: float) -> float:
        scenario = a_plan(8192)
        changes = {"failures": "per_day", "restart": "restart_s", "detection": "detection_s"}
        if worse in changes:
            name = changes[worse]
            causes = [cause._replace(**{name: times * getattr(cause, name)}) for cause in scenario.causes]
            return share(replace(scenario, causes=tuple(causes)))
        return share(replace(scenario, **{f"{worse}_s": times * getattr(scenario, f"{worse}_s")}))

    shares = [at(times) for times in (0.5, 1.0, 4.0, 16.0)]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] + 0.001


def test_the_chosen_interval_is_the_best_of_the_simulation():
    scenario = replace(a_plan(10_000), blocked_s=2.0)
    steps = steps_between_saves(scenario, 5.0)
    assert steps == pytest.approx(math.sqrt(2 * 2.0 / scenario.per_s) / 5.0, rel=0.15)  # Young's rule
    shares = {factor: share(replace(scenario, interval_s=factor * steps * 5.0)) for factor in (0.2, 0.5, 1, 2, 5)}
    assert max(shares, key=shares.__getitem__) == 1, shares


def test_saves_never_overlap():
    for gpus, step_s in itertools.product((1024, 16_384), (0.3, 5.0, 100.0)):
        scenario, steps = scenario_of(FaultsConfig(), gpus, 8, step_s, STATE_BYTES)
        assert scenario.interval_s == pytest.approx(steps * step_s) and scenario.interval_s >= scenario.store_commit_s


def test_spares_are_the_binomials_quantile():
    for nodes, per_node_day, days in itertools.product((1, 20, 300), (0.001, 0.05, 0.7), (0.5, 2.0)):
        broken = -math.expm1(-per_node_day * days)
        enough = [
            sum(math.comb(nodes, k) * broken**k * (1 - broken) ** (nodes - k) for k in range(count + 1)) >= 0.99
            for count in range(nodes + 1)
        ]
        assert spares_needed(nodes, per_node_day, days * DAY_S) == enough.index(True)


def test_missing_nodes_cost_what_they_would_have_done():
    nothing = simulate(a_plan(4096, spares=500), days=30, repeats=50, seed=0)["waiting_for_nodes"]
    none = simulate(a_plan(4096, spares=0, group_nodes=1), days=30, repeats=50, seed=0)["waiting_for_nodes"]
    assert nothing.max() == 0
    scenario = a_plan(4096)
    replaced_a_day = sum(cause.per_day for cause in scenario.causes if cause.replaces_node)
    # As many nodes are under repair, a day each, as fail in a day; each is missed until the next restart, not before.
    assert float(none.mean()) / (30 * DAY_S) > replaced_a_day / scenario.nodes
    groups = simulate(a_plan(4096, spares=0, group_nodes=8), days=30, repeats=50, seed=0)["waiting_for_nodes"]
    assert float(groups.mean()) > 6 * float(none.mean())


def test_the_same_seed_gives_the_same_jobs():
    first, again, other = (simulate(a_plan(2048), days=5, repeats=9, seed=seed) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in CLASSES)
    assert any((first[name] != other[name]).any() for name in CLASSES)


def test_figures_that_are_marked_measured_are_in_the_results():
    scale, save = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("checkpoint_scale", "checkpoint"))
    ended = json.loads((RESULTS / "recovery.json").read_text())["cases"]["SIGKILL of rank 1"]["goku_ops"]
    lost = json.loads((RESULTS / "recovery_cluster.json").read_text())["cases"]["node power-off, spare"]
    largest = max(scale["cases"], key=lambda case: case["ranks"])
    expected = {
        failures.EXIT_DETECTION: ended["detected_s"],
        failures.NODE_DETECTION: lost["detected_s"],
        failures.PROCESSES: lost["first_step_s"] - lost["detected_s"],
        failures.BLOCKED: scale["value"],
        failures.COMMIT: largest["commit_next_s"] / largest["ranks"],
        failures.WRITE: save["save_gb_per_s"],
    }
    assert {figure for figure in failures.FIGURES if figure.kind == "measured"} == set(expected)
    for figure, value in expected.items():
        assert figure.value == pytest.approx(value, rel=0.02), figure.what


def test_causes_are_all_of_llama_3s():
    assert sum(CAUSES.values()) == 419


def test_cold_starts_lie_between_those_that_are_published():
    assert [cold_start_s(nodes) for nodes in (128, 1024)] == [454.0, 768.0]
    assert 635.0 < cold_start_s(700) < 768.0 < cold_start_s(1250) < cold_start_s(2048)


def test_others_reach_what_they_report_with_their_own_figures():
    assert share(megascale(1536, 100 / 28)) > 0.90
    assert 0.97 < share(byterobust(1200, 175 / 90)) < 0.995


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return plan(PlanConfig(size="8b", gpus=10_000, goodput=True))


def test_ten_thousand_gpus_train_97_percent_of_the_time(found):
    assert found["ettr_percent"] >= 97.0
    sizes = {row["gpus"]: row for row in found["sizes"]}
    assert sorted(sizes) == [1024, 2048, 4096, 8192, 10_000, 16_384]
    shares = [row["ettr_percent"] for row in found["sizes"]]
    assert shares == sorted(shares, reverse=True)
    for row in found["sizes"]:
        lost = sum(value for name, value in row.items() if name.removesuffix("_percent") in CLASSES)
        assert row["ettr_percent"] + lost == pytest.approx(100, abs=0.05)
    assert found["save_every_steps"] == sizes[10_000]["save_steps"]
    for row in found["limits_for_97%"]:
        assert row["times"] > 1, row
    assert {row["kind"] for row in found["figures"]} == {"published", "measured", "assumed"}
    assert all(row["source"] for row in found["figures"])


def test_the_page_says_what_the_plan_says(found):
    page = (RESULTS.parents[1] / "docs" / "goodput.md").read_text().replace("**", "")
    for row in found["sizes"]:
        shown = f"| {row['gpus']:,} | {row['failures_a_day']:.2f} | {row['spares']} "
        assert f"{shown}| {row['ettr_percent']:.2f}% | {row['closed_form_percent']:.2f}% |" in page
    for row in found["others"]:
        assert f"| {row['ettr_percent']:.1f}% |" in page


def test_limits_are_where_97_percent_ends():
    found = plan(PlanConfig(gpus=8192, goodput=True, faults=FaultsConfig(step_s=20.0, repeats=40)))
    limit = next(row for row in found["limits_for_97%"] if row["what"] == "failures a day")
    for factor, above in ((0.95, True), (1.05, False)):
        faults = FaultsConfig(
            step_s=20.0, repeats=40, per_1000_node_days=6.5 * factor * limit["times"],
            save_every_steps=found["save_every_steps"], spares=found["sizes"][3]["spares"],
        )  # fmt: skip
        again = plan(PlanConfig(gpus=8192, goodput=True, faults=faults))
        assert (again["ettr_percent"] > 97.0) == above


def test_settings_that_are_given_are_marked_so():
    faults = FaultsConfig(step_s=20.0, repeats=5, days=3, per_1000_node_days=3.79, restart_s=90.0)
    found = plan(PlanConfig(gpus=1024, goodput=True, faults=faults))
    given = {row["what"]: row["value"] for row in found["figures"] if row["kind"] == "given"}
    assert given == {"failures": 3.79, "restart": 90.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"days": 0}, "faults.days is 0"),
        ({"repeats": 0}, "faults.repeats is 0"),
        ({"spares": -2}, "faults.spares is -2"),
        ({"restart_s": -1.0}, "faults.restart_s is -1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FaultsConfig(**settings)


def test_a_job_that_no_layout_fits_needs_the_time_of_a_step():
    with pytest.raises(ConfigError, match=r"no layout fits 1 x H100; give faults\.step_s"):
        plan(PlanConfig(size="8b", gpus=1, goodput=True))


def test_the_command_prints_the_sources_and_imports_no_torch():
    words = ["plan", "--goodput", "gpus=64", "faults.step_s=10", "faults.repeats=5", "faults.days=3"]
    code = f"import sys; sys.modules['torch'] = None\nfrom goku_mega.cli import main\nsys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ettr_percent: " in done.stdout and "arXiv 2410.21680" in done.stdout and "assumed" in done.stdout
