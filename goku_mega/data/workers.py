"""Worker processes of the data commands: none outlives the command that started it."""

import os
import threading
from multiprocessing import connection, parent_process


def end_with_parent() -> None:
    """A pool's initializer: end this worker with the command, whose next word it would else await for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
