"""What controller, agents and `goku-ops` say to each other: a JSON object a line over TCP.

Each side shows the other that it knows the run's token, and neither says it: whoever takes the port of a controller
that is gone learns a key that no later controller takes, and cannot answer as one.
"""

import hmac
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from goku_infra.errors import OpsError

LINE_LIMIT = 64 * 1024 * 1024
"""Longest line, bytes: the stacks of a node's ranks fit."""
CONTROLLER_FILE = "controller.json"
PAGE_TOKEN_FILE = "page_token"


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def supervisor_folder(run_dir: Path) -> Path:
    """Where a run's supervisor keeps its files; all nodes see it."""
    return run_dir / "supervisor"


def ensure_token(folder: Path) -> str:
    """The secret of a run, made by whoever comes first; only its owner can read it.

    Raises:
        OpsError: it is empty.
    """
    path = folder / "token"
    if path.exists():  # it may be that we can read it and write nothing
        return _read_token(path)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".token.{socket.gethostname()}.{os.getpid()}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_urlsafe(32))
        file.flush()
        os.fsync(handle)  # a name for data that a crash may take would be a secret that is none
    try:
        os.link(temporary, path)  # fails if another was quicker: then that one holds
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return _read_token(path)


def _read_token(path: Path) -> str:
    token = path.read_text()
    if not token:  # a machine's crash may leave that, and anybody would know it
        raise OpsError(f"{path} is empty; remove it")
    return token


def credentials(token: str, epoch: int) -> dict[str, str]:
    """What the first line to the controller of an epoch holds: a key for it alone, and what it must `prove` with."""
    return {"key": _code(token, f"key {epoch}"), "nonce": secrets.token_hex(16)}


def is_known(token: str, epoch: int, key: object) -> bool:
    """Whether the controller of an epoch has been given its key."""
    return isinstance(key, str) and hmac.compare_digest(key, _code(token, f"key {epoch}"))


def prove(token: str, nonce: str) -> bytes:
    """The controller's first line: only who knows the token can have made it, and only for this connection."""
    return encode({"proof": _code(token, f"proof {nonce}")})


def is_proof(token: str, nonce: str, line: bytes) -> bool:
    return hmac.compare_digest(line.strip(), prove(token, nonce).strip())


def page_token(token: str) -> str:
    """The secret of the status page, which browsers and Prometheus say in clear: it opens nothing else."""
    return _code(token, "page")


def _code(token: str, text: str) -> str:
    return hmac.new(token.encode(), text.encode(), "sha256").hexdigest()


def read_address(folder: Path) -> dict[str, Any] | None:
    """Where the newest controller listens: host, port, page_port, pid, epoch; None before the first."""
    try:
        return json.loads((folder / CONTROLLER_FILE).read_text())
    except (OSError, ValueError):
        return None


def sign(folder: Path) -> None:
    """Leave a sign that the newest controller lives, for nodes that cannot reach it."""
    os.utime(folder / CONTROLLER_FILE)


def last_sign(folder: Path) -> int:
    """A number that changes with every sign; 0 before the first."""
    try:
        with (folder / CONTROLLER_FILE).open("rb") as file:  # opening asks the file system's server, stat may not
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def replace_file(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a file that readers see whole: the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    temporary.replace(path)


def ask(run_dir: Path, command: str, *, timeout_s: float = 10.0, **arguments: Any) -> dict[str, Any]:
    """Ask a run's controller for something and return its answer.

    Raises:
        OpsError: no controller answers, or it refuses; one line says why.
    """
    folder = supervisor_folder(run_dir)
    address = read_address(folder)
    if address is None:
        raise OpsError(f"{run_dir} has no controller; give the run_dir of a run started by `goku-ops run` or `submit`")
    try:
        token = ensure_token(folder)
    except OSError as error:
        raise OpsError(f"only who may read {folder / 'token'} can ask this run's controller ({error})") from None
    shown = credentials(token, address["epoch"])
    request = {"kind": "ops", **shown, "command": command, **arguments}
    try:
        with socket.create_connection((address["host"], address["port"]), timeout=timeout_s) as connection:
            connection.sendall(encode(request))
            lines = connection.makefile("rb")
            if not is_proof(token, shown["nonce"], lines.readline(LINE_LIMIT)):
                raise ValueError("who listens there is not that controller")
            answer = json.loads(lines.readline(LINE_LIMIT))
    except (OSError, ValueError) as error:
        where = f"{address['host']}:{address['port']}"
        raise OpsError(
            f"the controller of {run_dir} does not answer at {where} ({error}); is the job running?"
        ) from None
    if not answer["ok"]:
        raise OpsError(answer["error"])
    return answer
