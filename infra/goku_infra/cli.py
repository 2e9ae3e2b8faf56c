"""goku-ops: what an operator asks of a run. Needs neither torch nor goku_mega."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from goku_infra.status import StatusError, format_table, status


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, as goku-mega does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"goku-ops: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad input, 141 when nobody reads the output."""
    options = _parser().parse_args(arguments)
    try:
        report = status(options.run_dir)
        print(json.dumps(report) if options.json else format_table(report), flush=True)
        return 0
    except StatusError as error:
        print(f"goku-ops: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="goku-ops", description="Operate goku_mega runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("status", help="what every rank of a run is doing")
    show.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run_dir of `goku-mega train`")
    show.add_argument("--json", action="store_true", help="one JSON object, the last line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
