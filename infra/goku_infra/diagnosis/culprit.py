"""Who is at fault and who only waits: what is known of the ranks and their stacks in, one finding out.

A fault stops every rank of a run within a step, because all wait in a collective for the one that does not come. So
the question is never who stands still, but who stands still elsewhere: stopped or dead, silent while holding Python's
lock, at work or asleep outside of collectives, or in another collective than the rest.
"""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from goku_infra.diagnosis import logs
from goku_infra.diagnosis.stacks import ENDED, FRAME_OF_FAULTHANDLER, FRAME_OF_PY_SPY, SOURCE_MARK, STOPPED
from goku_infra.heartbeat import WAITS_BY, WAITS_IN
from goku_infra.record.incidents import number_ranges
from goku_infra.views import Finding, RankView

SILENT_S = 1.0
"""A liveness thread beats every 50 ms; one that has not run for so long is kept from it."""
SILENT_FACTOR = 5.0
"""How much longer than the others' a silence must be: a busy machine silences all alike."""
ORDER = ("start", "load", "checkpoint", "data", "forward", "backward", "optimizer", "leave")
"""Phases of ranks that have done equally many steps, the one furthest back first: a save follows its step."""
READ_IN_FULL = 32
"""Of very many ranks that have ended, whose last words are read: it takes a millisecond each."""
LAST_WORDS = 10
"""Lines in which a rank says that it has lost another."""
LISTED = 16
"""Ranks up to which a text names every one."""
SECTIONS = ("py-spy", "faulthandler")
"""Parts of a file of stacks that hold Python frames, the better first."""
MAIN_THREAD_OF_PY_SPY = '"MainThread"'


class Frame(NamedTuple):
    """One call of a stack."""

    function: str
    file: str
    line: int
    source: str = ""
    """The line of code; empty where it could not be read."""


Stack = tuple[Frame, ...]
"""Innermost first."""


def blame(ranks: Sequence[RankView], stacks: Mapping[int, str]) -> Finding:
    """Name the ranks at fault when a run stands still.

    Args:
        ranks: what is known of every rank of the generation.
        stacks: texts of `stacks.dump`, by rank; those that could not be had are missing.

    Returns:
        A finding whose `ranks` are the culprits. They are empty when all wait in the same collective: then the fault
        is between them (the network), or on a rank that nothing is known of.
    """
    for test in (_ended, _stopped, _unkillable, _silent):
        finding = test(ranks)
        if finding:
            return finding
    found = {rank: main_thread(text) for rank, text in stacks.items()}
    found = {rank: stack for rank, stack in found.items() if stack}
    waiting = {rank for rank, stack in found.items() if waits_for_others(stack)}
    return (
        _outside_collectives(ranks, found, waiting)
        or _other_collective(ranks, {rank: found[rank] for rank in waiting}, stacks)
        or _behind(ranks, found)
    )


def first_cause(ranks: Sequence[RankView]) -> Finding:
    """Of ranks that have ended within a moment, the ones that brought the others down.

    A rank that lost a connection, waited in vain or was told to end comes last; then the one that ended first.
    """
    ended = [rank for rank in ranks if rank.exit_code is not None or rank.process_state in ENDED]
    if len(ended) > READ_IN_FULL:
        ended = sorted(ended, key=_lost_a_peer)[:READ_IN_FULL]
    if not ended:
        return Finding(cause="unknown", detail="no rank has ended")
    told = {rank.rank: logs.classify(_code(rank), rank.last_lines) for rank in ended}
    culprits = sorted((rank for rank in ended if not _is_symptom(rank)), key=lambda rank: _weight(told, rank))
    if not culprits:
        first = max(ended, key=lambda rank: rank.alive_age_s)
        cause, detail = told[first.rank]
        text = f"rank {_list(rank.rank for rank in ended)} failed for others, none of which is known: {detail}"
        return Finding(cause=cause, detail=text, fault_age_s=first.alive_age_s)
    first = culprits[0]
    cause, detail = told[first.rank]
    alike = tuple(sorted(rank.rank for rank in culprits if told[rank.rank][0] == cause))
    if cause == "killed":
        alike = (first.rank,)
    record = logs.fault_record(first.last_lines)
    if record.get("ranks") or cause == "nan_loss":  # all ranks find these together, and say whose they are
        alike = tuple(record.get("ranks", ()))
    node = next((rank.node for rank in ranks if rank.rank in alike[:1]), "")
    return Finding(
        cause=cause, ranks=alike, node=node, detail=detail, fault_age_s=first.alive_age_s, data=record
    )  # fmt: skip


def main_thread(text: str) -> Stack:
    """The main thread's Python stack of a text by `stacks.dump`; empty if there is none."""
    parts = _sections(text)
    for name in SECTIONS:
        stack = _parse(parts.get(name, ""))
        if stack:
            return stack
    return ()


def waits_for_others(stack: Stack) -> bool:
    """Whether a main thread is in a collective, by the same signs as the rank's own liveness thread."""
    return bool(stack) and (stack[0].file.endswith(WAITS_IN) or any(words in stack[0].source for words in WAITS_BY))


def collective(stack: Stack) -> tuple[str, str]:
    """Which collective a waiting main thread is in, and where it was called: "all_reduce", "step (loop.py:95)"."""
    inside = list(itertools.takewhile(_is_library, stack))
    names = [frame.function for frame in inside if frame.file.endswith(WAITS_IN)]
    caller = stack[min(len(inside), len(stack) - 1)]
    name = names[-1] if names else stack[0].source or stack[0].function
    return name, f"{caller.function} ({_short(caller.file)}:{caller.line})"


def _ended(ranks: Sequence[RankView]) -> Finding | None:
    failed = [rank for rank in ranks if rank.exit_code is not None or rank.process_state in ENDED]
    return first_cause(failed) if failed else None


def _stopped(ranks: Sequence[RankView]) -> Finding | None:
    stopped = [rank for rank in ranks if rank.process_state in STOPPED]
    word = "a debugger holds it" if stopped and stopped[0].process_state == "t" else "it got SIGSTOP"
    return _finding("stopped_process", stopped, f"process {_pids(stopped)} is stopped: {word}")


def _unkillable(ranks: Sequence[RankView]) -> Finding | None:
    stuck = [rank for rank in ranks if rank.process_state == "D"]
    if len({rank.node for rank in stuck}) > 1:  # no fault of a node: each of them would be taken out in turn
        where = f"rank {_list(rank.rank for rank in stuck)} waits in the kernel on several nodes"
        finding = _finding("hang", stuck, f"{where}, probably for a shared file system")
        return finding and replace(finding, node="")
    return _finding("unkillable", stuck, f"process {_pids(stuck)} is in an uninterruptible call of the kernel")


def _silent(ranks: Sequence[RankView]) -> Finding | None:
    usual = statistics.median_low(rank.alive_age_s for rank in ranks) if len(ranks) > 1 else 0.0
    limit = max(SILENT_S, SILENT_FACTOR * usual)
    silent = [rank for rank in ranks if rank.alive_age_s > limit and rank.phase != "start"]  # it may not have begun
    return _finding("locked", silent, f"process {_pids(silent)} runs one call that keeps Python's lock")


def _outside_collectives(
    ranks: Sequence[RankView], found: Mapping[int, Stack], waiting: set[int]
) -> Finding | None:  # fmt: skip
    outside = [rank for rank in ranks if rank.rank in found and rank.rank not in waiting]
    if not outside:
        return None
    furthest_back = min(_place(rank) for rank in outside)
    outside = [rank for rank in outside if _place(rank) == furthest_back]  # others are on their way to the collective
    where = "; ".join(dict.fromkeys(_where(found[rank.rank]) for rank in outside))
    waits = f"; rank {_list(waiting)} waits" if waiting else ""
    return _finding("hang", outside, f"{_phase(outside[0])}: {where}{waits}")


def _other_collective(
    ranks: Sequence[RankView], found: Mapping[int, Stack], stacks: Mapping[int, str]
) -> Finding | None:
    """All wait: the few that wait for something else than the many."""
    for kind in (_recorded(stacks), {rank: collective(stack) for rank, stack in found.items()}):
        kinds = {rank: kind[rank] for rank in found if rank in kind}
        counts = Counter(kinds.values()).most_common()
        if len(counts) < 2:
            continue
        usual = counts[0][0]
        tied = counts[0][1] == counts[1][1]
        odd = [rank for rank in ranks if rank.rank in kinds and (tied or kinds[rank.rank] != usual)]
        by_kind: dict[tuple[str, str], list[int]] = {name: [] for name, _ in counts}
        for number, name in kinds.items():
            by_kind[name].append(number)
        texts = (f"rank {_list(numbers)} in {' of '.join(name)}" for name, numbers in by_kind.items())
        return _finding("other_collective", odd, "; ".join(texts))
    return None


def _behind(ranks: Sequence[RankView], found: Mapping[int, Stack]) -> Finding:
    """Without stacks that tell, the ranks that have come least far."""
    silent = [rank for rank in ranks if rank.rank not in found]
    furthest_back = min((_place(rank) for rank in ranks), default=(0, 0))
    behind = [rank for rank in (silent if found else ranks) if _place(rank) == furthest_back]
    if behind and len(behind) < len(ranks):
        return _finding("hang", behind, f"furthest back, {_phase(behind[0])}") or Finding(cause="hang")
    age_s = min((rank.phase_age_s for rank in ranks), default=0.0)
    if found:
        waits = " of ".join(collective(next(iter(found.values()))))
        return Finding(cause="hang", detail=f"all ranks wait in {waits}: the network between them", fault_age_s=age_s)
    return Finding(cause="hang", detail="all ranks stand still at the same place", fault_age_s=age_s)


def _finding(cause: str, ranks: Sequence[RankView], detail: str) -> Finding | None:
    if not ranks:
        return None
    age_s = max(rank.alive_age_s if cause in ("stopped_process", "locked") else rank.phase_age_s for rank in ranks)
    numbers = tuple(sorted(rank.rank for rank in ranks))
    return Finding(cause=cause, ranks=numbers, node=ranks[0].node, detail=detail, fault_age_s=age_s)


def _recorded(stacks: Mapping[int, str]) -> dict[int, tuple[str, str]]:
    """The collective that each rank entered last in the process group that all have, by torch's flight recorder."""
    last = {rank: _last_entries(_sections(text).get("flight recorder", "")) for rank, text in stacks.items()}
    last = {rank: entries for rank, entries in last.items() if entries}
    shared = set.intersection(*(set(entries) for entries in last.values())) if last else set()
    for group in sorted(shared):
        kinds = {rank: entries[group] for rank, entries in last.items()}
        if len(set(kinds.values())) > 1:
            return kinds
    return {}


def _last_entries(text: str) -> dict[str, tuple[str, str]]:
    """Process group -> (collective, "number N") of the newest entry; {} if the text is no record."""
    try:
        entries: list[dict[str, Any]] = json.loads(text)["entries"] if text.strip() else []
    except (ValueError, KeyError, TypeError):
        return {}
    newest: dict[str, tuple[str, str]] = {}
    for entry in sorted(entries, key=lambda entry: entry["record_id"]):
        if not entry["is_p2p"]:
            name = f"{entry['profiling_name']} {entry['input_sizes']}"
            # gloo and NCCL count the collectives of a group each for itself.
            backend = entry["profiling_name"].partition(":")[0]
            newest[f"{entry['process_group'][0]} {backend}"] = (name, f"number {entry['collective_seq_id']}")
    return newest


def _sections(text: str) -> dict[str, str]:
    parts: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("== ") and line.endswith(" =="):
            name = line[3:-3]
        parts.setdefault(name, []).append(line)
    return {name: "\n".join(lines[1:]) for name, lines in parts.items()}


def _parse(text: str) -> Stack:
    """py-spy names the main thread; faulthandler writes it last, because it is the oldest."""
    threads: list[tuple[str, list[Frame]]] = []
    for line in text.splitlines():
        frame = FRAME_OF_PY_SPY.match(line) or FRAME_OF_FAULTHANDLER.match(line)
        if frame and threads:
            source = line.partition(SOURCE_MARK)[2]
            threads[-1][1].append(Frame(frame["function"], frame["file"], int(frame["line"]), source))
        elif line.startswith(("Thread ", "Current thread ")):
            threads.append((line, []))
    named = [frames for title, frames in threads if MAIN_THREAD_OF_PY_SPY in title]
    stacks = named or [frames for _, frames in reversed(threads)]
    return tuple(stacks[0]) if stacks else ()


def _is_library(frame: Frame) -> bool:
    return any(folder in frame.file for folder in ("/torch/distributed/", "/torch/cuda/", "/torch/_"))


def _where(stack: Stack) -> str:
    frame = stack[0]
    source = f": {frame.source}" if frame.source else ""
    return f"{frame.function} ({_short(frame.file)}:{frame.line}){source}"


def _short(file: str) -> str:
    return "/".join(file.split("/")[-2:])


def _phase(rank: RankView) -> str:
    if rank.phase in ("start", "load", "leave"):
        return f"in {rank.phase}"
    return (
        f"in checkpoint of step {rank.step}"
        if rank.phase == "checkpoint"
        else f"in {rank.phase} of step {rank.step + 1}"
    )


def _place(rank: RankView) -> tuple[int, int]:
    return rank.step, ORDER.index(rank.phase)


def _code(rank: RankView) -> int:
    """A process that is gone without a word was killed."""
    return -9 if rank.exit_code is None else rank.exit_code


def _is_symptom(rank: RankView) -> bool:
    return logs.is_symptom(_code(rank), rank.last_lines)


def _lost_a_peer(rank: RankView) -> bool:
    return any(logs.LOST_PEER.search(line) for line in rank.last_lines[-LAST_WORDS:])


def _weight(told: Mapping[int, tuple[str, str]], rank: RankView) -> tuple[bool, bool, float]:
    """What tells most comes first: a reason before a bare SIGKILL before an early end, then the earliest."""
    cause = told[rank.rank][0]
    return cause == "early_exit", cause == "killed", -rank.alive_age_s


def _pids(ranks: Sequence[RankView]) -> str:
    return _list(rank.pid for rank in ranks)


def _list(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    return number_ranges(numbers) if len(numbers) > LISTED else ", ".join(map(str, numbers))
