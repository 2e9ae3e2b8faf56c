"""The status page of a run: one file of HTML, JSON for it and for tools, and Prometheus metrics.

Served by threads of the controller's process. Everything needs the page's token; nothing can be changed from here
unless the operator has asked for that.
"""

import hmac
import json
import logging
import secrets
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from goku_infra.pages import prometheus
from goku_infra.pages.headline import described
from goku_infra.pages.incident_list import IncidentList
from goku_infra.pages.metrics_history import MetricsHistory
from goku_infra.record import journal

logger = logging.getLogger(__name__)

ACTIONS = frozenset({"restart", "drain", "stop"})
"""What the page may ask of the controller. Approving needs the operator's own rights, so it is a command."""
BODY_LIMIT = 64 * 1024
IDLE_LIMIT_S = 10.0
"""A connection that says nothing for so long is closed: it holds a thread."""
JSON = "application/json"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

State = Callable[[], dict[str, Any]]
Ask = Callable[[str, dict[str, Any]], dict[str, Any]]


class Page:
    """Serves a run's page while its context lasts.

    `state` gives the newest snapshot, an object of its own that nobody changes any more; `ask` passes an operator's
    command to the controller. Both are called from the server's threads. Port 0 takes a free one; `port` says which.
    """

    def __init__(
        self, run_dir: Path, state: State, ask: Ask, token: str, host: str, port: int, *, actions: bool = False
    ) -> None:
        self.state = state
        self.ask = ask
        self.token = token
        self.actions = actions
        self.metrics = MetricsHistory(run_dir / "metrics.jsonl")
        self.incidents = IncidentList(run_dir / "supervisor" / journal.FILE)
        self._shown: tuple[dict[str, Any], bytes] | None = None
        """The last snapshot that was asked for, and what was sent of it."""
        self._showing = threading.Lock()
        self._server = _Server((host, port), type("Handler", (_Handler,), {"page": self}))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="page", daemon=True
        )

    def __enter__(self) -> "Page":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def view_as_json(self) -> bytes:
        """The view of the newest snapshot; made once for each, however many ask."""
        snapshot = self.state()
        with self._showing:
            if self._shown is None or self._shown[0] is not snapshot:
                self._shown = snapshot, json.dumps(view(snapshot, actions=self.actions)).encode()
            return self._shown[1]


def view(snapshot: dict[str, Any], *, actions: bool) -> dict[str, Any]:
    """The snapshot with what the page says of it in words."""
    return {**described(snapshot), "actions_allowed": sorted(ACTIONS) if actions else []}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """In the log, not on stderr; a browser that leaves in the middle is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            logger.exception("the page could not answer %s", client_address)


class _Handler(BaseHTTPRequestHandler):
    """One request. Who asks is checked before anything else is looked at."""

    page: Page
    protocol_version = "HTTP/1.1"
    timeout = IDLE_LIMIT_S
    server_version = "goku-ops"
    sys_version = ""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        if address.path == "/" and "token" in query:
            self._sign_in(query["token"][0])
            return
        if not self._is_known():
            return
        match address.path:
            case "/":
                self._send_page()
            case "/api/state":
                self._send(HTTPStatus.OK, self.page.view_as_json(), JSON)
            case "/api/incidents":
                self._send(HTTPStatus.OK, self.page.incidents.as_json(), JSON)
            case "/api/metrics":
                self._send_metrics(query)
            case "/metrics":
                self._send(HTTPStatus.OK, prometheus.render(self.page.state()), prometheus.CONTENT_TYPE)
            case _:
                self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > BODY_LIMIT:
            self.close_connection = True
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body of at most {BODY_LIMIT} bytes, please")
            return
        body = self.rfile.read(int(length))
        if not self._is_known():
            return
        if urlsplit(self.path).path != "/api/ops":
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        elif not self.page.actions:
            self._refuse(HTTPStatus.FORBIDDEN, "this page is read-only; start the run with --page-actions")
        elif not self._comes_from_the_page():
            self._refuse(HTTPStatus.FORBIDDEN, "the request does not come from this page")
        else:
            self._operate(body)

    def _operate(self, body: bytes) -> None:
        try:
            arguments = json.loads(body)
            command = arguments.pop("command")
            if command not in ACTIONS:
                raise ValueError
        except (ValueError, AttributeError, KeyError, TypeError):
            self._refuse(HTTPStatus.BAD_REQUEST, f"a JSON object with `command`, one of {', '.join(sorted(ACTIONS))}")
            return
        logger.info("the page asks to %s %s", command, arguments)
        try:
            self._send_json(self.page.ask(command, arguments))
        except Exception as error:  # whatever the controller meets, the page must say that nothing is certain
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"the controller did not answer: {error!r}")

    def _sign_in(self, token: str) -> None:
        """A link with the token once: from then on a cookie, and the token is out of the address bar."""
        if not self._is_token(token):
            self._refuse_stranger()
            return
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        self.send_header("Set-Cookie", f"{self._cookie_name}={token}; Path=/; HttpOnly; SameSite=Strict")
        self._end_headers(0)

    @property
    def _cookie_name(self) -> str:
        """By port: a browser does not tell the ports of a host apart, and a host may serve two runs."""
        return f"goku_{self.page.port}"

    def _is_known(self) -> bool:
        """Whether the request has the token; if not it is refused here."""
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie_name)
        except CookieError:
            cookie = None
        if self._is_token(bearer) or (cookie is not None and self._is_token(cookie.value)):
            return True
        self._refuse_stranger()
        return False

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.page.token.encode())

    def _comes_from_the_page(self) -> bool:
        """A browser names the page that a request comes from; another site's is refused."""
        origin = urlsplit(self.headers.get("Origin", ""))
        is_json = self.headers.get("Content-Type", "").split(";")[0].strip() == "application/json"
        return is_json and bool(origin.netloc) and origin.netloc == self.headers.get("Host")

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        text = _template().replace("{{nonce}}", nonce)
        self._send(HTTPStatus.OK, text, "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _send_metrics(self, query: dict[str, list[str]]) -> None:
        try:
            since, points = int(query.get("since", ["-1"])[0]), int(query.get("points", ["600"])[0])
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "since and points are whole numbers")
            return
        self._send_json({"rows": self.page.metrics.rows(since=since, points=points)})

    def _send_json(self, value: dict[str, Any]) -> None:
        self._send(HTTPStatus.OK, json.dumps(value), JSON)

    def _refuse_stranger(self) -> None:
        self._refuse(
            HTTPStatus.UNAUTHORIZED,
            "give the token in RUN_DIR/supervisor/page_token: open /?token=TOKEN, or send Authorization: Bearer TOKEN",
        )

    def _refuse(self, code: HTTPStatus, text: str) -> None:
        self._send(code, text + "\n", "text/plain; charset=utf-8")

    def _send(self, code: HTTPStatus, said: str | bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        body = said.encode() if isinstance(said, str) else said
        self.send_response(code)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self._end_headers(len(body))
        self.wfile.write(body)

    def _end_headers(self, length: int) -> None:
        self.send_header("Content-Length", str(length))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Not to stderr, where the address could show a token."""


@lru_cache
def _template() -> str:
    return files("goku_infra.pages").joinpath("page.html").read_text()
