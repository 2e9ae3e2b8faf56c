"""The status page: only for those who have the token, and it shows in a real browser what the snapshot says."""

import http.client
import json
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import Browser, find_browser
from journals import Story
from snapshots import quiet, snapshot, story, write_run

from goku_infra.pages.incident_list import IncidentList
from goku_infra.pages.page import Page
from goku_infra.record.incidents import incidents, sentence
from goku_infra.record.journal import Event

TOKEN = "the-secret-of-the-run"
SCRIPT = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Reply(NamedTuple):
    code: int
    body: str
    headers: dict[str, str]


class Served:
    """A page of a run in a folder, with a controller that only remembers what it was asked."""

    def __init__(self, run_dir: Path, *, actions: bool = False) -> None:
        self.state = snapshot()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        write_run(run_dir, story(), self.state)
        self.page = Page(run_dir, lambda: self.state, self._answer, TOKEN, "127.0.0.1", 0, actions=actions)

    def _answer(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((command, arguments))
        if arguments.get("node") == "breaks":
            raise RuntimeError("the loop has ended")
        return {"ok": True, "text": f"{command} it is"}

    def request(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        reply = connection.getresponse()
        answer = Reply(reply.status, reply.read().decode(), dict(reply.headers))
        connection.close()
        return answer

    def get(self, path: str) -> Any:
        return json.loads(self.request(path, Authorization=f"Bearer {TOKEN}").body)

    def post(self, body: str, **changes: str) -> Reply:
        origin = f"http://127.0.0.1:{self.page.port}"
        headers = {"Authorization": f"Bearer {TOKEN}", "Origin": origin, "Content_Type": "application/json"} | changes
        return self.request("/api/ops", "POST", body, **headers)


@pytest.fixture
def served(tmp_path):
    made = Served(tmp_path)
    with made.page:
        yield made


@pytest.fixture
def acting(tmp_path):
    made = Served(tmp_path, actions=True)
    with made.page:
        yield made


PATHS = ("/", "/api/state", "/api/incidents", "/api/metrics", "/metrics", "/nothing")


@pytest.mark.parametrize("path", [*PATHS, "/?token=wrong", "/?token=", "/api/state?token=" + TOKEN])
def test_without_the_token_nothing_is_told(served, path):
    reply = served.request(path)
    assert reply.code == 401
    assert "supervisor/page_token" in reply.body and "goku_8b" not in reply.body
    assert "Set-Cookie" not in reply.headers


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xff"])
def test_another_token_is_refused(served, header):
    assert served.request("/api/state", Authorization=header).code == 401
    assert served.request("/api/state", Cookie=f"goku_{served.page.port}={header.split(' ')[-1]}x").code == 401


@pytest.mark.parametrize("path", PATHS[:-1])
def test_with_the_token_every_part_answers(served, path):
    reply = served.request(path, Authorization=f"Bearer {TOKEN}")
    assert reply.code == 200
    assert reply.headers["X-Content-Type-Options"] == "nosniff" and reply.headers["Cache-Control"] == "no-store"


def test_who_leaves_in_the_middle_of_an_answer_leaves_no_word_behind(served, capfd, caplog):
    for _ in range(5):
        connection = socket.create_connection(("127.0.0.1", served.page.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
        connection.sendall(b"GET /api/state HTTP/1.1\r\nHost: x\r\n")
        connection.close()
    assert served.request("/", Authorization=f"Bearer {TOKEN}").code == 200
    time.sleep(0.2)
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_link_with_the_token_becomes_a_cookie_that_scripts_and_other_sites_cannot_use(served):
    reply = served.request(f"/?token={TOKEN}")
    assert (reply.code, reply.headers["Location"]) == (303, "/")
    name, *attributes = reply.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)
    assert served.request("/api/state", Cookie=name).code == 200


def test_the_page_may_only_run_its_own_script(served):
    reply = served.request("/", Authorization=f"Bearer {TOKEN}")
    policy = reply.headers["Content-Security-Policy"]
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert reply.body.count(f'nonce="{nonce}"') == 2 and "{{" not in reply.body
    assert "unsafe" not in policy and "http" not in policy
    again = served.request("/", Authorization=f"Bearer {TOKEN}")
    assert nonce not in again.body


def test_state_is_the_snapshot_with_words(served):
    state = served.get("/api/state")
    assert {name: state[name] for name in ("step", "loss", "ranks", "accounts")} == {
        name: served.state[name] for name in ("step", "loss", "ranks", "accounts")
    }
    assert state["odd_ranks"].keys() == {"5"} and "stopped" in state["odd_ranks"]["5"]
    assert state["odd_nodes"] == {"n2": "lost: power-off"}
    assert state["last_event"].startswith("incident 3: rank 5 on n1 is stopped")
    assert state["actions_allowed"] == []


def test_incidents_are_read_from_the_journal(served):
    numbers = [incident["number"] for incident in served.get("/api/incidents")["incidents"]]
    assert numbers == [1, 2, 3]


def test_metrics_are_thinned_and_can_be_asked_from_a_step_on(served):
    steps = story().step
    rows = served.get("/api/metrics?points=50")["rows"]
    assert len(rows) <= 50 and rows[-1]["step"] == steps - 1
    newest = served.get(f"/api/metrics?since={steps - 4}")["rows"]
    assert [row["step"] for row in newest] == [steps - 3, steps - 2, steps - 1]
    assert served.request("/api/metrics?since=x", Authorization=f"Bearer {TOKEN}").code == 400


def test_a_read_only_page_changes_nothing(served):
    assert served.post('{"command": "restart"}').code == 403
    assert served.asked == []


def test_a_page_with_actions_passes_them_on(acting):
    reply = acting.post('{"command": "drain", "node": "n1", "reason": "fans"}')
    assert (reply.code, json.loads(reply.body)["text"]) == (200, "drain it is")
    assert acting.asked == [("drain", {"node": "n1", "reason": "fans"})]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"Origin": "http://evil.example"}, 403), ({"Origin": ""}, 403), ({"Origin": "null"}, 403),
        ({"Content_Type": "text/plain"}, 403), ({"Authorization": "Bearer wrong"}, 401),
    ],
)  # fmt: skip
def test_an_action_from_elsewhere_is_refused(acting, changes, code):
    assert acting.post('{"command": "restart"}', **changes).code == code
    assert acting.asked == []


@pytest.mark.parametrize("body", ["", "{", "[]", "1", "{}", '{"command": "state"}', '{"command": []}'])
def test_what_is_no_action_is_refused(acting, body):
    assert acting.post(body).code == 400
    assert acting.asked == []


def test_a_body_without_end_is_refused(acting):
    assert acting.request("/api/ops", "POST", None, Content_Length="99999999").code == 413


def test_a_controller_that_fails_is_said_to_have_failed(acting):
    reply = acting.post('{"command": "drain", "node": "breaks"}')
    assert reply.code == 500 and "the loop has ended" in reply.body


def test_state_is_made_once_for_each_snapshot_and_anew_for_the_next(served, monkeypatch):
    made = []
    monkeypatch.setattr("goku_infra.pages.page.view", lambda snapshot, **_: made.append(snapshot) or {"n": len(made)})
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: served.get("/api/state"), range(40)))
    assert replies == [{"n": 1}] * 40 and made == [served.state]
    served.state = dict(served.state)
    assert [served.get("/api/state") for _ in range(3)] == [{"n": 2}] * 3


def test_incidents_follow_the_journal_as_it_grows_and_nothing_is_read_twice(tmp_path, monkeypatch):
    events, path = story().events, tmp_path / "journal.jsonl"
    read = []
    monkeypatch.setattr(
        "goku_infra.pages.incident_list.Event", lambda **fields: read.append(fields["seq"]) or Event(**fields)
    )
    listed = IncidentList(path)
    assert json.loads(listed.as_json()) == {"incidents": []}
    with path.open("a") as journal:
        for count, event in enumerate(events, 1):
            line = json.dumps(vars(event), separators=(",", ":"))
            journal.write(line[:20])
            journal.flush()
            listed.as_json()  # a torn line says nothing yet
            journal.write(line[20:] + "\n")
            journal.flush()
            expected = [{**asdict(one), "sentence": sentence(one)} for one in incidents(events[:count])]
            assert listed.as_json() == json.dumps({"incidents": expected}).encode()
    assert read == [event.seq for event in events if event.kind != "progress"]


def test_incidents_leave_out_what_a_superseded_controller_has_written(tmp_path):
    told = Story().run().start().train(20).fault("killed")
    late = told.events[-1]
    told.controller().fault("killed", rank=1)
    events = [*told.events, replace(late, seq=len(told.events), data=late.data | {"incident": 9})]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(vars(event)) + "\n" for event in events))
    listed = json.loads(IncidentList(tmp_path / "journal.jsonl").as_json())["incidents"]
    assert [incident["number"] for incident in listed] == [1, 2]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_browser() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


READY = "document.body && document.body.dataset.ready === 'yes'"


def show(browser: Browser, served: Served) -> None:
    browser.errors.clear()
    browser.open(f"http://127.0.0.1:{served.page.port}/?token={TOKEN}")
    browser.wait_until(READY)


@pytest.mark.slow
def test_the_browser_shows_figures_culprit_and_charts_without_an_error(browser, served):
    show(browser, served)
    text = browser.text()
    for said in ("recovering", f"{served.state['step']:,}", "0.8431", "1,482,113", "power-off",
                 "process state T for 3.2 s", "goku-ops approve out/goku_8b 1", "waiting for nodes",
                 "4 GPUs, 94 to 97 % busy"):  # fmt: skip
        assert said in text, said
    assert f"{100 * served.state['goodput']:.1f} %" in text
    assert browser.evaluate("location.search") == "" and browser.evaluate("document.cookie") == ""
    assert browser.evaluate("[...document.querySelectorAll('.cell.odd')].map(e => e.textContent)") == ["5"]
    assert browser.evaluate("document.querySelectorAll('.cell').length") == 8
    assert browser.evaluate("document.querySelectorAll('svg path.curve').length") == 2
    assert browser.evaluate("document.querySelector('#loss path').getAttribute('d').split('L').length") > 300
    assert browser.evaluate("document.querySelectorAll('#accounts div').length") == sum(
        seconds > 0 for seconds in served.state["accounts"].values()
    )
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.errors == []


@pytest.mark.slow
def test_an_incidents_timeline_opens_on_a_click_and_stays_open(browser, served):
    show(browser, served)
    assert browser.evaluate("document.querySelector('.timeline')") is None
    browser.click(".incident:nth-of-type(2) > button")
    browser.wait_until("document.querySelector('.timeline') !== null")
    shown = browser.evaluate("document.querySelector('.timeline').innerText")
    for said in ("last sign of health", "+1.8 s", "exclude: because", "ranks started", "training again"):
        assert said in shown, said
    served.state = served.state | {"step": 99_999}
    browser.wait_until("document.body.innerText.includes('99,999')")
    assert browser.evaluate("document.querySelector('.timeline') !== null")
    browser.click(".incident:nth-of-type(2) > button")
    browser.wait_until("document.querySelector('.timeline') === null")
    assert browser.errors == []


@pytest.mark.slow
def test_text_from_the_run_is_never_markup(browser, served):
    state = snapshot()
    state["ranks"][5]["last_lines"] = [SCRIPT]
    state["nodes"][2]["reason"] = SCRIPT
    state["incidents"][-1] |= {"detail": SCRIPT, "text": SCRIPT}
    state["alerts"][0]["text"] = state["requests"][0]["text"] = state["reason"] = state["run_dir"] = SCRIPT
    served.state = state
    show(browser, served)
    browser.click(".incident > button")
    browser.wait_until("document.querySelector('.timeline') !== null")
    assert browser.text().count("<script>") >= 6
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.title") != "owned"
    assert browser.errors == []


@pytest.mark.slow
def test_the_browser_is_refused_without_the_token(browser, served):
    browser.open(f"http://127.0.0.1:{served.page.port}/?token=wrong")
    browser.wait_until("document.body && document.body.innerText.includes('token')")
    assert "goku_8b" not in browser.text()


@pytest.mark.slow
def test_a_controller_that_is_gone_is_said_to_be_gone(browser, served):
    show(browser, served)
    served.state = None  # the state cannot be told: the request fails
    browser.wait_until("document.body.innerText.includes('does not answer')")


@pytest.mark.slow
def test_an_action_asks_first_and_shows_the_answer(browser, acting):
    show(browser, acting)
    browser.evaluate("window.confirm = () => false")
    browser.click("#actions .act")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert acting.asked == []
    browser.evaluate("window.confirm = () => true")
    browser.click("#actions .act")
    browser.wait_until("document.body.innerText.includes('restart it is')")
    assert acting.asked == [("restart", {})]


@pytest.mark.slow
def test_a_quiet_run_looks_quiet(browser, served):
    served.state = quiet()
    show(browser, served)
    assert browser.evaluate("document.querySelectorAll('.odd, .last.bad').length") == 0
    assert "no incident so far" in browser.text() and "8 / 8" in browser.text()
    assert browser.errors == []
