"""`goku-ops restart`, `stop`, `drain`, `readmit` and `approve`: what an operator tells a running controller."""

import argparse
import getpass
from pathlib import Path

from goku_infra import slurm
from goku_infra.errors import OpsError
from goku_infra.messages import ask


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")


def add_stop(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("--save", action="store_true", help="let the ranks save a checkpoint first")
    parser.add_argument("--requeue", action="store_true", help="and put the job back into SLURM's queue")


def add_node(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("node", metavar="NODE")


def add_drain(parser: argparse.ArgumentParser) -> None:
    add_node(parser)
    parser.add_argument("reason", metavar="REASON", help="what SLURM and the journal say")


def add_approve(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("request", type=int, metavar="NUMBER", help="as `goku-ops status` lists it")
    parser.add_argument("--refuse", action="store_true", help="do not do it, and do not ask again")


def restart(options: argparse.Namespace) -> int:
    print(ask(options.run_dir, "restart")["text"])
    return 0


def stop(options: argparse.Namespace) -> int:
    print(ask(options.run_dir, "stop", save=options.save, requeue=options.requeue)["text"])
    return 0


def drain(options: argparse.Namespace) -> int:
    print(ask(options.run_dir, "drain", node=options.node, reason=options.reason)["text"])
    return 0


def readmit(options: argparse.Namespace) -> int:
    ask(options.run_dir, "readmit", node=options.node)
    print(f"{options.node} may train again, from the next start of the ranks on")
    return 0


def approve(options: argparse.Namespace) -> int:
    """Do what a supervisor without rights has asked for, with the rights of whoever calls this."""
    requests = {row["request"]: row for row in ask(options.run_dir, "state")["state"]["requests"]}
    if options.request not in requests:
        known = ", ".join(map(str, sorted(requests))) or "none"
        raise OpsError(f"there is no open request {options.request}; open: {known}")
    request = requests[options.request]
    if not options.refuse:
        slurm.drain(request["node"], f"goku: {request['text']}")
    ask(options.run_dir, "answered", request=options.request, approved=not options.refuse, by=getpass.getuser())
    print(f"{'refused' if options.refuse else 'done'}: {request['text']}")
    return 0
