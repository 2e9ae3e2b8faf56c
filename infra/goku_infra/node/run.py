"""`goku-ops run` and `goku-ops agent`: the keeper of a node's agent, and of a whole run on one machine. Both end with
what the controller decided.
"""

import argparse
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from goku_infra import environment, slurm
from goku_infra.checks import fitness
from goku_infra.checks.collective_check import own_address
from goku_infra.errors import OpsError
from goku_infra.messages import ask, ensure_token, page_token, read_address, supervisor_folder
from goku_infra.node.keeper import Keeper
from goku_infra.node.worker import check_command, runnable
from goku_infra.settings import RESTART_LIMIT, Settings, write_settings

REPORT_LIMIT_S = 180.0
"""The others may still be checked and import, on a busy machine for long."""
EXIT_ALL_UNFIT = 1
"""No node that may train has come, or its controller would have heard of this one."""
PRINT_CONFIG_LIMIT_S = 60
UNUSED_PORT = 9
"""Of a peer: to find the way there, nothing is sent."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=1, help="processes to train with (default 1)")
    _add_common(parser)


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True, help="nodes to train on; the job's others are hot spares")
    parser.add_argument("--min-nodes", type=int, default=0, help="fewest nodes to go on with (default: --nodes)")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="processes, one a GPU (default 8)")
    parser.add_argument(
        "--check", choices=fitness.LEVELS, default="off", help="what the node must pass before it trains (default off)"
    )
    parser.add_argument("--node-name", default="", help="default: SLURM's name of this node, or the host's")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, help="default: what the command's own --print-config says")
    parser.add_argument("--hang-limit", type=float, default=0.0, metavar="S", help="shortest time limit of any phase")
    parser.add_argument(
        "--restart-limit", type=int, default=RESTART_LIMIT, metavar="N",
        help=f"restarts within half an hour until the run is stopped (default {RESTART_LIMIT})",
    )  # fmt: skip
    parser.add_argument("--webhook", default="", metavar="URL", help="post alerts there")
    parser.add_argument("--page-actions", action="store_true", help="let the status page restart, drain and stop")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every rank runs")


def run(options: argparse.Namespace) -> int:
    """Train on this machine under a supervisor; rank 0's output is shown. The run's exit code."""
    command = _command(options)
    run_dir = options.run_dir or run_dir_of(command)
    job_id = f"local-{socket.gethostname()}-{os.getpid()}-{int(time.time())}"
    settings = Settings(
        run_dir=str(run_dir), command=tuple(command), job_id=job_id, nodes=1, min_nodes=1, ranks_per_node=options.ranks,
        hang_limit_s=options.hang_limit, restart_limit=options.restart_limit, webhook=options.webhook,
        page_actions=options.page_actions,
    )  # fmt: skip
    _refuse_a_second_run(run_dir)
    write_settings(settings)
    ensure_token(supervisor_folder(run_dir))  # one that is unusable is said here, in one line
    _end_properly()
    shown = threading.Thread(target=_show_rank0, args=(run_dir,), daemon=True)
    shown.start()
    with Keeper(run_dir, socket.gethostname(), 0, "127.0.0.1") as keeper:
        try:
            code = keeper.keep()
        except (KeyboardInterrupt, SystemExit) as end:
            with suppress(OpsError):
                ask(run_dir, "stop")
            return 130 if isinstance(end, KeyboardInterrupt) else int(end.code or 1)
    time.sleep(0.2)  # the last lines
    return code


def agent(options: argparse.Namespace) -> int:
    """Keep this node's agent, as one of a job's: the same words on every node. The run's exit code."""
    command = _command(options)
    run_dir = options.run_dir or run_dir_of(command)
    job = environment.slurm_job_id()
    if not job:
        raise OpsError("goku-ops agent is started by SLURM; on one machine use goku-ops run")
    settings = Settings(
        run_dir=str(run_dir), command=tuple(command), job_id=job, nodes=options.nodes,
        min_nodes=options.min_nodes or options.nodes, ranks_per_node=options.ranks_per_node,
        hang_limit_s=options.hang_limit, restart_limit=options.restart_limit, webhook=options.webhook,
        page_actions=options.page_actions,
    )  # fmt: skip
    _refuse_another_job(run_dir, job)
    name = options.node_name or environment.slurm_node_name() or socket.gethostname()
    if reason := fitness.reason_against(run_dir, options.check, job):
        print(f"goku-ops: {name} is not used: {reason}", file=sys.stderr)
        return 0 if _report_unfit(run_dir, name, reason) else EXIT_ALL_UNFIT
    address = _address_of(name)
    write_settings(settings)
    ensure_token(supervisor_folder(run_dir))  # one that is unusable is said here, in one line
    _end_properly()
    with Keeper(run_dir, name, environment.slurm_node_index(), address) as keeper:
        return keeper.keep()


def _address_of(name: str) -> str:
    """Where the job's other nodes reach this one.

    Some systems (Debian) let a machine's own name stand for 127.0.1.1, where only the machine itself would reach it.

    Raises:
        OpsError: it cannot be told.
    """
    peers: tuple[str, ...] = ()
    try:
        address = socket.gethostbyname(name)
        if ipaddress.ip_address(address).is_loopback:
            here = environment.slurm_node_name() or name
            peers = tuple(peer for peer in slurm.expand_nodes(environment.slurm_step_nodes()) if peer != here)
        return own_address((peers[0], UNUSED_PORT)) if peers else address
    except OSError as error:
        of = f"{name} as {peers[0]} reaches it" if peers else name
        raise OpsError(f"no address of {of}: {error}; see /etc/hosts or the name server") from None


def _end_properly() -> None:
    """At SIGTERM, which SLURM sends to every process of a job: the agent then has time to clear up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _command(options: argparse.Namespace) -> list[str]:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    check_command(command)
    return list(command)


def run_dir_of(command: list[str]) -> Path:
    """What the command itself says, which also finds a bad setting before anything is started."""
    try:
        done = subprocess.run(
            [*runnable(command), "--print-config"], capture_output=True, text=True, timeout=PRINT_CONFIG_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OpsError(f"{command[0]} --print-config failed ({error}); give --run-dir") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise OpsError(f"the command refuses its settings: {lines[-1]}")
    for line in done.stdout.splitlines():
        if line.startswith("run_dir:"):
            return Path(line.removeprefix("run_dir:").strip())
    raise OpsError(f"{command[0]} --print-config names no run_dir; give --run-dir")


def _refuse_a_second_run(run_dir: Path) -> None:
    try:
        state = ask(run_dir, "state", timeout_s=2.0)["state"]
    except OpsError:
        return
    if state["status"] != "finished":
        raise OpsError(f"{run_dir} is being trained by job {state['job_id']}; stop it with goku-ops stop {run_dir}")


def _refuse_another_job(run_dir: Path, job: str) -> None:
    address = read_address(supervisor_folder(run_dir))
    other = address["job_id"] if address else job
    if other == job:
        return
    if not other.isdigit():
        _refuse_a_second_run(run_dir)
        return
    try:
        state = slurm.job(other).state
    except OpsError:
        return  # it has ended long ago
    if state in ("RUNNING", "SUSPENDED"):
        raise OpsError(f"{run_dir} is being trained by job {other}; stop it with goku-ops stop {run_dir}")


def _report_unfit(run_dir: Path, name: str, reason: str) -> bool:
    """Let the controller know, as soon as there is one, that this node stays out; whether there was one."""
    deadline = time.monotonic() + REPORT_LIMIT_S
    while time.monotonic() < deadline:
        try:
            ask(run_dir, "unfit", node=name, place=environment.slurm_node_index(), reason=reason)
            return True
        except OpsError:
            time.sleep(1.0)
    return False


def _show_rank0(run_dir: Path) -> None:
    """Copy what rank 0 of the newest generation writes to this terminal."""
    logs = supervisor_folder(run_dir) / "logs"
    shown_epoch = (read_address(logs.parent) or {}).get("epoch", 0)
    newest = shown = _newest_generation(logs)  # of an earlier run
    path, offset, seen_at = None, 0, 0
    while True:
        address = read_address(logs.parent)
        if address is not None and address["epoch"] > shown_epoch:  # the first controller of this run, or another one
            shown_epoch, secret = address["epoch"], page_token(ensure_token(logs.parent))
            page = f"http://{address['host']}:{address['page_port']}/?token={secret}"
            print(f"goku-ops status {run_dir}   status page: {page}", file=sys.stderr)
        if (changed_at := logs.stat().st_mtime_ns) != seen_at:  # there may be thousands of generations
            seen_at, newest = changed_at, _newest_generation(logs)
        if newest != shown and (log := logs / f"g{newest:04d}" / "rank_00000.log").exists():
            shown, path, offset = newest, log, 0
        if path is not None:
            with path.open("rb") as file:
                file.seek(offset)
                text = file.read()
            offset += len(text)
            sys.stderr.buffer.write(text)
            sys.stderr.flush()
        time.sleep(0.1)


def _newest_generation(logs: Path) -> int:
    return max((int(folder.name[1:]) for folder in logs.glob("g*") if folder.name[1:].isdigit()), default=0)
