"""An agent's connection to the controller: found again when it is lost, raised again when it is gone."""

import json
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from goku_infra import slurm
from goku_infra.messages import (
    credentials,
    encode,
    ensure_token,
    is_proof,
    last_sign,
    read_address,
    supervisor_folder,
)
from goku_infra.node.standby import Standby

SILENCE_LIMIT_S = 1.5
"""The controller speaks every 0.2 s: after this silence it is looked for anew."""
PROBE_AFTER_S = 0.5
"""After this silence the first nodes ask whether the controller's machine is there at all: if it answers, a slow
controller has until the limit above."""
PROBE_TIMEOUT_S = 0.2
PROBES = 2
SEND_LIMIT_S = 2
SPEAK_S = 0.4
CONNECT_TIMEOUT_S = 0.25
RETRY_S = 0.1
STILL_S = 0.5
"""A controller that cannot be reached and has left no sign of life in the shared folder for so long is gone."""
REFUSED_STILL_S = 0.25
"""The same where its machine says that nobody listens there: it would have signed every 0.2 s."""
STARTING_S = 5.0
"""How long one that has been started may take to show itself."""
RAISE_STAGGER_S = 0.1
"""Every node waits so much longer than the one before it, so that few try to start a controller at once."""
STAGGERED = 20
FIRST_STAGGER_S = 0.4
MUTE_S = 3.0
"""One that takes connections but neither speaks nor signs for so long more is stuck."""
STANDBY_PLACES = 3
"""The nodes that would be the first to raise a controller keep one on standby."""
STANDBY_AFTER_S = 5.0
"""Once they have been connected for so long: not while ranks start."""


class Member(NamedTuple):
    """Who an agent is."""

    run_dir: Path
    job_id: str
    node: str
    place: int
    """Place in the allocation."""
    address: str
    """Where the other nodes reach this one."""
    keeper_port: int
    """Where its keeper answers."""


class Link:
    """Not connected at first; `connect` is called until it succeeds, and again after `lost`."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.folder = supervisor_folder(member.run_dir)
        self.socket: socket.socket | None = None
        self._token = ensure_token(self.folder)
        self._buffer = b""
        self._nonce = ""
        """What the controller must still prove itself with; empty: it has."""
        self._heard_at = self._spoke_at = 0.0
        self._lost_at = time.monotonic()
        self._tried_at = 0.0
        self._sign: object = None
        self._epoch = 0
        self._sign_at = 0.0
        self._first = self._answered = True
        self._refused = False
        self._connected_at = self._probed_at = 0.0
        log = self.folder / "logs" / f"controller_{member.node}.log"
        self._standby = Standby(member.run_dir, member.address, log)
        self._sending = threading.Lock()
        threading.Thread(target=self._keep_speaking, name="link", daemon=True).start()

    @property
    def connected(self) -> bool:
        return self.socket is not None

    @property
    def lost_for_s(self) -> float:
        return 0.0 if self.connected else time.monotonic() - self._lost_at

    def connect(self, hello: dict[str, Any]) -> bool:
        """Try the newest controller once, if the last try was long enough ago; raise one if there has been none."""
        now = time.monotonic()
        if now - self._tried_at < RETRY_S:
            return False
        self._tried_at = now
        address = read_address(self.folder)
        still_s = self._look_for_signs(address)
        if address is not None and (self._answered or still_s < MUTE_S) and self._greet(address, hello):
            return True
        still_s = self._look_for_signs(address)  # greeting a machine that is gone takes its time
        stagger = min(self.member.place, STAGGERED) * (FIRST_STAGGER_S if self._first else RAISE_STAGGER_S)
        if still_s >= stagger and not self._cut_off():
            self._raise_controller()
        return False

    def send(self, message: dict[str, Any]) -> None:
        """Send, or lose the connection; what is not sent is said again by the next hello."""
        with self._sending:
            self._spoke_at = time.monotonic()
            connection = self.socket
            if connection is None:
                return
            try:
                connection.sendall(encode(message))
            except OSError:
                self._lose(connection)

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived, without waiting; loses the connection when the controller has gone or fallen silent."""
        connection = self.socket  # the thread that speaks may lose it meanwhile
        if connection is None:
            return []
        try:
            while chunk := connection.recv(1 << 20, socket.MSG_DONTWAIT):
                self._buffer += chunk
                self._heard_at = time.monotonic()
            self._lose(connection)
        except BlockingIOError:
            silent_s = time.monotonic() - self._heard_at
            if silent_s > SILENCE_LIMIT_S or (silent_s > PROBE_AFTER_S and self._machine_is_gone(connection)):
                self._lose(connection)
        except OSError:
            self._lose(connection)
        *lines, self._buffer = self._buffer.split(b"\n")
        if lines and self._nonce:
            if not is_proof(self._token, self._nonce, lines.pop(0)):  # somebody else has taken its port
                self._lose(connection)
                return []
            self._nonce, self._answered = "", True
        return [json.loads(line) for line in lines]

    def _lose(self, connection: socket.socket) -> None:
        """Close it, and do without a controller if it is the one that is in use: another thread may be ahead of us."""
        connection.close()
        if self.socket is connection:
            self.socket = None
            self._lost_at = time.monotonic()

    def _keep_speaking(self) -> None:
        """Also while the agent is busy ending or starting ranks, the controller hears that it lives."""
        while True:
            silent_s = time.monotonic() - self._spoke_at
            if silent_s < SPEAK_S:
                time.sleep(SPEAK_S - silent_s)
            else:
                self.send({"kind": "alive"})
            settled = self.connected and time.monotonic() - self._connected_at > STANDBY_AFTER_S
            if settled and self.member.place < STANDBY_PLACES:
                with suppress(OSError):  # no process more just now: then one is started when it is needed
                    self._standby.prepare()

    def _greet(self, address: dict[str, Any], hello: dict[str, Any]) -> bool:
        self._refused = False
        try:
            connection = socket.create_connection((address["host"], address["port"]), timeout=CONNECT_TIMEOUT_S)
        except OSError as error:
            self._refused = isinstance(error, ConnectionRefusedError)
            return False
        connection.settimeout(None)  # `receive` does not wait, and the kernel limits `send`
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_LIMIT_S, 0))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        member = self.member
        shown = credentials(self._token, address["epoch"])
        greeting = {
            "kind": "hello", **shown, "job_id": member.job_id, "node": member.node,
            "index": member.place, "address": member.address, "keeper_port": member.keeper_port, **hello,
        }  # fmt: skip
        try:
            connection.sendall(encode(greeting))
        except OSError:
            return False
        self._buffer, self._nonce = b"", shown["nonce"]
        self._heard_at, self._first, self._answered = time.monotonic(), False, False
        self._connected_at = self._heard_at
        self.socket = connection
        return True

    def _machine_is_gone(self, connection: socket.socket) -> bool:
        """Whether the silent controller's machine does not even take connections: its kernel does that for it."""
        if self.member.place > STAGGERED or time.monotonic() - self._probed_at < PROBE_TIMEOUT_S:
            return False
        self._probed_at = time.monotonic()
        self._look_for_signs(read_address(self.folder))  # their age counts from here
        for _ in range(PROBES):
            try:
                socket.create_connection(connection.getpeername()[:2], timeout=PROBE_TIMEOUT_S).close()
                return False
            except OSError:
                continue
        return True

    def _look_for_signs(self, address: dict[str, Any] | None) -> float:
        """Seconds for which nothing in the shared folder has shown that a controller runs or starts; below 0: too few
        to say.

        A controller that cannot be reached but keeps signing lives on the other side of a broken link: this node is
        cut off, and a second controller would only do harm.
        """
        now, epoch = time.monotonic(), self._newest_epoch()
        signed = address is not None and address["epoch"] == epoch
        self._epoch, sign = epoch, (epoch, last_sign(self.folder))
        if sign != self._sign:
            self._sign, self._sign_at = sign, now
        limit = (REFUSED_STILL_S if self._refused else STILL_S) if signed else STARTING_S if epoch else 0.0
        return now - self._sign_at - limit

    def _cut_off(self) -> bool:
        """Whether this node reaches nobody: SLURM, where there is one, is asked."""
        return self.member.job_id.isdigit() and not slurm.answers()

    def _newest_epoch(self) -> int:
        try:
            return max((int(path.name.removeprefix("epoch_")) for path in self.folder.glob("epoch_*")), default=0)
        except OSError:
            return self._epoch

    def _raise_controller(self) -> None:
        """Start a controller on this node; if several try, the exclusive creation of its epoch lets one do it."""
        epoch = self._epoch + 1  # as seen when there were no signs
        try:
            os.close(os.open(self.folder / f"epoch_{epoch:05d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            self._standby.become_controller(epoch)
        except OSError:  # another was quicker, or the file system takes nothing now
            return
