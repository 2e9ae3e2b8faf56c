"""Do these nodes work together: each node runs a member, one process beside them coordinates.

    python -m goku_infra.checks.collective_check --store HOST:PORT --world N --coordinate
    python -m goku_infra.checks.collective_check --store HOST:PORT --world N --rank R [--device cuda:0]

The coordinator hosts the store, sends every member tasks through it, and finds by `bisection` whose fault a wrong,
failed or slow all-reduce is. It computes and sends nothing itself, so no node is special. Everybody's last line of
output is the report as one JSON object; exit code 1: a member is itself at fault, the coordinator has found one.
"""

import argparse
import datetime
import json
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from goku_infra.checks.bisection import bisect_nodes, first_round, second_round
from goku_infra.checks.compute_check import wrong_elements
from goku_infra.checks.versions import versions
from goku_infra.errors import OpsError

if TYPE_CHECKING:
    import torch.distributed as dist

CLOCK_ROUNDS = 5
REDUCE_ROUNDS = 5
PRODUCT_SIZE = 512
SLOW_FACTOR = 2.0
"""A node is slow if both its pairs take so many times the median pair (the rule of DLRover's node check)."""
TASK_LIMIT_S = 300.0
"""Longest wait for the next task: others may be waited for, and tested, one after another. A coordinator that ends
takes the store with it, so a wait for one that is dead is short."""
SLOW_FLOOR_S = 0.005
"""Differences below this are the scheduler's, not the link's."""


@dataclass
class Report:
    """What the coordinator has found; ranks are nodes."""

    bad: dict[int, str] = field(default_factory=dict)
    """Nodes at fault, and why."""
    links: list[tuple[int, int]] = field(default_factory=list)
    """Nodes that work, but not with each other."""
    clock_offset_s: dict[int, float] = field(default_factory=dict)
    """Of each node's clock against the median clock."""
    bandwidth_gb_per_s: float | None = None
    """Of the median pair."""
    tests: int = 0
    """Groups tested."""

    @property
    def healthy(self) -> bool:
        return not self.bad and not self.links


def odd_versions(by_rank: Mapping[int, Mapping[str, str]]) -> dict[int, str]:
    """The nodes whose versions differ from those of the most nodes, and what differs."""
    odd: dict[int, list[str]] = {}
    for name in sorted({name for found in by_rank.values() for name in found}):
        count = Counter(found.get(name, "none") for found in by_rank.values())
        usual = count.most_common(1)[0][0]
        for rank, found in by_rank.items():
            if found.get(name, "none") != usual:
                odd.setdefault(rank, []).append(f"{name} {found.get(name, 'none')}, not {usual}")
    return {rank: "has " + "; ".join(texts) for rank, texts in odd.items()}


def clock_offset(exchanges: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """A remote clock against ours, and by how much that may be wrong, from (sent, remote time, received), in seconds.

    The quickest exchange says most: the remote time was read somewhere within it (Cristian's algorithm).
    """
    sent, remote, received = min(exchanges, key=lambda exchange: exchange[2] - exchange[0])
    return remote - (sent + received) / 2, (received - sent) / 2


def member(
    store_address: tuple[str, int], rank: int, *, device: str = "cpu", inject: str = "", timeout_s: float = 60.0
) -> Report:
    """Do as the coordinator says until it ends the check; its report.

    Args:
        device: cpu (gloo) or a GPU (nccl).
        inject: a fault for drills: `corrupt`, `corrupt-with=RANK`, `slow=SECONDS` or `die`.
        timeout_s: for the coordinator to come.

    Raises:
        OpsError: the coordinator cannot be reached.
    """
    store = _connect(store_address, timeout_s, is_host=False)
    _set(store, f"hello/{rank}", versions())
    number = 0
    while True:
        task = json.loads(_get(store, f"task/{rank}/{number}", max(timeout_s, TASK_LIMIT_S)))
        if task["kind"] == "end":
            _set(store, f"ended/{rank}", {})
            return _report_from_json(task["report"])
        if task["kind"] == "clock":
            answer: dict[str, Any] = {"time_s": time.time()}
        elif task["kind"] == "compute":
            begin = time.monotonic()
            answer = {"wrong": wrong_elements(PRODUCT_SIZE, device, "float32"), "seconds": time.monotonic() - begin}
        elif inject == "die":
            raise OpsError("ended by its injected fault")
        else:
            answer = _reduce(store, store_address, rank, task, device, inject)
        _set(store, f"answer/{rank}/{number}", answer)
        number += 1


def coordinate(
    store_address: tuple[str, int],
    world_size: int,
    *,
    bytes_: int = 16 << 20,
    clock_limit_s: float = 1.0,
    group_timeout_s: float = 10.0,
    join_timeout_s: float = 60.0,
) -> Report:
    """Host the store, wait for the members, and find the nodes and links at fault.

    Args:
        bytes_: of one all-reduce.
        clock_limit_s: how far a clock may be from the median.
        group_timeout_s: how long one test of a group may take.
        join_timeout_s: how long members may take to come.

    Raises:
        OpsError: the store's port is taken.
    """
    store = _connect(store_address, join_timeout_s, is_host=True)
    return _Coordinator(store, world_size, bytes_, clock_limit_s, group_timeout_s, join_timeout_s).run()


class _Coordinator:
    def __init__(
        self,
        store: "dist.TCPStore",
        world_size: int,
        bytes_: int,
        clock_limit_s: float,
        group_timeout_s: float,
        join_timeout_s: float,
    ) -> None:
        self._store = store
        self._ranks = list(range(world_size))
        self._bytes = bytes_
        self._clock_limit_s = clock_limit_s
        self._group_timeout_s = group_timeout_s
        self._join_timeout_s = join_timeout_s
        self._numbers = dict.fromkeys(self._ranks, 0)
        self._groups = 0
        self.report = Report()

    def run(self) -> Report:
        self._meet()
        self._check_clocks()
        self._check_compute()
        self._check_collectives()
        if not self.report.links:
            self._check_speed()
        self._end()
        return self.report

    def _alive(self) -> list[int]:
        return [rank for rank in self._ranks if rank in self._numbers]

    def _good(self) -> list[int]:
        return [rank for rank in self._alive() if rank not in self.report.bad]

    def _meet(self) -> None:
        deadline = time.monotonic() + self._join_timeout_s
        found = {}
        for rank in self._ranks:
            hello = _try_get(self._store, f"hello/{rank}", deadline - time.monotonic())
            if hello is None:
                self._lose(rank, "did not come")
            else:
                found[rank] = hello
        self.report.bad.update(odd_versions(found))

    def _check_clocks(self) -> None:
        offsets: dict[int, tuple[float, float]] = {}
        for rank in self._alive():
            exchanges = []
            for _ in range(CLOCK_ROUNDS):
                sent = time.time()
                answer = self._call([rank], {"kind": "clock"}, self._group_timeout_s)[rank]
                if answer is None:
                    break
                exchanges.append((sent, answer["time_s"], time.time()))
            else:
                offsets[rank] = clock_offset(exchanges)
        median = statistics.median_low([offset for offset, _ in offsets.values()] or [0.0])
        for rank, (offset, error) in offsets.items():
            self.report.clock_offset_s[rank] = offset - median
            if abs(offset - median) - error > self._clock_limit_s:
                self._blame(rank, f"has a clock that is {offset - median:+.1f} s off")

    def _check_compute(self) -> None:
        answers = self._call(self._alive(), {"kind": "compute"}, self._join_timeout_s)
        for rank, answer in answers.items():
            if answer is not None and answer["wrong"]:
                self._blame(rank, f"computes wrong: {answer['wrong']} elements of an exact matrix product")

    def _check_collectives(self) -> None:
        """All together; if that fails, whose fault is it."""
        good = self._good()
        verdict = bisect_nodes(good, lambda group: self._passes(list(group))) if len(good) > 1 else None
        if verdict is None:
            return
        for rank in verdict.nodes:
            self._blame(rank, "makes an all-reduce wrong or fail")
        for rank in verdict.unresolved:
            self._blame(rank, "is in a group whose all-reduce fails, but none of its parts does")
        self.report.links = [(first, second) for first, second in verdict.links]

    def _check_speed(self) -> None:
        """Two rounds of pairs at once; slow is who is slow in both."""
        groups = first_round(self._good())
        if len(groups) < 2:
            self._measure(groups)
            return
        seconds = self._measure(groups)
        usual = statistics.median_low(seconds)
        present = [tuple(rank for rank in group if rank in self._numbers) for group in groups]
        again = second_round(present, [not _is_slow(value, usual) for value in seconds])
        for pair, value in zip(again, self._measure(again), strict=True):
            if _is_slow(value, usual):
                self._blame(pair[0], f"is slow: an all-reduce takes {value * 1e3:.0f} ms, others {usual * 1e3:.0f} ms")

    def _measure(self, groups: Sequence[tuple[int, ...]]) -> list[float]:
        """Seconds of one all-reduce in each of these disjoint groups, at once; infinite where it failed."""
        answers = self._reduce([list(group) for group in groups])
        seconds = [
            max(answers[rank]["seconds"] if _is_right(answers[rank]) else float("inf") for rank in group)
            for group in groups
        ]
        finite = [value for value in seconds if value < float("inf")]
        if finite and self.report.bandwidth_gb_per_s is None:
            self.report.bandwidth_gb_per_s = self._bytes / statistics.median_low(finite) / 1e9
        return seconds

    def _passes(self, group: list[int]) -> bool:
        present = [rank for rank in group if rank in self._numbers]
        if len(present) < len(group):
            return False
        return all(map(_is_right, self._reduce([group]).values()))

    def _reduce(self, groups: Sequence[list[int]]) -> dict[int, Any]:
        tasks = {}
        for group in groups:
            self._groups += 1
            task = {"kind": "reduce", "name": str(self._groups), "group": group, "bytes": self._bytes}
            tasks.update({rank: {**task, "timeout_s": self._group_timeout_s} for rank in group})
        self.report.tests = self._groups
        return self._call_each(tasks, self._group_timeout_s * 2)

    def _call(self, ranks: Sequence[int], task: dict[str, Any], timeout_s: float) -> dict[int, Any]:
        return self._call_each(dict.fromkeys(ranks, task), timeout_s)

    def _call_each(self, tasks: Mapping[int, dict[str, Any]], timeout_s: float) -> dict[int, Any]:
        """Give each rank its task and take its answer; a rank that gives none in time is lost."""
        for rank, task in tasks.items():
            _set(self._store, f"task/{rank}/{self._numbers[rank]}", task)
        deadline = time.monotonic() + timeout_s
        answers = {}
        for rank in tasks:
            name = f"answer/{rank}/{self._numbers[rank]}"
            answers[rank] = _try_get(self._store, name, deadline - time.monotonic())
            self._numbers[rank] += 1
        for rank, answer in answers.items():
            if answer is None:
                self._lose(rank, f"gave no answer within {timeout_s:g} s")
        return answers

    def _lose(self, rank: int, reason: str) -> None:
        del self._numbers[rank]
        self._blame(rank, reason)

    def _blame(self, rank: int, reason: str) -> None:
        self.report.bad.setdefault(rank, reason)

    def _end(self) -> None:
        for rank in self._alive():
            _set(self._store, f"task/{rank}/{self._numbers[rank]}", {"kind": "end", "report": asdict(self.report)})
        for rank in self._alive():  # the store goes with this process
            _try_get(self._store, f"ended/{rank}", self._group_timeout_s)


def _is_right(answer: dict[str, Any] | None) -> bool:
    return answer is not None and not answer["error"]


def _is_slow(seconds: float, usual_s: float) -> bool:
    return seconds > SLOW_FACTOR * usual_s and seconds - usual_s > SLOW_FLOOR_S


def _reduce(
    store: "dist.TCPStore", store_address: tuple[str, int], rank: int, task: dict[str, Any], device: str, inject: str
) -> dict[str, Any]:
    """All-reduce known integers with the group's other members: the quickest time, and what was wrong."""
    import torch

    group, count = task["group"], task["bytes"] // 4
    kind, _, argument = inject.partition("=")
    corrupts = kind == "corrupt" or (kind == "corrupt-with" and int(argument) in group)
    place = torch.arange(count, device=device, dtype=torch.float32) % 31
    expected = len(group) * place + sum(group)
    times = []
    try:
        members = _process_group(store, store_address, rank, task, device)
        members.allreduce([torch.zeros(1, device=device)]).wait()
        for _ in range(REDUCE_ROUNDS):
            values = place + rank  # whole numbers: their sum is exact in any order
            if corrupts:
                values[count // 2] += 1
            begin = time.monotonic()
            if kind == "slow":
                time.sleep(float(argument))
            members.allreduce([values]).wait()
            wrong = int((values != expected).sum())  # waits for a GPU, too
            times.append(time.monotonic() - begin)
            if wrong:
                return {"error": f"{wrong} of {count} sums are wrong", "seconds": min(times)}
    except RuntimeError as error:
        return {"error": str(error).partition("\n")[0], "seconds": 0.0}
    return {"error": "", "seconds": min(times)}


def _process_group(
    store: "dist.TCPStore", store_address: tuple[str, int], rank: int, task: dict[str, Any], device: str
) -> Any:
    import torch.distributed as dist

    names = dist.PrefixStore(f"group/{task['name']}", store)
    index, size = task["group"].index(rank), len(task["group"])
    timeout = datetime.timedelta(seconds=task["timeout_s"])
    kind: Any = dist.ProcessGroupGloo if device == "cpu" else dist.ProcessGroupNCCL
    options = kind.Options() if device != "cpu" else kind._Options()
    options._timeout = timeout
    if device == "cpu":
        options._devices = [kind.create_device(hostname=own_address(store_address))]
    return kind(names, index, size, options)


def own_address(store_address: tuple[str, int]) -> str:
    """The address from which this node reaches the store: there others reach it, whatever its name resolves to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(store_address)  # sends nothing
        return probe.getsockname()[0]


def _connect(address: tuple[str, int], timeout_s: float, *, is_host: bool) -> "dist.TCPStore":
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(*address, None, is_host, timeout, wait_for_workers=False)
    except RuntimeError as error:
        doing = "host" if is_host else "reach"
        reason = str(error).partition("\n")[0]
        raise OpsError(f"cannot {doing} the store at {address[0]}:{address[1]}: {reason}") from None


def _set(store: "dist.Store", name: str, value: Mapping[str, Any]) -> None:
    store.set(name, json.dumps(value))


def _get(store: "dist.Store", name: str, timeout_s: float) -> str:
    """The value once it is there.

    Raises:
        OpsError: the coordinator is gone, or silent for `timeout_s`.
    """
    try:
        store.wait([name], datetime.timedelta(seconds=timeout_s))
        return store.get(name).decode()
    except RuntimeError:
        raise OpsError(f"the coordinator of the check was silent for {timeout_s:g} s") from None


def _try_get(store: "dist.Store", name: str, timeout_s: float) -> Any:
    try:
        store.wait([name], datetime.timedelta(seconds=max(timeout_s, 0.001)))
        return json.loads(store.get(name))
    except RuntimeError:
        return None


def _report_from_json(fields: dict[str, Any]) -> Report:
    """JSON has no whole numbers as keys."""
    by_rank = {name: {int(rank): value for rank, value in fields[name].items()} for name in ("bad", "clock_offset_s")}
    return Report(**{**fields, **by_rank, "links": [(first, second) for first, second in fields["links"]]})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m goku_infra.checks.collective_check")
    parser.add_argument("--store", required=True, metavar="HOST:PORT", help="where the coordinator hosts the store")
    parser.add_argument("--world", type=int, required=True, metavar="N", help="how many nodes take part")
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--rank", type=int, help="this node, from 0")
    role.add_argument("--coordinate", action="store_true", help="host the store and lead the check")
    parser.add_argument("--device", default="cpu", help="cpu (gloo) or cuda:INDEX (nccl)")
    parser.add_argument("--bytes", type=int, default=16 << 20, help="of one all-reduce")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for nodes to come")
    parser.add_argument("--inject", default="", help="a fault for drills: corrupt, corrupt-with=RANK, slow=S or die")
    options = parser.parse_args(arguments)
    host, _, port = options.store.rpartition(":")
    try:
        address = (host, int(port))
        if options.coordinate:
            report = coordinate(address, options.world, bytes_=options.bytes, join_timeout_s=options.timeout)
            failed = not report.healthy
        else:
            report = member(
                address, options.rank, device=options.device, inject=options.inject, timeout_s=options.timeout
            )
            failed = options.rank in report.bad or any(options.rank in link for link in report.links)
    except (OpsError, ValueError) as error:
        print(f"collective_check: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**asdict(report), "healthy": report.healthy}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
