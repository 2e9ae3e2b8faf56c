"""Controller, agents and operators speak in lines; nobody without the token is heard."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from goku_infra import messages
from goku_infra.errors import OpsError
from goku_infra.messages import (
    CONTROLLER_FILE,
    ask,
    credentials,
    encode,
    ensure_token,
    is_known,
    is_proof,
    page_token,
    prove,
    read_address,
    replace_file,
    supervisor_folder,
)


def test_a_message_is_one_line():
    line = encode({"kind": "ended", "last_lines": ["a\nb", "ü\u2028"]})
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"kind": "ended", "last_lines": ["a\nb", "ü\u2028"]}


def test_the_token_is_made_once_by_many_processes(tmp_path):
    program = (
        "import sys, pathlib; from goku_infra.messages import ensure_token\n"
        "print(ensure_token(pathlib.Path(sys.argv[1])))"
    )
    makers = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
        for _ in range(12)
    ]
    tokens = {maker.communicate()[0].strip() for maker in makers}
    assert len(tokens) == 1
    assert len(tokens.pop()) >= 32
    path = tmp_path / "run" / "token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [found.name for found in path.parent.iterdir()] == ["token"]


def test_a_file_is_read_whole_while_it_is_replaced(tmp_path):
    path = tmp_path / "state.json"
    replace_file(path, json.dumps(["x"] * 5000))
    done = threading.Event()

    def write() -> None:
        for number in range(300):
            replace_file(path, json.dumps([str(number)] * 5000))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert len(set(json.loads(path.read_text()))) == 1
    writer.join()


@pytest.mark.parametrize("text", [None, "", "{", '{"host": "a", "po'])
def test_an_address_that_is_not_there_or_torn_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / CONTROLLER_FILE).write_text(text)
    assert read_address(tmp_path) is None


@contextmanager
def answering(run_dir: Path, answer: bytes, token: str = "") -> Iterator[list[bytes]]:
    """A controller that has only one answer; with another `token` than the run's, one that is none."""
    heard: list[bytes] = []
    token = token or ensure_token(supervisor_folder(run_dir))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                heard.append(connection.makefile("rb").readline())
                connection.sendall(prove(token, json.loads(heard[0])["nonce"]) + answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = {"host": "127.0.0.1", "port": server.getsockname()[1], "epoch": 3}
        folder = supervisor_folder(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / CONTROLLER_FILE, json.dumps(address))
        yield heard
        thread.join()


def test_an_answer_comes_back(tmp_path):
    with answering(tmp_path, encode({"ok": True, "text": "done"})) as heard:
        assert ask(tmp_path, "drain", node="n1", reason="hot") == {"ok": True, "text": "done"}
    request = json.loads(heard[0])
    token = ensure_token(supervisor_folder(tmp_path))
    assert is_known(token, 3, request.pop("key")) and request.pop("nonce")
    assert request == {"kind": "ops", "command": "drain", "node": "n1", "reason": "hot"}


def test_who_has_taken_the_port_of_a_controller_is_not_believed_and_learns_nothing_of_use(tmp_path):
    with (
        answering(tmp_path, encode({"ok": True, "text": "done"}), token="another") as heard,
        pytest.raises(OpsError, match="is not that controller"),
    ):
        ask(tmp_path, "stop")
    token = ensure_token(supervisor_folder(tmp_path))
    assert token.encode() not in heard[0]
    key = json.loads(heard[0])["key"]
    assert is_known(token, 3, key) and not is_known(token, 4, key)
    assert key != page_token(token) != token


def test_a_proof_is_for_one_token_and_one_connection():
    first, second = credentials("token", 1), credentials("token", 1)
    assert first["key"] == second["key"] and first["nonce"] != second["nonce"]
    line = prove("token", first["nonce"])
    assert is_proof("token", first["nonce"], line)
    assert not is_proof("token", second["nonce"], line) and not is_proof("other", first["nonce"], line)
    for other in (b"", b"\n", b"{}", b"\xff\n", line[:-5]):
        assert not is_proof("token", first["nonce"], other)


@pytest.mark.parametrize("answer", [b"", b'{"ok": tr', b"no json\n"])
def test_a_torn_answer_is_an_error_that_says_where(tmp_path, answer):
    with answering(tmp_path, answer), pytest.raises(OpsError, match=r"does not answer at 127\.0\.0\.1"):
        ask(tmp_path, "stop")


def test_an_oversized_answer_is_cut_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "LINE_LIMIT", 1000)
    with (
        answering(tmp_path, encode({"ok": True, "text": "x" * 2000})),
        pytest.raises(OpsError, match="does not answer"),
    ):
        ask(tmp_path, "state")


def test_a_refusal_is_told_in_its_own_words(tmp_path):
    refusal = encode({"ok": False, "error": "there is no node n9"})
    with answering(tmp_path, refusal), pytest.raises(OpsError, match="^there is no node n9$"):
        ask(tmp_path, "drain", node="n9")


def test_without_a_controller_the_error_says_what_to_give(tmp_path):
    with pytest.raises(OpsError, match="has no controller; give the run_dir"):
        ask(tmp_path, "stop")


def test_a_controller_that_is_gone_is_named(tmp_path):
    folder = supervisor_folder(tmp_path)
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    replace_file(folder / CONTROLLER_FILE, json.dumps({"host": "127.0.0.1", "port": port, "epoch": 1}))
    with pytest.raises(OpsError, match=f"does not answer at 127.0.0.1:{port}.*is the job running"):
        ask(tmp_path, "stop")


def test_an_empty_token_lets_nobody_in(tmp_path):
    (tmp_path / "token").touch()
    with pytest.raises(OpsError, match="token is empty; remove it"):
        ensure_token(tmp_path)
