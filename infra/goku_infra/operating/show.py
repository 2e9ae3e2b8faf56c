"""`goku-ops incidents`, `incident` and `logs`: what a supervised run has written down, also long after its end."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from goku_infra.errors import OpsError
from goku_infra.messages import supervisor_folder
from goku_infra.node.observe import LAST_LINES
from goku_infra.record.incidents import Incident, incidents, seconds, sentence
from goku_infra.record.journal import FILE, Event, read_events

COLUMNS = ("number", "when", "cause", "who", "found in", "back in", "steps lost", "status")
EVIDENCE_LINES = 30
"""Of each rank at fault; the files have the rest."""
POLL_S = 0.2
BLOCK_BYTES = 64 * 1024


def add_incidents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def add_incident(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("number", type=int, metavar="NUMBER", help="as `goku-ops incidents` lists it")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def add_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="default 0")
    parser.add_argument("--generation", type=int, metavar="G", help="which start of the ranks (default: the newest)")
    parser.add_argument("-n", "--lines", type=int, default=LAST_LINES, metavar="N", help=f"default {LAST_LINES}")
    parser.add_argument("--follow", action="store_true", help="go on, over restarts, until the run has finished")


def run_incidents(options: argparse.Namespace) -> int:
    found = incidents(_events(options.run_dir))
    if options.json:
        print(json.dumps({"incidents": [_as_json(options.run_dir, incident) for incident in found]}))
    else:
        print(_table(found) if found else "no incident so far")
    return 0


def run_incident(options: argparse.Namespace) -> int:
    found = {incident.number: incident for incident in incidents(_events(options.run_dir))}
    if options.number not in found:
        raise OpsError(f"there is no incident {options.number}; there are {len(found)}: goku-ops incidents lists them")
    incident = found[options.number]
    if options.json:
        print(json.dumps(_as_json(options.run_dir, incident)))
    else:
        print("\n".join([sentence(incident), "", *_timeline(incident), "", *_evidence(options.run_dir, incident)]))
    return 0


def run_logs(options: argparse.Namespace) -> int:
    if options.lines < 0:
        raise OpsError(f"-n is a number of lines from 0, not {options.lines}")
    path = _log(options.run_dir, options.rank, options.generation)
    _heading(path)
    for line in last_lines_of(path, options.lines):
        print(line)
    if options.follow:
        _follow(options, path)
    return 0


def _events(run_dir: Path) -> list[Event]:
    path = supervisor_folder(run_dir) / FILE
    if not path.exists():
        raise OpsError(f"{run_dir} has no journal; give the run_dir of a run started by `goku-ops run` or `submit`")
    return read_events(path)


def _folder(run_dir: Path, incident: Incident) -> Path:
    return supervisor_folder(run_dir) / "incidents" / f"{incident.number:04d}"


def _as_json(run_dir: Path, incident: Incident) -> dict[str, object]:
    return {**asdict(incident), "sentence": sentence(incident), "folder": str(_folder(run_dir, incident))}


def _table(found: list[Incident]) -> str:
    rows = [COLUMNS, *(_row(incident) for incident in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(incident: Incident) -> tuple[str, ...]:
    ranks = ", ".join(f"rank {rank}" for rank in incident.ranks[:3]) + (" ..." if len(incident.ranks) > 3 else "")
    who = f"{ranks} on {incident.node}" if ranks and incident.node else ranks or incident.node or "the run"
    back = None if incident.recovered_s is None else incident.recovered_s - incident.fault_s
    return (
        str(incident.number),
        time.strftime("%m-%d %H:%M:%S", time.localtime(incident.fault_s)),
        incident.cause,
        who,
        seconds(incident.detected_s - incident.fault_s),
        "-" if back is None else seconds(back),
        "-" if incident.lost_steps is None else f"{incident.lost_steps:,}",
        incident.status,
    )


def _timeline(incident: Incident) -> list[str]:
    """What happened when: the time of day, and seconds since the fault."""
    moments = [(incident.fault_s, "last sign of health"), (incident.detected_s, "found")]
    if incident.blamed_s is not None:
        detail = f": {incident.detail}" if incident.detail else ""
        moments.append((incident.blamed_s, f"blamed: {incident.text}{detail}"))
    for at_s, action, reason in incident.actions:
        is_new = reason and reason != f"{incident.text}: {incident.detail}"
        moments.append((at_s, f"{action}: {reason}" if is_new else action))
    if incident.restarted_s is not None:
        moments.append((incident.restarted_s, "ranks started"))
    if incident.recovered_s is not None:
        since = "" if incident.resumed_step is None else f", resumed from step {incident.resumed_step:,}"
        moments.append((incident.recovered_s, f"training again{since}"))
    return [
        f"{time.strftime('%H:%M:%S', time.localtime(at_s))}  {at_s - incident.fault_s:+8.2f} s  {words}"
        for at_s, words in sorted(moments, key=lambda moment: moment[0])
    ]


def _evidence(run_dir: Path, incident: Incident) -> list[str]:
    """Where the files are, and of the ranks at fault what stands in them."""
    folder = _folder(run_dir, incident)
    names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    if not names:
        return ["no evidence was kept"]
    lines = [f"{len(names)} files of evidence in {folder}"]
    guilty = [name for name in names for rank in incident.ranks if f"_rank_{rank:05d}." in name]
    for name in guilty:
        content = (folder / name).read_text(errors="replace").splitlines()
        told = content[-EVIDENCE_LINES:] if name.startswith("log_") else _stacks(content)[:EVIDENCE_LINES]
        lines += ["", f"== {name}: {len(told)} of {len(content)} lines", *told]
    return lines


def _stacks(content: list[str]) -> list[str]:
    """Of a file that `stacks.dump` has written, who it is about and the stacks; what the kernel said is for experts."""
    told, is_kernel = [], False
    for line in content:
        if line.startswith("== "):
            is_kernel = line.startswith("== /proc/")
        if not is_kernel:
            told.append(line)
    return told


def _log(run_dir: Path, rank: int, generation: int | None) -> Path:
    """A rank's log, by default of the newest generation that has one."""
    logs = supervisor_folder(run_dir) / "logs"
    name = f"rank_{rank:05d}.log"
    if generation is not None:
        path = logs / f"g{generation:04d}" / name
        if not path.exists():
            raise OpsError(f"there is no log of rank {rank} in generation {generation}: {path} is missing")
        return path
    newest = _newest_log(logs, name)
    if newest is None:
        if not logs.is_dir():
            raise OpsError(f"{run_dir} has no logs: only `goku-ops run` and `submit` keep what ranks write")
        raise OpsError(f"there is no log of rank {rank} in {logs}")
    return newest


def _newest_log(logs: Path, name: str) -> Path | None:
    return max(logs.glob(f"g*/{name}"), key=lambda path: int(path.parent.name[1:]), default=None)


def _heading(path: Path) -> None:
    print(f"== {path}", file=sys.stderr)


def last_lines_of(path: Path, count: int) -> list[str]:
    """The last lines of a file, read from its end: logs of months are long."""
    with path.open("rb") as file:
        end, data = file.seek(0, 2), b""
        while end and data.count(b"\n") <= count:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            data, end = file.read(end - start) + data, start
    lines = data.decode(errors="replace").splitlines()
    return lines[max(0, len(lines) - count) :]


def _follow(options: argparse.Namespace, path: Path) -> None:
    offset = path.stat().st_size
    while True:
        finished = _has_finished(options.run_dir)
        for block in _written_since(path, offset):
            sys.stdout.buffer.write(block)
            offset += len(block)
        sys.stdout.flush()
        newest = path if options.generation is not None else _log(options.run_dir, options.rank, None)
        if newest != path:
            path, offset = newest, 0
            _heading(path)
        elif finished:
            return
        else:
            time.sleep(POLL_S)


def _written_since(path: Path, offset: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(BLOCK_BYTES):
            yield block


def _has_finished(run_dir: Path) -> bool:
    try:
        state = json.loads((supervisor_folder(run_dir) / "state.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(state["status"] == "finished")
