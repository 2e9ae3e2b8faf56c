"""The rank at fault is named, not those that wait for it: for real processes and for what was seen of many."""

import json
import pickle
import time

import pytest
from odd_ranks import ODD, odd_ranks, views, wait_for_step, wait_until

from goku_infra.diagnosis import culprit, logs
from goku_infra.diagnosis.stacks import dump_texts
from goku_infra.views import RankView

ALL_REDUCE = """
Thread 11 (idle): "MainThread"
    all_reduce (/lib/torch/distributed/distributed_c10d.py:3252)  # work.wait()
    wrapper (/lib/torch/distributed/c10d_logger.py:83)  # return func(*args, **kwargs)
    step (/run/loop.py:95)  # dist.all_reduce(loss)
    <module> (/run/train.py:1)
Thread 12 (idle): "heartbeat"
    wait (/lib/threading.py:331)
"""
ALL_GATHER = ALL_REDUCE.replace("all_reduce", "all_gather")
LATER_ALL_REDUCE = ALL_REDUCE.replace("loop.py:95", "loop.py:101")
IN_FSDP = """
Thread 11 (idle): "MainThread"
    wait_for_unshard (/lib/torch/distributed/fsdp/_param_group.py:300)  # event.wait()
    step (/run/loop.py:90)  # model(batch)
"""
IN_OUR_RING = """
Thread 11 (idle): "MainThread"
    backward (/run/context.py:232)  # dkv += sums.wait()
    step (/run/loop.py:91)  # loss.backward()
"""
READS = """
Thread 11 (idle): "MainThread"
    read (/run/shards.py:178)  # data = os.pread(file, size, offset)
    step (/run/loop.py:80)  # batch = next(loader)
"""
TAKES_A_NUMBER = """
Thread 11 (active): "MainThread"
    agree (/run/agreement.py:49)  # whole_loss, save, now = torch.cat((numbers, norm[None])).tolist()
    step (/run/loop.py:99)  # agreed = agree(loss)
"""
SYNCHRONIZES = """
Thread 11 (active): "MainThread"
    synchronize (/lib/torch/cuda/__init__.py:1219)  # return torch._C._cuda_synchronize()
    step (/run/loop.py:99)  # torch.cuda.synchronize()
"""
FAULTHANDLER = """
Thread 0x00007f21eaffd6c0 (most recent call first):
  File "/lib/threading.py", line 331 in wait

Current thread 0x00007f2221c27b80 (most recent call first):
  File "/lib/torch/distributed/distributed_c10d.py", line 3252 in all_reduce  # work.wait()
  File "/lib/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/run/loop.py", line 95 in step  # dist.all_reduce(loss)
"""


def rank(number: int, **fields) -> RankView:
    defaults = {"step": 7, "phase": "forward", "phase_age_s": 9.0, "alive_age_s": 0.1, "process_state": "S", "pid": 100}
    return RankView(rank=number, node=f"node{number // 2}", local_rank=number % 2, **{**defaults, **fields})


def seen(*texts: str) -> dict[int, str]:
    return {number: f"== py-spy ==\n{text}" for number, text in enumerate(texts)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("oddity", "cause"),
    [
        ("stops", "stopped_process"),
        ("holds the GIL", "locked"),
        ("sleeps", "hang"),
        ("waits for a lock", "hang"),
        ("other collective", "other_collective"),
    ],
)
@pytest.mark.parametrize("with_py_spy", [True, False])
def test_the_odd_one_of_real_ranks_is_named(tmp_path, monkeypatch, oddity, cause, with_py_spy) -> None:
    if not with_py_spy:
        monkeypatch.setattr("goku_infra.diagnosis.stacks._py_spy", lambda: None)
    with odd_ranks(tmp_path, oddity) as ranks:
        wait_for_step(tmp_path, ranks)
        still_s = 1.2 * culprit.SILENT_S if cause == "locked" else 0.3
        wait_until(lambda: min(view.phase_age_s for view in views(tmp_path, ranks)) > still_s)
        before = views(tmp_path, ranks)  # a request for stacks may end the very call that keeps the lock
        started = time.monotonic()
        pids = {number: process.pid or 0 for number, process in enumerate(ranks.processes)}
        stacks = dump_texts(pids, tmp_path / "incident", timeout_s=10)
        finding = culprit.blame(before, stacks)
        assert time.monotonic() - started < 40
    assert (finding.cause, finding.ranks, finding.node) == (cause, (ODD,), f"node{ODD}")
    if cause == "hang":
        assert "rank 0, 2 waits" in finding.detail and "odd_ranks.py" in finding.detail
    if cause == "other_collective":
        assert "rank 1 in gloo:all_gather" in finding.detail  # by the flight recorder
    assert len(list((tmp_path / "incident").iterdir())) == len(ranks.processes)
    assert len({culprit.main_thread(text) for number, text in stacks.items() if number != ODD}) == 1


@pytest.mark.slow
def test_the_killed_one_of_real_ranks_is_the_first_cause(tmp_path) -> None:
    with odd_ranks(tmp_path, "") as ranks:
        wait_for_step(tmp_path, ranks)
        ranks.processes[ODD].kill()
        ranks.processes[ODD].join()
        wait_until(lambda: any(pipe.poll() for number, pipe in enumerate(ranks.pipes) if number != ODD))
        told = next(pipe for number, pipe in enumerate(ranks.pipes) if number != ODD and pipe.poll())
        text = pickle.loads(told.recv()[1])
        seen = [
            rank(0, exit_code=1, process_state="-", last_lines=tuple(text.splitlines())),
            rank(1, exit_code=ranks.processes[ODD].exitcode, process_state="-"),
        ]
    assert logs.is_symptom(1, seen[0].last_lines)
    assert (culprit.first_cause(seen).cause, culprit.first_cause(seen).ranks) == ("killed", (1,))


def test_a_reader_is_named_whatever_the_rest_waits_in() -> None:
    stacks = seen(ALL_REDUCE, IN_FSDP, READS, IN_OUR_RING)
    finding = culprit.blame([rank(number) for number in range(4)], stacks)
    assert (finding.cause, finding.ranks, finding.node) == ("hang", (2,), "node1")
    assert "os.pread" in finding.detail and "rank 0, 1, 3 waits" in finding.detail


def test_of_two_outside_of_collectives_the_one_furthest_back_is_named() -> None:
    ranks = [rank(0), rank(1, step=6, phase="optimizer"), rank(2)]
    assert culprit.blame(ranks, seen(ALL_REDUCE, READS, READS)).ranks == (1,)


def test_another_call_of_the_same_collective_is_another_collective() -> None:
    finding = culprit.blame([rank(number) for number in range(4)], seen(*[ALL_REDUCE] * 3, LATER_ALL_REDUCE))
    assert (finding.cause, finding.ranks) == ("other_collective", (3,))
    assert "loop.py:101" in finding.detail


def test_a_wait_of_our_own_is_a_collective_too() -> None:
    finding = culprit.blame([rank(number) for number in range(3)], seen(ALL_REDUCE, IN_OUR_RING, ALL_REDUCE))
    assert (finding.cause, finding.ranks) == ("other_collective", (1,))
    assert "sums.wait()" in finding.detail and "context.py:232" in finding.detail


def test_of_two_ranks_in_two_collectives_neither_is_in_the_right() -> None:
    assert culprit.blame([rank(0), rank(1)], seen(ALL_REDUCE, ALL_GATHER)).ranks == (0, 1)


def test_a_flight_record_tells_who_is_behind_in_the_same_call() -> None:
    def record(number: int) -> str:
        entry = {
            "record_id": number, "is_p2p": False, "profiling_name": "gloo:all_reduce", "input_sizes": [[4]],
            "collective_seq_id": number, "process_group": ["0", "default_pg"],
        }  # fmt: skip
        return "\n== flight recorder ==\n" + json.dumps({"entries": [entry]})

    stacks = {number: text + record(40 - (number == 2)) for number, text in seen(*[ALL_REDUCE] * 4).items()}
    finding = culprit.blame([rank(number) for number in range(4)], stacks)
    assert (finding.cause, finding.ranks) == ("other_collective", (2,))
    assert "number 39" in finding.detail


def flight_record(*entries: tuple[str, int]) -> str:
    rows = [
        {
            "record_id": number, "is_p2p": False, "profiling_name": f"{backend}:all_reduce", "input_sizes": [[4]],
            "collective_seq_id": number, "process_group": ["0", "default_pg"],
        }
        for backend, number in entries
    ]  # fmt: skip
    return "\n== flight recorder ==\n" + json.dumps({"entries": rows})


def test_gloo_and_nccl_count_a_groups_collectives_each_for_itself() -> None:
    """Rank 2 is behind on NCCL; the counts of gloo, which come later, are alike."""
    records = [flight_record(("nccl", 41 - (number == 2)), ("gloo", 900)) for number in range(4)]
    stacks = {number: text + records[number] for number, text in seen(*[TAKES_A_NUMBER] * 4).items()}
    finding = culprit.blame([rank(number) for number in range(4)], stacks)
    assert (finding.cause, finding.ranks) == ("other_collective", (2,))
    assert "nccl:all_reduce" in finding.detail and "number 40" in finding.detail


@pytest.mark.parametrize("waits", [TAKES_A_NUMBER, SYNCHRONIZES])
def test_who_waits_for_a_gpu_waits_for_the_collectives_on_it(waits) -> None:
    finding = culprit.blame([rank(number) for number in range(4)], seen(waits, waits, READS, waits))
    assert (finding.cause, finding.ranks) == ("hang", (2,))
    assert culprit.collective(culprit.main_thread(seen(waits)[0]))[1].endswith(
        ":99)" if waits == SYNCHRONIZES else ":49)"
    )


def test_when_all_wait_alike_no_rank_is_blamed() -> None:
    finding = culprit.blame([rank(number) for number in range(4)], seen(*[ALL_REDUCE] * 4))
    assert (finding.cause, finding.ranks) == ("hang", ())
    assert "network" in finding.detail


def test_without_stacks_the_rank_furthest_back_is_named() -> None:
    ranks = [rank(0), rank(1, phase="checkpoint"), rank(2)]
    assert culprit.blame(ranks, {}).ranks == (1,)
    assert culprit.blame([rank(0), rank(1)], {}).ranks == ()


def test_a_rank_that_still_saves_is_behind_those_that_leave() -> None:
    ranks = [rank(0, phase="leave"), rank(1, phase="checkpoint"), rank(2, phase="leave")]
    assert culprit.blame(ranks, {}).ranks == (1,)
    leaving = [rank(number, phase="leave") for number in range(2)]
    assert culprit.blame(leaving, {}).ranks == ()
    assert "in leave: read" in culprit.blame(leaving, seen(READS, READS)).detail


def test_ranks_in_the_kernel_on_several_nodes_wait_for_what_they_share() -> None:
    ranks = [rank(number, phase="checkpoint", process_state="D" if number else "S") for number in range(4)]
    finding = culprit.blame(ranks, {})
    assert (finding.cause, finding.ranks, finding.node) == ("hang", (1, 2, 3), "")
    assert "shared file system" in finding.detail
    finding = culprit.blame(ranks[:1] + ranks[2:], {})
    assert (finding.cause, finding.ranks, finding.node) == ("unkillable", (2, 3), "node1")


def test_a_rank_whose_stack_cannot_be_had_is_the_suspect() -> None:
    finding = culprit.blame([rank(number) for number in range(3)], {0: seen(ALL_REDUCE)[0], 2: seen(ALL_REDUCE)[0]})
    assert finding.ranks == (1,)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"process_state": "T"}, "stopped_process"),
        ({"process_state": "t"}, "stopped_process"),
        ({"process_state": "D"}, "unkillable"),
        ({"alive_age_s": 8.0}, "locked"),
        ({"process_state": "-"}, "killed"),
        ({"exit_code": -11, "process_state": "-"}, "crashed"),
    ],
)
def test_what_the_kernel_says_comes_before_stacks(fields, cause) -> None:
    finding = culprit.blame([rank(0), rank(1), rank(2, **fields)], seen(READS, ALL_REDUCE, ALL_REDUCE))
    assert (finding.cause, finding.ranks, finding.node) == (cause, (2,), "node1")


def test_a_silence_of_all_ranks_is_a_busy_machine() -> None:
    ranks = [rank(number, alive_age_s=2.0 + number / 10) for number in range(3)]
    assert culprit.blame(ranks, seen(ALL_REDUCE, READS, ALL_REDUCE)).cause == "hang"


def test_both_writers_of_stacks_read_alike() -> None:
    by_faulthandler = culprit.main_thread(f"== py-spy ==\n(denied)\n== faulthandler ==\n{FAULTHANDLER}")
    by_py_spy = culprit.main_thread(seen(ALL_REDUCE)[0])
    assert (
        culprit.collective(by_faulthandler) == culprit.collective(by_py_spy) == ("all_reduce", "step (run/loop.py:95)")
    )
    assert culprit.main_thread("") == () and culprit.main_thread("== py-spy ==\nError: gone") == ()


def test_the_first_cause_of_a_crowd_of_symptoms() -> None:
    lost = ("Traceback (most recent call last):", "RuntimeError: Connection closed by peer [10.0.0.1]:5")
    ranks = [
        rank(0, exit_code=1, process_state="-", last_lines=lost),
        rank(1, exit_code=-15, process_state="-"),
        rank(2, exit_code=-9, process_state="-", alive_age_s=0.1),  # by its agent, after rank 3 had failed
        rank(3, exit_code=1, process_state="-", last_lines=("Traceback (most recent call last):", "OSError: odd")),
    ]
    finding = culprit.first_cause(ranks)
    assert (finding.cause, finding.ranks, finding.node) == ("exception", (3,), "node1")
    assert culprit.first_cause(ranks[:3]).ranks == (2,)
    only_symptoms = culprit.first_cause(ranks[:2])
    assert only_symptoms.ranks == () and "rank 0, 1 failed for others" in only_symptoms.detail


def test_ranks_with_the_same_cause_are_named_together() -> None:
    last = ("Traceback (most recent call last):", "OSError: odd")
    finding = culprit.first_cause([rank(n, exit_code=1, process_state="-", last_lines=last) for n in range(3)])
    assert (finding.cause, finding.ranks, finding.node) == ("exception", (0, 1, 2), "node0")


@pytest.mark.parametrize(
    ("said", "ranks", "node"),
    [
        ('"ranks": [2]', (2,), "node1"),
        ('"ranks": [2, 3]', (2, 3), "node1"),
        ('"ranks": []', (), ""),  # of all ranks, or of gradients that had met
        ('"ranks": [9]', (9,), ""),  # it has not ended yet
    ],
)
def test_a_loss_that_is_not_finite_is_of_the_ranks_whose_own_it_was_not_of_those_heard_first(said, ranks, node) -> None:
    last = (f'{{"fault": "nan_loss", "step": 7, "data_step": 8, {said}}}',)
    ended = [rank(n, exit_code=70, process_state="-", last_lines=last, alive_age_s=9.0 - n) for n in range(4)]
    finding = culprit.first_cause(ended)
    assert (finding.cause, finding.ranks, finding.node) == ("nan_loss", ranks, node)
    assert finding.data["data_step"] == 8


def test_corruption_names_the_rank_that_holds_it_not_those_that_found_it() -> None:
    last = ('{"fault": "corruption", "step": 7, "ranks": [2]}',)
    finding = culprit.first_cause([rank(n, exit_code=71, process_state="-", last_lines=last) for n in range(4)])
    assert (finding.cause, finding.ranks, finding.node) == ("corruption", (2,), "node1")
