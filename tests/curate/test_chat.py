"""Questions to models: pictures arrive as they are, answers come back, and what goes wrong is said in one line."""

import itertools
import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vision_server import COLORS, VisionServer, vision_server

from goku_mega.curate.answers import tidy, whole_sentences
from goku_mega.curate.chat import ChatServer, ChatSettings, ask_all, open_chat, read_api_key, shrink
from goku_mega.errors import ConfigError, DataError

WAITS_S = (0.01, 0.02, 0.03)


def plain(color: str, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), COLORS[color], np.uint8)


@pytest.fixture
def server():
    with vision_server() as running:
        yield running


def chat(server: VisionServer, **settings) -> ChatServer:
    return ChatServer("watcher", server.url, **{"retry_waits_s": WAITS_S, "timeout_s": 10.0, **settings})


def test_pictures_arrive_in_their_order_and_size(server):
    for colors in itertools.permutations(("red", "green", "blue")):
        pictures = [plain(color, 40 + 8 * number, 64) for number, color in enumerate(colors)]
        expected = ", ".join(f"{color} 64x{40 + 8 * number}" for number, color in enumerate(colors))
        assert chat(server).answer("What is it?", pictures) == f"watcher saw {expected}."


def test_a_picture_arrives_nearly_as_it_was(server):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], ramp[None, ::-1]), axis=-1)
    arrived = []
    server.answer = lambda model, prompt, pictures: arrived.extend(pictures) or "Seen."
    chat(server).answer("What is it?", [picture])
    assert np.abs(arrived[0].astype(int) - picture).mean() < 1.5


def test_a_question_is_the_prompt_behind_the_pictures_and_asks_for_the_likeliest_words(server):
    chat(server, max_new_tokens=17).answer("What is it?", [plain("red")])
    (body,) = server.requests
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    assert body["messages"][0]["content"][1]["text"] == "What is it?"
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("watcher", 0, 0, 17)


def test_a_question_needs_no_pictures(server):
    assert chat(server).answer("Merge.\nA cat. A dog.", []) == "watcher read: A cat. A dog."


def test_questions_asked_side_by_side_are_answered_in_their_order():
    together = threading.Barrier(4, timeout=5)

    def answer(model, prompt, pictures):
        together.wait()  # passes only if four questions are there at once
        return prompt

    with vision_server(answer=answer) as server:
        assert ask_all(chat(server), [(f"{number}", ()) for number in range(8)]) == [f"{number}" for number in range(8)]


@pytest.mark.parametrize("fault", [429, 500, 502, 503, 504, "drop"])
def test_a_server_with_a_weak_moment_is_asked_again(server, fault):
    server.faults = [fault, fault]
    assert chat(server).answer("What is it?", [plain("red")]) == "watcher saw red 64x48."
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "error"), [(429, ConfigError), (503, ConfigError), ("drop", ConfigError), (500, DataError)]
)
def test_asking_again_has_an_end(server, fault, error):
    """A server that stays away ends the run; one that stumbles over a question loses that one alone."""
    server.faults = [fault] * 10
    with pytest.raises(error) as caught:
        chat(server).answer("What is it?", [])
    assert len(server.requests) == 1 + len(WAITS_S)
    assert_one_line(caught.value, server.url)


def test_waits_between_tries_grow(server, caplog):
    server.faults = [503] * 3
    chat(server).answer("What is it?", [])
    assert [record.args[-1] for record in caplog.records] == list(WAITS_S)


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(ConfigError, match="cannot be reached.*start the server") as caught:
            ChatServer("watcher", url, retry_waits_s=WAITS_S).answer("What is it?", [])
    assert_one_line(caught.value, url)


def test_a_slow_answer_is_given_up_after_the_second_try():
    with vision_server(faults=["slow"] * 10) as server:
        with pytest.raises(DataError, match="not answered in 0.2 s"):
            chat(server, timeout_s=0.2).answer("What is it?", [])
        assert len(server.requests) == 2


def test_one_slow_answer_is_forgiven():
    with vision_server(faults=["slow"]) as server:
        assert chat(server, timeout_s=1.0).answer("Merge.", []) == "watcher read: Merge."


@pytest.mark.parametrize(
    ("status", "error", "remedy"),
    [(400, DataError, "was not taken"), (413, DataError, "was not taken"), (403, ConfigError, "api_key_file")],
)
def test_a_refusal_is_told_in_the_servers_words_and_not_repeated(server, status, error, remedy):
    server.faults = [status]
    with pytest.raises(error, match=rf"answers {status} \(fault {status} is wanted\).*{remedy}") as caught:
        chat(server).answer("What is it?", [])
    assert len(server.requests) == 1
    assert_one_line(caught.value, server.url)


def test_an_unknown_model_and_a_wrong_path_are_told(server):
    server.models = ("other",)
    with pytest.raises(ConfigError, match="The model `watcher` does not exist.*no model 'watcher'"):
        chat(server).answer("What is it?", [])
    server.url = server.url.removesuffix("/v1")
    with pytest.raises(ConfigError, match="404 \\(Not Found\\).*not that of its /v1"):
        chat(server).answer("What is it?", [])


@pytest.mark.parametrize(
    "reply", ["", "<html>", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}']
)
def test_what_is_no_answer_is_refused(server, reply):
    server.faults = [reply]
    with pytest.raises(DataError, match="no chat completion") as caught:
        chat(server).answer("What is it?", [])
    assert_one_line(caught.value, server.url)


def test_a_key_is_sent_and_a_wrong_one_told(server, tmp_path):
    server.key = "secret-7"
    (tmp_path / "key").write_text("secret-7\n")
    settings = ChatSettings(server=server.url, api_key_file=str(tmp_path / "key"))
    assert open_chat("watcher", settings, sees=True).answer("Merge.", []) == "watcher read: Merge."
    with pytest.raises(ConfigError, match="answers 401 \\(Unauthorized\\).*api_key_file") as caught:
        chat(server, api_key="wrong").answer("Merge.", [])
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff\xfe"])
def test_a_file_without_a_key_is_refused_by_name(tmp_path, content):
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="key"):
        read_api_key(str(file))


@pytest.mark.parametrize("server", ["node7:8000/v1", "http://", "http://node7:port/v1", "ftp://node7/v1"])
def test_what_is_no_url_is_refused_before_anything_is_asked(server):
    with pytest.raises(ConfigError, match="no URL"):
        ChatServer("watcher", server)


def test_an_answer_that_was_cut_short_ends_with_a_whole_sentence(server):
    server.answer = lambda *_: "A cat of 3.5 kg jumps. It lan"
    server.finish_reason = "length"
    assert chat(server).answer("What is it?", []) == "A cat of 3.5 kg jumps."
    server.finish_reason = "stop"
    assert chat(server).answer("What is it?", []) == "A cat of 3.5 kg jumps. It lan"


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90))
def test_no_side_is_longer_than_the_limit_and_proportions_stay(height, width, limit):
    made = shrink(np.zeros((height, width, 3), np.uint8), limit)
    assert max(made.shape[:2]) == min(limit, max(height, width))
    scale = min(1.0, limit / max(height, width))
    assert abs(made.shape[0] - height * scale) <= 1 and abs(made.shape[1] - width * scale) <= 1


def test_what_is_small_enough_stays_as_it_is():
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    assert np.array_equal(shrink(picture, 40), picture)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" A cat\n jumps. \n", "A cat jumps."),
        ('"A cat jumps."', "A cat jumps."),
        ('"A cat" and "a dog"', '"A cat" and "a dog"'),
        ('A sign says "stop"', 'A sign says "stop"'),
        ("```text\nA cat jumps.\n```", "A cat jumps."),
        ("<think>Is it a dog? No.</think>\n\nA cat jumps.", "A cat jumps."),
        ("<think>Is it a dog? It has", ""),
        ('"', '"'),
        ("", ""),
    ],
)
def test_answers_are_freed_of_what_is_no_caption(answer, expected):
    assert tidy(answer) == expected


@given(st.text())
def test_a_tidied_answer_is_one_line(answer):
    text = tidy(answer)
    assert len(text.splitlines()) <= 1 and text == " ".join(text.split())


@given(st.text())
def test_whole_sentences_are_a_beginning_of_the_answer(answer):
    whole = whole_sentences(answer)
    assert answer.startswith(whole) and (whole == answer or whole.rstrip("\"”')")[-1] in ".!?")


def assert_one_line(error: Exception, *parts: str) -> None:
    assert len(str(error).splitlines()) == 1
    assert all(part in str(error) for part in parts)
