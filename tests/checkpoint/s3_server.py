"""A real S3 server on loopback (moto's, in a process of its own), and a front that makes it slow or lets it fail."""

import http.client
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO
from urllib.parse import urlsplit

import pytest

# It ends when its standard input does, so it cannot outlive the process that started it.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """Runs the server; yields its endpoint. Skips the test that asks where moto or s3fs is not installed."""
    for package in ("moto.server", "s3fs"):
        pytest.importorskip(package, reason="S3 is tested with moto's server and s3fs: pip install 'moto[server]' s3fs")
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            port = _first_line(process.stdout)
            assert port, f"the S3 server ended with {process.wait(10)} before it answered"
            yield f"http://127.0.0.1:{int(port)}"
        finally:
            process.kill()


def _first_line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    return stream.readline()


@contextmanager
def s3_settings(endpoint: str, **settings: str) -> Iterator[None]:
    """Makes s3:// mean `endpoint`, in this process and in those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            **settings,
        }.items():
            patch.setenv(name, value)
        with without_kept_clients():
            yield


@contextmanager
def without_kept_clients() -> Iterator[None]:
    """fsspec keeps a client for as long as the process lives, with the settings that held when it was made."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@dataclass(frozen=True)
class Fault:
    """What the front does with a request instead of handing it on."""

    status: int = 0
    """Answers this status ..."""
    body: bytes = b""
    """... with this body."""
    delay_s: float = 0
    """Waits, then hands the request on."""
    deaf: bool = False
    """Reads and answers nothing, until the test is over."""
    drop: bool = False
    """Closes the connection without an answer."""
    drop_after: bool = False
    """Hands the request on, then closes the connection without the answer."""
    cut: bool = False
    """Hands the request on, then closes the connection in the middle of the answer's body."""


@dataclass
class Front:
    """A server between client and S3."""

    endpoint: str
    rule: Callable[[str, str], Fault | None] = lambda method, path: None
    """The fault for a request's method and its path with the query."""
    seen: list[tuple[str, str]] = field(default_factory=list)

    def mend(self) -> None:
        """No fault any more."""
        self.rule = lambda method, path: None

    def fail(self, fault: Fault, *, times: int = 10**9, method: str = "", path: str = "") -> None:
        """Let the next requests with this method and `path` in their path meet `fault`, that many times."""
        left = iter(range(times))

        def rule(asked: str, target: str) -> Fault | None:
            hit = method in ("", asked) and path in target
            return fault if hit and next(left, None) is not None else None

        self.rule = rule


@contextmanager
def faulty_front(server: str) -> Iterator[Front]:
    """Runs a front before `server` (an endpoint); yields it without any fault."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_expect_100(self) -> bool:
            return True  # said once the request is known to be read

        def answer(self) -> None:
            front.seen.append((self.command, self.path))
            fault = front.rule(self.command, self.path) or Fault()
            if fault.deaf:
                over.wait()
            if fault.deaf or fault.drop:
                self.close_connection = True
                return
            over.wait(fault.delay_s)
            if "100-continue" in self.headers.get("Expect", ""):
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault.status:
                self._send(fault.status, [], fault.body, cut=False)
                return
            target = http.client.HTTPConnection(urlsplit(server).netloc, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name != "Expect"}
            target.request(self.command, self.path, body, headers)
            reply = target.getresponse()
            content = reply.read()
            target.close()
            if fault.drop_after:
                self.close_connection = True
            else:
                self._send(reply.status, reply.getheaders(), content, cut=fault.cut)

        def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = dict((name.lower(), value) for name, value in headers).get("content-length", "0")
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # the server has been ended, or the client has left
                super().handle_error(request, client_address)

    server_in_front = Server(("127.0.0.1", 0), Handler)
    server_in_front.daemon_threads = True
    front = Front(f"http://127.0.0.1:{server_in_front.server_address[1]}")
    thread = threading.Thread(target=server_in_front.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield front
    finally:
        over.set()
        server_in_front.shutdown()
        server_in_front.socket.close()
        thread.join()


def make_bucket(name: str) -> str:
    """A new bucket; returns its URL."""
    import fsspec

    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"
