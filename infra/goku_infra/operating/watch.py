"""`goku-ops watch`: the status of a run, live; where there is no terminal, a line whenever something new is to be said.

Needs `rich` for a terminal; without it, it speaks in lines there too.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from goku_infra.operating.status import status, text

PERIOD_S = 1.0
STYLES = {
    "running": "bold green", "finished": "bold", "ended": "bold", "unknown": "bold", "dead": "bold red",
    "waiting": "bold yellow", "starting": "bold yellow", "stopping": "bold yellow", "recovering": "bold red",
}  # fmt: skip
OVER = ("finished", "ended", "dead")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--period", type=float, default=PERIOD_S, metavar="S", help=f"default {PERIOD_S:g}")


def run(options: argparse.Namespace) -> int:
    """Until the run has finished or the operator leaves."""
    reports = _reports(options.run_dir, max(options.period, 0.1))
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _live(reports)
    else:
        _in_lines(reports)
    return 0


def _reports(run_dir: Path, period_s: float) -> Iterator[dict[str, Any]]:
    while True:
        report = status(run_dir)
        yield report
        if report["status"] in OVER:
            return
        time.sleep(period_s)


def _in_lines(reports: Iterator[dict[str, Any]]) -> None:
    """The whole at first and at the end, between them what is new."""
    first = report = next(reports)
    print(text(first), flush=True)
    said = _news(first)
    for report in reports:
        news = _news(report)
        if news != said:
            print(f"{time.strftime('%H:%M:%S')} {_in_a_line(report)}", flush=True)
        said = news
    if report is not first:
        print(text(report), flush=True)


def _news(report: dict[str, Any]) -> tuple[Any, ...]:
    """What is worth a line when it changes; ages and steps are not."""
    if not report["supervised"]:
        return report["status"], report["alive"], report["world_size"]
    incidents = [incident["sentence"] for incident in report["incidents"][-1:]]
    return report["status"], report["reason"], report["controller"]["alive"], tuple(report["odd_ranks"]), incidents


def _in_a_line(report: dict[str, Any]) -> str:
    if not report["supervised"]:
        return f"{report['status']}: {report['alive']} of {report['world_size']} ranks alive"
    return f"{report['headline']}; {report['last_event']}"


def _live(reports: Iterator[dict[str, Any]]) -> None:
    from rich.live import Live

    report: dict[str, Any] = {}
    with Live(screen=True, auto_refresh=False) as live:
        for report in reports:
            live.update(_styled(report), refresh=True)
    print(text(report))  # what stays on the terminal


def _styled(report: dict[str, Any]) -> Any:
    from rich.text import Text

    lines = text(report).splitlines()
    shown = Text("\n".join(lines), no_wrap=False)
    shown.stylize(STYLES[report["status"]], 0, len(lines[0]))
    for words in (*report.get("odd_ranks", {}).values(), *report.get("odd_nodes", {}).values()):
        shown.highlight_words([words], "red")
    return shown
