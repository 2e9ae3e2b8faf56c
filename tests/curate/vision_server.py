"""A chat server over loopback that really looks: it decodes the pictures it is sent, and says what colours they are.

It speaks OpenAI's protocol as vLLM does, and can be told to misbehave.
"""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

COLORS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200),
    "yellow": (220, 210, 40),
}  # fmt: skip

Answer = Callable[[str, str, list[np.ndarray]], str]
"""Of model, prompt and pictures."""


def color_name(picture: np.ndarray) -> str:
    mean = picture.reshape(-1, 3).mean(axis=0)
    return min(COLORS, key=lambda name: float(np.abs(mean - COLORS[name]).sum()))


def look(model: str, prompt: str, pictures: list[np.ndarray]) -> str:
    """`model saw red 64x48, blue 64x48.`, or without pictures the prompt's last line."""
    if not pictures:
        return f"{model} read: {prompt.splitlines()[-1]}"
    seen = ", ".join(f"{color_name(picture)} {picture.shape[1]}x{picture.shape[0]}" for picture in pictures)
    return f"{model} saw {seen}."


@dataclass
class VisionServer:
    """A running server; `requests` are the bodies it got, `headers` theirs."""

    url: str = ""
    answer: Answer = look
    models: tuple[str, ...] = ()
    """Models that it has; empty: any."""
    key: str = ""
    faults: list[int | str] = field(default_factory=list)
    """Of the next requests, each once: a status; `slow`, `drop` the connection, or other text as the whole reply."""
    slow: threading.Event = field(default_factory=threading.Event)
    """Slow answers are given when this is set."""
    finish_reason: str = "stop"
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def _pictures(content: list[dict[str, Any]]) -> list[np.ndarray]:
    pictures = []
    for part in content:
        if part["type"] == "image_url":
            head, data = part["image_url"]["url"].split(",")
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                assert head == f"data:image/{picture.format.lower()};base64"
                pictures.append(np.asarray(picture.convert("RGB")))
    return pictures


def _reply(server: VisionServer, body: dict[str, Any], headers: dict[str, str], path: str) -> tuple[int, Any]:
    with server.lock:
        server.requests.append(body)
        server.headers.append(headers)
        fault = server.faults.pop(0) if server.faults else None
    if fault == "slow":
        server.slow.wait(30)
    elif isinstance(fault, int):
        return fault, {"error": {"message": f"fault {fault} is wanted.", "code": fault}}
    elif fault is not None:
        return 200, fault
    if path != "/v1/chat/completions":
        return 404, {"detail": "Not Found"}
    if server.key and headers.get("Authorization") != f"Bearer {server.key}":
        return 401, {"error": "Unauthorized"}
    if server.models and body["model"] not in server.models:
        return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
    content = body["messages"][0]["content"]
    text = server.answer(body["model"], content[-1]["text"], _pictures(content))
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": server.finish_reason}
    return 200, {"object": "chat.completion", "model": body["model"], "choices": [choice]}


@contextmanager
def vision_server(**settings: Any) -> Iterator[VisionServer]:
    server = VisionServer(**settings)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = _reply(server, body, dict(self.headers), self.path)
            if reply == "drop":
                self.close_connection = True
                return
            data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # a client that has stopped waiting
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        server.url = f"http://127.0.0.1:{listener.server_port}/v1"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.slow.set()
            listener.shutdown()
            thread.join()
