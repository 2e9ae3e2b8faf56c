"""goku-ops: what an operator asks of a run. Needs neither torch nor goku_mega."""

import argparse
import json
import sys
from pathlib import Path

from goku_infra.status import StatusError, format_table, status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="goku-ops", description="Operate goku_mega runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("status", help="what every rank of a run is doing")
    show.add_argument("run_dir", type=Path, help="the run_dir of `goku-mega train`")
    show.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    try:
        report = status(options.run_dir)
    except StatusError as error:
        print(f"goku-ops: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else format_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
