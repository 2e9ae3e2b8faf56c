"""Models that are shown pictures and asked in words: one protocol, behind it a server or transformers.

What is asked and what becomes of the answers is the stages' affair.
"""

import base64
import http.client
import io
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from goku_mega.curate.answers import whole_sentences
from goku_mega.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]
"""[height, width, 3], RGB."""

RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""About a minute: a server behind a balancer comes back, or has room again, in less."""
BUSY = frozenset({408, 425, 429, 502, 503, 504})
"""HTTP statuses of a server that has to be asked again later."""
SLOW_TRIES = 2
"""What has taken too long twice will again."""
REQUESTS_AT_ONCE = 8
JPEG_QUALITY = 95
SHOWN_CHARACTERS = 200


class Chat(Protocol):
    """A model that can be asked. `at_once` questions may be asked side by side, from threads."""

    at_once: int

    def answer(self, prompt: str, images: Sequence[Picture]) -> str:
        """The model's answer to the pictures, in their order, and the prompt after them.

        Raises:
            DataError: there is no answer to this question.
            ConfigError: there will be no answer to any question.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Where models are and how long they may write; fields as in `CaptionConfig`."""

    server: str = ""
    api_key_file: str = ""
    max_new_tokens: int = 256
    request_timeout_s: float = 120.0
    device: str = "auto"


def open_chat(model: str, settings: ChatSettings, *, sees: bool) -> Chat:
    """A model by its name at the settings' server; without a server, from a folder or hub by transformers.

    Args:
        sees: whether it is shown pictures; matters to transformers alone.

    Raises:
        ConfigError: the key cannot be read, or transformers cannot load the model.
    """
    if settings.server:
        return ChatServer(
            model, settings.server, api_key=read_api_key(settings.api_key_file),
            max_new_tokens=settings.max_new_tokens, timeout_s=settings.request_timeout_s,
        )  # fmt: skip
    from goku_mega.curate.networks.vision_language import load_language_model, load_vision_language_model

    load = load_vision_language_model if sees else load_language_model
    return load(model, device=settings.device, max_new_tokens=settings.max_new_tokens)


def ask_all(chat: Chat, questions: Sequence[tuple[str, Sequence[Picture]]]) -> list[str]:
    """Answers in the order of the questions, asked side by side where the model can take that."""
    if chat.at_once == 1 or len(questions) < 2:
        return [chat.answer(prompt, images) for prompt, images in questions]
    with ThreadPoolExecutor(chat.at_once) as pool:
        return list(pool.map(lambda question: chat.answer(*question), questions))


def shrink(picture: Picture, max_side_px: int) -> Picture:
    """The picture with no side longer than `max_side_px`, its proportions kept; smaller ones as they are."""
    from PIL import Image

    height, width = picture.shape[:2]
    scale = max_side_px / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def read_api_key(file: str) -> str:
    """The key in a file; of no file, none.

    Raises:
        ConfigError: there is no such file, or nothing in it.
    """
    if not file:
        return ""
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the server's key cannot be read ({error}); give a text file with it") from None
    if not key or not key.isascii() or len(key.split()) != 1:
        raise ConfigError(f"{file} must hold the server's key and nothing else")
    return key


class _AskAgain(Exception):
    """This try has no answer, the next may have one."""

    def __init__(self, problem: str, *, is_slow: bool = False, is_fault: bool = False) -> None:
        super().__init__(problem)
        self.is_slow = is_slow
        self.is_fault = is_fault
        """The server has failed over this question, rather than had no room for it."""


class ChatServer:
    """A model at a server that speaks OpenAI's chat completions: vLLM, SGLang, LMDeploy and others."""

    at_once = REQUESTS_AT_ONCE

    def __init__(
        self,
        model: str,
        server: str,
        *,
        api_key: str = "",
        max_new_tokens: int = 256,
        timeout_s: float = 120.0,
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
    ) -> None:
        """
        Raises:
            ConfigError: `server` is no URL.
        """
        if not _is_url(server):
            raise ConfigError(f"the server {server!r} is no URL; write http://HOST:PORT/v1")
        self.model, self.url = model, f"{server.rstrip('/')}/chat/completions"
        self.max_new_tokens, self.timeout_s, self.retry_waits_s = max_new_tokens, timeout_s, tuple(retry_waits_s)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def answer(self, prompt: str, images: Sequence[Picture]) -> str:
        """As `Chat.answer`; a server that is busy or away is asked again, with growing waits.

        Raises:
            DataError: the server refuses this question, takes too long over it, or answers what is no answer.
            ConfigError: the server stays away, knows no such model, or refuses the key.
        """
        shown = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        question = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self.max_new_tokens,
        }
        return self._text_of(self._post(json.dumps(question).encode()))

    def _post(self, body: bytes) -> bytes:
        slow_tries = 0
        for wait_s in (*self.retry_waits_s, None):
            try:
                return self._request(body)
            except _AskAgain as reason:
                problem, slow_tries = str(reason), slow_tries + reason.is_slow
                if slow_tries == SLOW_TRIES:
                    raise DataError(
                        f"{self.url} has {slow_tries} times not answered in {self.timeout_s:g} s; raise "
                        "request_timeout_s, or start more servers"
                    ) from None
                if wait_s is None and reason.is_fault:
                    raise self._refusal(500, problem) from None
            if wait_s is not None:
                logger.warning("%s %s; asking again in %g s", self.url, problem, wait_s)
                time.sleep(wait_s)
        raise ConfigError(
            f"{self.url} {problem}, {len(self.retry_waits_s) + 1} times in a row; start the server, or change `server`"
        )

    def _request(self, body: bytes) -> bytes:
        """
        Raises:
            _AskAgain: there may be an answer later.
        """
        request = urllib.request.Request(self.url, data=body, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError as error:
            problem = f"answers {error.code}{_stated_reason(error)}"
            if error.code in BUSY or error.code >= 500:
                raise _AskAgain(problem, is_fault=error.code not in BUSY) from None
            raise self._refusal(error.code, problem) from None
        except (OSError, http.client.HTTPException) as error:
            raise _AskAgain(_connection_problem(error), is_slow=_is_timeout(error)) from None

    def _refusal(self, status: int, problem: str) -> ConfigError | DataError:
        if status in (401, 403):
            return ConfigError(f"{self.url} {problem}; name a file with a key that it takes in api_key_file")
        if status == 404:
            return ConfigError(
                f"{self.url} {problem}; it has no model {self.model!r}, or the URL is not that of its /v1"
            )
        if status in (405, 301, 302, 303, 307, 308):
            return ConfigError(f"{self.url} {problem}; it is no OpenAI-compatible server: give http://HOST:PORT/v1")
        return DataError(f"{self.url} {problem}; the question to {self.model!r} was not taken")

    def _text_of(self, reply: bytes) -> str:
        try:
            choice = json.loads(reply)["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError):
            said = " ".join(reply.decode("utf-8", "replace").split())[:SHOWN_CHARACTERS]
            raise DataError(
                f"{self.url} answers what is no chat completion ({said!r}); see that `server` is OpenAI-compatible"
            ) from None
        return whole_sentences(text) if choice.get("finish_reason") == "length" else text


def _is_url(text: str) -> bool:
    parts = urllib.parse.urlsplit(text)
    try:
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        return False


def _data_url(image: Picture) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _stated_reason(error: urllib.error.HTTPError) -> str:
    """What the server says about its refusal, in one line with brackets; empty if nothing."""
    try:
        text = error.read(64 * 1024).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        text = _message(json.loads(text))
    except ValueError:
        text = "" if text.lstrip().startswith("<") else text  # a page of a proxy says nothing in one line
    line = " ".join(text.split())[:SHOWN_CHARACTERS]
    return f" ({line.rstrip('.')})" if line else ""


def _message(content: Any) -> str:
    """The text of an error in one of the forms that servers use."""
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and name in content:
            return _message(content[name])
    return content if isinstance(content, str) else json.dumps(content)


def _is_timeout(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)


def _connection_problem(error: BaseException) -> str:
    if _is_timeout(error):
        return "takes too long"
    cause = getattr(error, "reason", error)
    return f"cannot be reached ({getattr(cause, 'strerror', None) or str(cause) or type(cause).__name__})"
