"""Alerts arrive though their receiver is down at first, in order, and never hold up the sender."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from goku_infra.errors import OpsError
from goku_infra.pages.alerts import Alerts

FAST_S = (0.02,) * 5


class Receiver:
    """A real HTTP server that answers with the given codes first, then with 200."""

    def __init__(self, *codes: int, hold_s: float = 0.0) -> None:
        self.codes = list(codes)
        self.attempts = 0
        self.received: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.attempts += 1
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(hold_s)
                code = outer.codes.pop(0) if outer.codes else 200
                if code == 200:
                    outer.received.append(body)
                self.send_response(code)
                self.end_headers()

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def __enter__(self) -> "Receiver":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_an_alert_arrives_once_after_failures_with_text_and_fields():
    with Receiver(500, 503, 429) as receiver:
        with contextlib.closing(Alerts(receiver.url, backoff_s=FAST_S)) as alerts:
            alerts.send("critical", "rank 5 on n2 is stopped", {"incident": 3, "run_dir": "out/run"})
        (alert,) = receiver.received
        assert receiver.attempts == 4
    assert alert["text"] == "[critical] rank 5 on n2 is stopped"
    assert (alert["level"], alert["run_dir"], alert["incident"]) == ("critical", "out/run", 3)
    assert abs(alert["time_s"] - time.time()) < 60


def test_alerts_keep_their_order():
    with Receiver(500) as receiver:
        with contextlib.closing(Alerts(receiver.url, backoff_s=FAST_S)) as alerts:
            for number in range(20):
                alerts.send("info", str(number), {"number": number})
        assert [alert["number"] for alert in receiver.received] == list(range(20))


def test_a_refusal_is_not_tried_again(caplog):
    with Receiver(404) as receiver:
        with contextlib.closing(Alerts(receiver.url, backoff_s=FAST_S)) as alerts:
            alerts.send("info", "first", {})
            alerts.send("info", "second", {})
        assert [alert["text"] for alert in receiver.received] == ["[info] second"]
    assert receiver.attempts == 2 and "not delivered to the webhook: [info] first" in caplog.text


def test_a_slow_receiver_does_not_hold_up_the_sender():
    with Receiver(hold_s=0.3) as receiver, contextlib.closing(Alerts(receiver.url, flush_s=0.05)) as alerts:
        began = time.perf_counter()
        for _ in range(100):
            alerts.send("info", "text", {})
        assert time.perf_counter() - began < 10  # 30 if it waited for each answer


def test_closing_gives_a_dead_receiver_up(caplog):
    alerts = Alerts("http://127.0.0.1:9", backoff_s=(60.0,), flush_s=0.3)
    alerts.send("info", "text", {})
    began = time.perf_counter()
    alerts.close()
    assert time.perf_counter() - began < 30
    assert "not delivered to the webhook: [info] text" in caplog.text


def test_without_an_address_nothing_is_sent_and_what_is_no_address_is_refused():
    with contextlib.closing(Alerts("")) as alerts:
        alerts.send("info", "text", {})
        assert alerts._waiting.empty()
    with pytest.raises(OpsError, match="https://"):
        Alerts("hooks.example")
