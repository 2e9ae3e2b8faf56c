"""The fork server of an agent's ranks: a copy of the agent's process from before it had threads.

The standard library's own fork server is a new interpreter that imports all again, and lives as long as any of its
processes. This one has the agent's imports already and dies with it, and ranks die with their fork server: those of a
killed agent would train on with nobody to watch them.
"""

import os
import socket
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from goku_infra.node.worker import die_with_the_parent
from goku_infra.process_name import take_name


class ForkServer(NamedTuple):
    """A fork server that runs."""

    pid: int
    handle: int
    """Ready to be read when it has ended."""


def start_fork_server(address: Path, words: list[str]) -> ForkServer:
    """Fork it; from now on processes of the context "forkserver" come from there.

    Without this one multiprocessing would start another of its own kind: whoever sees the end of it should end, too.

    Args:
        address: of its socket, in a folder that nobody else can enter.
        words: shown in its command line and those of its ranks.
    """
    server: Any = forkserver._forkserver
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        alive_r, alive_w = os.pipe()  # held open for writing by the agent and all ranks
        agent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                die_with_the_parent(agent)
                take_name("goku_infra.node.worker", *words)
                os.close(alive_w)
                forkserver.main(listener.detach(), alive_r, [])
            finally:
                os._exit(0)
        os.close(alive_r)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = str(address), alive_w, pid
    return ForkServer(pid, os.pidfd_open(pid))
