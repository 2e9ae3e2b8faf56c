"""`goku-ops status`: what a run is doing and what befell it last, in words for people and as JSON for tools.

A supervised run is read from what its controller writes, so that it can be looked at from any node, and after its end;
a run without a supervisor from the heartbeats of its ranks.
"""

import argparse
import json
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from goku_infra.errors import OpsError
from goku_infra.heartbeat import Beat, read_beats, to_json
from goku_infra.messages import ask, read_address, supervisor_folder
from goku_infra.pages.headline import described
from goku_infra.record.incidents import number_ranges, seconds
from goku_infra.record.journal import FILE, read_events

COLUMNS = ("rank", "host", "pid", "alive", "step", "phase", "age_s")
STALE_S = 4.0
"""A controller writes its state every 0.5 s, in a large run a few times less often."""
ASK_LIMIT_S = 2.0
ODD_LINES = 20
RECENT = 3
"""Incidents that the text names; `goku-ops incidents` has all."""
LABEL = 12
"""Width of the first column."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(options: argparse.Namespace) -> int:
    report = status(options.run_dir)
    print(json.dumps(report) if options.json else text(report))
    return 0


def status(run_dir: Path) -> dict[str, Any]:
    """The snapshot of a supervised run with what can be said of it in words, or the ranks of an unsupervised one.

    Both have `supervised`, `status`, `step`, `world_size`, `alive` (how many ranks are) and `ranks`, of which each has
    `rank`, `pid`, `alive` (null: cannot be known), `step` and `phase`.

    Raises:
        OpsError: nothing has ever trained there.
    """
    if not run_dir.is_dir():
        raise OpsError(f"{run_dir} is not a folder; give the run_dir of a `goku-mega train`")
    snapshot, has_controller = _snapshot(run_dir)
    beats = read_beats(run_dir / "heartbeats")
    if snapshot is not None and all(beat.beat_s < snapshot["time_s"] for beat in beats):
        return _supervised(run_dir, snapshot, has_controller)
    if snapshot is None and supervisor_folder(run_dir).is_dir() and not beats:
        raise OpsError(f"the controller of {run_dir} has not written anything yet; look again in a few seconds")
    if not (run_dir / "heartbeats").is_dir():
        raise OpsError(f"{run_dir} has no heartbeats; give the run_dir of a `goku-mega train` that has started")
    return _unsupervised(run_dir, beats)


def text(report: dict[str, Any]) -> str:
    """The report for people: how the run is and what happened last come first."""
    if not report["supervised"]:
        return _table(report)
    lines = [report["headline"], report["last_event"], ""]
    if not report["controller"]["alive"] and report["status"] != "finished":
        lines.insert(0, _without_controller(report))
    lines += [*_figures(report), *_nodes(report), *_ranks(report), *_requests(report), *_recent(report)]
    return "\n".join(lines)


def _snapshot(run_dir: Path) -> tuple[dict[str, Any] | None, bool]:
    """The newest word of the controller, and whether there is one that could say another.

    Where the file is old, the controller is asked: a clock may be wrong, or the file system slow.
    """
    path = supervisor_folder(run_dir) / "state.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None, False
    except (OSError, ValueError) as error:
        raise OpsError(f"{path} cannot be read: {error}") from None
    if found["status"] == "finished" or abs(time.time() - found["time_s"]) <= STALE_S:
        return found, found["status"] != "finished"
    with suppress(OpsError, OSError):
        return dict(ask(run_dir, "state", timeout_s=ASK_LIMIT_S)["state"]), True
    return found, False


def _supervised(run_dir: Path, snapshot: dict[str, Any], has_controller: bool) -> dict[str, Any]:
    address = read_address(supervisor_folder(run_dir)) or {}
    controller = {
        "alive": has_controller,
        "age_s": round(time.time() - snapshot["time_s"], 3),
        "host": address.get("host"),
        "port": address.get("port"),
    }
    snapshot["outcome"] = None if has_controller else _outcome(run_dir)
    for rank in snapshot["ranks"]:
        rank["alive"] = _is_alive(rank) if has_controller else False if snapshot["status"] == "finished" else None
    ranks = snapshot["ranks"]
    report = described(snapshot) | {"supervised": True, "controller": controller, "world_size": len(ranks)}
    return report | {"alive": sum(rank["alive"] is True for rank in ranks)}


def _is_alive(rank: dict[str, Any]) -> bool:
    return rank["exit_code"] is None and rank["process_state"] not in ("-", "Z")


def _outcome(run_dir: Path) -> dict[str, Any] | None:
    """How a run that has no controller any more has ended: {status, reason, exit_code}; None if it did not say."""
    events = read_events(supervisor_folder(run_dir) / FILE)
    ends = [event for event in events[-1:] if event.kind == "finished"]
    return {name: ends[0].data[name] for name in ("status", "reason", "exit_code")} if ends else None


def _unsupervised(run_dir: Path, beats: list[Beat]) -> dict[str, Any]:
    ranks = [to_json(beat) for beat in beats]
    world_size = max(beats, key=lambda beat: beat.beat_s).world_size if beats else 0
    alive = {rank["alive"] for rank in ranks}
    how = "running" if True in alive else "unknown" if None in alive else "dead" if alive else "ended"
    return {
        "run_dir": str(run_dir),
        "supervised": False,
        "status": how,
        "world_size": world_size,
        "alive": sum(rank["alive"] is True for rank in ranks),
        "step": max((beat.step for beat in beats), default=None),
        "silent_ranks": sorted(set(range(world_size)) - {beat.rank for beat in beats}),
        "ranks": ranks,
    }


def _without_controller(report: dict[str, Any]) -> str:
    job = report["job_id"]
    look = "look whether `goku-ops run` is still there" if job.startswith("local-") else f"try squeue --job {job}"
    if report["outcome"] and report["outcome"]["status"] == "requeued":
        return f"back in SLURM's queue ({report['outcome']['reason']}); squeue --job {job}; below is how it was"
    return (
        f"no controller: it does not answer, its last word is {seconds(report['controller']['age_s'])} old; an agent "
        f"would start another within seconds, so {look}; below is how the run was"
    )


def _figures(report: dict[str, Any]) -> list[str]:
    saved = f"saved {report['committed_step']:,}" if report["committed_step"] >= 0 else "nothing saved yet"
    furthest = f", furthest {report['highest_step']:,}" if report["highest_step"] > (report["step"] or 0) else ""
    training = [
        f"{name} {report[key]:,.4g}" for name, key in (("loss", "loss"), ("gradient norm", "gradient_norm"))
        if report[key] is not None
    ]  # fmt: skip
    speed = [
        f"{_speed(report[key])} {name}/s" for name, key in (("tokens", "tokens_per_s"), ("samples", "samples_per_s"))
        if report[key] is not None
    ]  # fmt: skip
    accounts = {kind: spent for kind, spent in report["accounts"].items() if spent >= 0.01}
    parts = ", ".join(f"{kind.replace('_', ' ')} {seconds(spent)}" for kind, spent in accounts.items())
    total = seconds(sum(accounts.values()))
    return [
        _line("step", f"{report['step'] or 0:,} ({saved}{furthest})"),
        *([_line("training", ", ".join(training + speed))] if training or speed else []),
        _line("goodput", f"{report['goodput']:.1%} of {total}" + (f": {parts}" if parts else "")),
    ]


def _nodes(report: dict[str, Any]) -> list[str]:
    by_role: dict[str, list[str]] = defaultdict(list)
    for node in report["nodes"]:
        by_role[node["role"]].append(node["name"])
    lines = [f"{len(names)} {role} ({_few(names)})" for role, names in by_role.items()]
    odd = [_line("", f"{name}: {reason}") for name, reason in report["odd_nodes"].items()]
    return [_line("nodes", ", ".join(lines) or "none yet"), *odd]


def _ranks(report: dict[str, Any]) -> list[str]:
    """The healthy ones in one line, the odd ones in a line each, or each group with the same words."""
    if report["status"] == "finished":
        return []
    odd: dict[int, str] = report["odd_ranks"]
    by_rank = {rank["rank"]: rank for rank in report["ranks"]}
    healthy: dict[str, list[int]] = defaultdict(list)
    for number, rank in by_rank.items():
        if number not in odd:
            healthy[rank["phase"]].append(number)
    groups: dict[str, list[int]] = defaultdict(list)
    for number in sorted(odd, key=lambda number: (not odd[number].startswith("at fault"), number)):
        groups[odd[number]].append(number)
    phases = ", ".join(f"{number_ranges(numbers)} in {phase}" for phase, numbers in healthy.items())
    count = sum(map(len, healthy.values()))
    lines = [_line("ranks", f"{count} of {len(by_rank)} healthy" + (f": {phases}" if phases else ""))]
    for reason, numbers in list(groups.items())[:ODD_LINES]:
        lines.append(_line("", _odd_line(numbers, reason, by_rank)))
    if len(groups) > ODD_LINES:
        lines.append(_line("", f"and {len(groups) - ODD_LINES} more such lines; --json has every rank"))
    return lines if by_rank else []


def _odd_line(numbers: list[int], reason: str, by_rank: dict[int, dict[str, Any]]) -> str:
    if len(numbers) > 1:
        return f"ranks {number_ranges(numbers)}: {reason}"
    rank = by_rank[numbers[0]]
    where = f"on {rank['node']}, pid {rank['pid']}"
    return f"rank {rank['rank']} ({where}): {reason}; step {rank['step']:,}, {rank['phase']}"


def _requests(report: dict[str, Any]) -> list[str]:
    return [_line("to approve", f"{row['text']}: {row['command']}") for row in report["requests"]]


def _recent(report: dict[str, Any]) -> list[str]:
    """The newest incidents, and where the evidence of the last one is."""
    if not report["incidents"]:
        return []
    newest = report["incidents"][-RECENT:]
    lines = [incident["sentence"] for incident in newest if not report["last_event"].endswith(incident["sentence"])]
    last = newest[-1]["number"]
    more = f"; all: goku-ops incidents {report['run_dir']}" if last > 1 else ""
    evidence = f"goku-ops incident {report['run_dir']} {last}{more}"
    return [*(_line("earlier", line) for line in reversed(lines)), _line("evidence", evidence)]


def _line(label: str, words: str) -> str:
    return f"{label:<{LABEL}}{words}"


def _few(names: list[str], limit: int = 8) -> str:
    return " ".join(names) if len(names) <= limit else f"{names[0]} ... {names[-1]}"


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(report: dict[str, Any]) -> str:
    """One line a rank."""
    if not report["ranks"]:
        return f"{report['run_dir']}: no rank is running; the run has ended, or has not taken a step yet"
    rows = [COLUMNS, *(tuple(_cell(rank[name]) for name in COLUMNS) for rank in report["ranks"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if report["silent_ranks"]:
        lines.append(f"no beat yet from rank {', '.join(map(str, report['silent_ranks']))}")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return {True: "yes", False: "no", None: "?"}[value] if value is None or isinstance(value, bool) else str(value)
