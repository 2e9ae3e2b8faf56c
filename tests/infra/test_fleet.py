"""What agents say becomes nodes and ranks on the controller's own clock."""

import dataclasses
import time

import pytest

from goku_infra.control.fleet import Fleet, Node
from goku_infra.views import RankView


def fleet(nodes: int = 3, ranks_per_node: int = 2) -> Fleet:
    made = Fleet()
    for index in range(nodes):
        made.nodes[f"n{index}"] = Node(f"n{index}", index, slots=ranks_per_node, connected=True)
    made.begin([made.nodes["n0"], made.nodes["n1"]], ranks_per_node)
    return made


def test_ranks_are_numbered_in_the_order_of_the_nodes():
    made = fleet()
    made.begin([made.nodes["n2"], made.nodes["n0"]], 2)
    places = [(view.rank, view.node, view.local_rank) for view in made.rank_views(0.0)]
    assert places == [(0, "n2", 0), (1, "n2", 1), (2, "n0", 0), (3, "n0", 1)]
    assert [made.nodes[name].role for name in ("n0", "n1", "n2")] == ["training", "spare", "training"]


def test_an_age_grows_on_here_from_when_it_came():
    made = fleet()
    made.observe([{"rank": 1, "phase": "forward", "step": 4, "phase_age_s": 0.5, "alive_age_s": 0.25}], now=100.0)
    view = made.rank_views(102.0)[1]
    assert (view.phase_age_s, view.alive_age_s, view.step, view.phase) == (2.5, 2.25, 4, "forward")
    assert made.ranks[1].phase_age_s == 0.5  # looking changes nothing
    assert made.rank_views(102.0)[0].phase_age_s == 0.0  # of whom nothing has been heard


def test_a_view_that_was_changed_is_as_one_that_was_made():
    made = fleet()
    made.observe([{"rank": 0, "step": 3, "loss": None, "local_rank": 0}], now=1.0)
    expected = dataclasses.replace(RankView(rank=0, node="n0", local_rank=0), step=3)
    assert made.ranks[0] == expected
    assert hash(made.ranks[0]) == hash(expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.ranks[0].step = 9  # type: ignore[misc]


def test_a_rank_that_has_ended_stays_as_it_was():
    made = fleet()
    made.observe([{"rank": 3, "step": 7, "phase_age_s": 1.0}], now=10.0)
    made.ended(3, -9, ["last", "words"])
    made.ended(3, 0, [])
    made.observe([{"rank": 3, "step": 8, "process_state": "R"}], now=11.0)
    view = made.rank_views(50.0)[3]
    assert (view.exit_code, view.step, view.process_state, view.phase_age_s) == (-9, 7, "-", 1.0)
    assert view.last_lines == ("last", "words")
    assert list(made.exited) == [3]


@pytest.mark.parametrize(("exit_code", "record_left", "early"), [(0, True, True), (0, False, False), (1, True, False)])
def test_a_rank_that_ends_well_takes_its_record_along(exit_code, record_left, early):
    made = fleet()
    said = {"kind": "ended", "rank": 1, "exit_code": exit_code, "last_lines": [], "record_left": record_left}
    made.hear("n0", {**said, "generation": 0}, generation=0, now=10.0)
    assert made.exited[1].left_early == early and made.first_end_at == 10.0
    made.hear("n0", {**said, "generation": 1, "rank": 2}, generation=0, now=11.0)
    assert list(made.exited) == [1]  # the other is of another generation


def test_ends_are_kept_in_the_order_in_which_they_came_and_forgotten_by_a_new_start():
    made = fleet()
    for rank in (2, 0, 3):
        made.ended(rank, 1, [])
    assert list(made.exited) == [2, 0, 3]
    made.begin([made.nodes["n0"]], 2)
    assert not made.exited
    assert all(view.exit_code is None for view in made.rank_views(0.0))


def test_what_an_agent_may_not_say_or_of_a_rank_that_is_not_there_is_passed_over():
    made = fleet()
    made.observe([{"rank": 99, "step": 1}, {"rank": 0, "step": 1, "node": "n9", "exit_code": 3, "shoe": 4}], now=1.0)
    made.ended(99, 1, [])
    assert made.ranks[0] == RankView(rank=0, node="n0", local_rank=0, step=1)
    assert 99 not in made.ranks
    assert not made.exited


def test_the_run_is_as_far_as_its_slowest_rank_and_has_the_newest_checkpoint_of_any():
    made = fleet()
    made.observe([{"rank": rank, "step": 5 + rank, "committed_step": rank} for rank in range(4)], now=1.0)
    assert (made.step(), made.committed_step()) == (5, 3)
    assert (Fleet().step(), Fleet().committed_step()) == (0, -1)


@pytest.mark.parametrize(
    ("change", "is_ready"),
    [
        ({}, True),
        ({"connected": False}, False),
        ({"excluded": "sick"}, False),
        ({"lost": "gone"}, False),
        ({"health": ("warning: clock is off",)}, True),
        ({"health": ("critical: ECC",)}, False),
        ({"health": ("critical: ECC",), "training": True}, True),
    ],
)
def test_which_nodes_can_train(change, is_ready):
    made = fleet()
    for name, value in change.items():
        setattr(made.nodes["n2"], name, value)
    assert [node.name for node in made.ready()] == ["n0", "n1"] + ["n2"] * is_ready


def test_nodes_are_taken_in_the_order_of_the_allocation():
    made = Fleet({name: Node(name, index, connected=True) for name, index in (("b", 2), ("c", 0), ("a", 1))})
    assert [node.name for node in made.ready()] == ["c", "a", "b"]


def test_ten_thousand_ranks_are_looked_at_quickly():
    made = fleet(nodes=1250, ranks_per_node=8)
    made.begin(made.ready(), 8)
    said = [
        {"rank": rank, "step": 1, "phase": "forward", "phase_age_s": 0.1, "alive_age_s": 0.1} for rank in range(10_000)
    ]
    looks_s = []
    for _ in range(5):  # a search for garbage in all that the tests hold may fall into one of them
        began = time.thread_time()
        made.observe(said, now=1.0)
        assert len(made.rank_views(2.0)) == 10_000
        looks_s.append(time.thread_time() - began)
    assert min(looks_s) < 0.5  # measured: 0.03 s


def test_the_health_of_a_spare_is_known_though_it_has_no_ranks():
    made = fleet()
    report = {"kind": "ranks", "generation": 0, "ranks": [], "gpus": []}
    gpu = {"index": 0, "busy": 0.0, "memory_bytes": 0, "power_w": 70.0, "temperature_c": 31}
    made.hear("n2", report | {"health": ["critical: its disk is full"], "gpus": [gpu]}, 5, now=1.0)
    assert made.nodes["n2"].view(1.0).gpus == (gpu,)
    assert made.nodes["n2"].critical and made.nodes["n2"] not in made.ready()
    made.hear("n2", report | {"health": []}, 5, now=2.0)
    assert made.nodes["n2"] in made.ready()


def test_an_end_that_is_told_before_its_rank_is_known_is_kept_for_later():
    made = fleet()
    made.ranks = {}  # of a controller that has just been raised
    ended = {"kind": "ended", "generation": 5, "rank": 1, "exit_code": -9, "last_lines": [], "record_left": True}
    made.hear("n0", ended, 5, now=1.0)
    early = made.early_ends
    made.begin([made.nodes["n0"], made.nodes["n1"]], 2)
    assert early == [("n0", ended)] and not made.early_ends and not made.exited
    for name, message in early:
        made.hear(name, message, 5, now=1.0)
    assert list(made.exited) == [1] and made.first_end_at == 1.0
