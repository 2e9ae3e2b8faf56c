"""Alerts to a webhook, sent by a thread of their own: a chat that is down never holds up the controller."""

import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from goku_infra.errors import OpsError

logger = logging.getLogger(__name__)

BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 15.0)
"""Waits between the attempts to send one alert; after the last it is given up."""
WAITING_LIMIT = 1000
"""Alerts that may wait for a webhook; further ones are dropped."""
TIMEOUT_S = 5.0
PASSING_CODES = frozenset({408, 425, 429})
"""Refusals that are worth another attempt, beside those of the server's side (5xx)."""


class Alerts:
    """Posts alerts as JSON to one address, or nowhere if it is empty.

    The object has `text`, which Slack and its likes show, and the fields `level`, `time_s` and what the caller adds.
    """

    def __init__(self, url: str, *, backoff_s: tuple[float, ...] = BACKOFF_S, flush_s: float = 5.0) -> None:
        if url and not url.startswith(("http://", "https://")):
            raise OpsError(f"webhook {url!r} is not an address; give http://... or https://...")
        self.url = url
        self._backoff_s = backoff_s
        self._flush_s = flush_s
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="alerts", daemon=True)
        self._thread.start()

    def send(self, level: str, text: str, fields: dict[str, Any]) -> None:
        """Hand an alert over; returns at once."""
        if not self.url:
            return
        if self._waiting.qsize() >= WAITING_LIMIT:
            logger.warning("too many alerts wait for the webhook; dropped: %s", text)
            return
        self._waiting.put({"text": f"[{level}] {text}", "level": level, "time_s": time.time(), **fields})

    def close(self) -> None:
        """Wait up to `flush_s` for what has not been sent, then give it up."""
        self._waiting.put(None)
        self._thread.join(self._flush_s)
        self._closing.set()  # ends the waits of a webhook that does not answer
        self._thread.join(self._flush_s)

    def _send_all(self) -> None:
        while (alert := self._waiting.get()) is not None:
            if self._closing.is_set() or not self._delivered(alert):
                logger.warning("alert not delivered to the webhook: %s", alert["text"])

    def _delivered(self, alert: dict[str, Any]) -> bool:
        for wait_s in (*self._backoff_s, None):
            try:
                _post(self.url, alert)
                return True
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in PASSING_CODES:
                    logger.warning("the webhook refuses alerts: %s %s", error.code, error.reason)
                    return False
            except OSError as error:
                logger.debug("webhook: %s", error)
            if wait_s is None or self._closing.wait(wait_s):
                return False
        return False


def _post(url: str, alert: dict[str, Any]) -> None:
    body = json.dumps(alert).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S):
        pass
