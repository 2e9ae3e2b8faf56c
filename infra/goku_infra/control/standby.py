"""A controller on standby: it has imported what a controller needs, and becomes one at a word on stdin.

An agent keeps it (`goku_infra.node.standby`). It ends with its agent as long as it waits, and no more once it is the
controller.
"""

import os
import sys

from goku_infra.control import controller
from goku_infra.process_name import take_name


def main(run_dir: str, host: str) -> int:
    """Wait for the line that is the number of this controller's epoch; at the end of stdin nobody needs one."""
    epoch = sys.stdin.readline().strip()
    if not epoch:
        return 0
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    take_name("goku_infra.control.controller", run_dir)
    return controller.main([run_dir, "--host", host, "--epoch", epoch])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
