"""One wrong bit is found at the next check, the right rank is named, and the checks change nothing."""

import pytest
from faults import committed, compute_wrongly, flip_bit, flip_replica, losses, make_run, train_with

from goku_mega.config.training import LayoutConfig
from goku_mega.train.audit import Evidence, blame
from launch import run_ranks


def short(ranks_and_layout: tuple[int, LayoutConfig]) -> str:
    ranks, layout = ranks_and_layout
    changed = {name: value for name, value in vars(layout).items() if value != getattr(LayoutConfig(), name)}
    return " ".join([str(ranks), *(f"{name}={value}" for name, value in changed.items())])


def named(outcomes: list) -> tuple[int, list[int]]:
    """Step and ranks that all ranks report."""
    (code,) = {outcome[0] for outcome in outcomes}
    assert code == 71
    (report,) = {str(outcome[1]) for outcome in outcomes}
    assert report == str({"fault": "corruption", "step": outcomes[0][1]["step"], "ranks": outcomes[0][1]["ranks"]})
    return outcomes[0][1]["step"], outcomes[0][1]["ranks"]


@pytest.mark.parametrize("part", ["model", "ema", "exp_avg_sq"])
def test_a_bit_that_flips_between_steps_names_its_rank_before_the_next_update(small_dataset, tmp_path, part):
    run = make_run(small_dataset, tmp_path / "run", every=100, save_every=2)
    outcomes = run_ranks(train_with, 2, run, flip_bit, 1, 3, part)
    assert named(outcomes) == (3, [1])
    assert f"{part}/" in outcomes[0][2]
    assert committed(tmp_path / "run") == ["step_00000002"]  # nothing of it is saved


def test_of_three_replicas_the_odd_one_is_named_at_the_next_check(small_dataset, tmp_path):
    run = make_run(small_dataset, tmp_path / "run", every=2, layout=LayoutConfig(dp_replicate=3))
    assert named(run_ranks(train_with, 3, run, flip_replica, 2, 3)) == (3, [2])


def test_a_replica_that_differs_is_not_saved(small_dataset, tmp_path):
    run = make_run(small_dataset, tmp_path / "run", every=100, layout=LayoutConfig(dp_replicate=2))
    step, ranks = named(run_ranks(train_with, 2, run, flip_replica, 1, 1))
    assert (step, ranks) == (2, [0, 1])  # which of two is not known
    assert committed(tmp_path / "run") == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_computes_wrongly_is_named_at_the_next_check(small_dataset, tmp_path, victim):
    run = make_run(small_dataset, tmp_path / "run", every=2)
    assert named(run_ranks(train_with, 3, run, compute_wrongly, victim, 2)) == (3, [victim])


@pytest.mark.parametrize("layout", [(2, LayoutConfig()), (2, LayoutConfig(dp_replicate=2))], ids=short)
def test_audits_change_no_bit_of_the_run(small_dataset, tmp_path, layout):
    compare_with_and_without(small_dataset, tmp_path, *layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        (1, LayoutConfig()),
        (4, LayoutConfig(tp=2, dp_replicate=2)),
        (4, LayoutConfig(tp=2, sequence_parallel=False, dp_shard=2)),
        (4, LayoutConfig(cp=2, dp_shard=2)),
        (4, LayoutConfig(pp=2, tp=2)),
        (4, LayoutConfig(pp=2, pp_chunks=2, dp_replicate=2)),
    ],
    ids=short,
)
def test_audits_change_no_bit_of_the_run_in_any_layout(small_dataset, tmp_path, layout):
    compare_with_and_without(small_dataset, tmp_path, *layout)


def compare_with_and_without(dataset, folder, ranks, layout) -> None:
    for every in (0, 2):
        run_ranks(train_with, ranks, make_run(dataset, folder / f"every{every}", every=every, layout=layout), None)
    assert losses(folder / "every2") == losses(folder / "every0")


def evidence(dp_rank: int, *, broken=(), copies=None, disagreeing=()) -> Evidence:
    return Evidence(dp_rank, list(broken), copies or {}, list(disagreeing))


def test_the_surest_evidence_counts():
    box = ("model/a", (0,), (4,))
    broken = [
        evidence(0, copies={box: 1}),
        evidence(1, broken=["ema/b"], copies={box: 2}),
        evidence(2, copies={box: 1}),
    ]
    assert blame(broken, 3)[0] == [1]
    of_copies = [evidence(rank, copies={box: seal}, disagreeing=[0]) for rank, seal in enumerate((5, 5, 6, 5))]
    assert blame(of_copies, 4)[0] == [2]
    assert blame([evidence(0, copies={box: 1}), evidence(1, copies={box: 2})], 2)[0] == [0, 1]


@pytest.mark.parametrize(
    ("dp_ranks", "disagreeing", "suspects"),
    [(1, [0], [0]), (2, [0, 1], [0, 1]), (2, [1], [0, 1]), (4, [1, 2], [2]), (4, [3, 0], [0]), (4, [2], [2, 3])],
)
def test_a_rank_that_differs_from_both_neighbours_is_the_one(dp_ranks, disagreeing, suspects):
    found = [evidence(rank, disagreeing=disagreeing) for rank in range(dp_ranks)]
    assert blame(found, dp_ranks)[0] == suspects
