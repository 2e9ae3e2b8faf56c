"""goku-ops: what an operator does with a run. A command is a module, named here and imported when it is called."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from goku_infra.errors import OpsError


class Command(NamedTuple):
    """What a command is for, and the functions that read its words and run it."""

    about: str
    module: str
    run: str = "run"
    arguments: str = "add_arguments"


COMMANDS = {
    "run": Command("train on this machine under a supervisor", "goku_infra.node.run", "run", "add_run_arguments"),
    "submit": Command("train on SLURM's nodes under a supervisor", "goku_infra.operating.submit"),
    "status": Command("what a run is doing, and what befell it last", "goku_infra.operating.status"),
    "watch": Command("the same, live", "goku_infra.operating.watch"),
    "incidents": Command(
        "everything that has befallen a run", "goku_infra.operating.show", "run_incidents", "add_incidents"
    ),
    "incident": Command("one incident with its evidence", "goku_infra.operating.show", "run_incident", "add_incident"),
    "logs": Command("what ranks have written", "goku_infra.operating.show", "run_logs", "add_logs"),
    "restart": Command("start all ranks again", "goku_infra.operating.orders", "restart", "add_run_dir"),
    "stop": Command("end a run", "goku_infra.operating.orders", "stop", "add_stop"),
    "drain": Command("take a node out of a run", "goku_infra.operating.orders", "drain", "add_drain"),
    "readmit": Command("let an excluded node train again", "goku_infra.operating.orders", "readmit", "add_node"),
    "approve": Command(
        "do what the supervisor may not do itself", "goku_infra.operating.orders", "approve", "add_approve"
    ),
    "check-node": Command("is this node fit to train?", "goku_infra.checks.node_check"),
    "agent": Command("a node's part of a run; started by SLURM", "goku_infra.node.run", "agent", "add_agent_arguments"),
}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, as goku-mega does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"goku-ops: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 2 for bad input, 130 when interrupted, 141 when nobody reads the output."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except OpsError as error:
        print(f"goku-ops: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return 141


def read(words: list[str]) -> argparse.Namespace:
    """A command line's options, with the command as `command_name`; exits with one line where it makes no sense."""
    parser = OneLineParser(prog="goku-ops", description="Operate goku_mega runs.")
    commands = parser.add_subparsers(dest="command_name", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.about, description=command.about)
        if words[:1] == [name]:  # the other modules need not be imported
            getattr(importlib.import_module(command.module), command.arguments)(own)
    return parser.parse_args(words)


def _run(words: list[str]) -> int:
    options = read(words)
    command = COMMANDS[options.command_name]
    code: int = getattr(importlib.import_module(command.module), command.run)(options)
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
