"""The metrics, the alert rules and the dashboard, with a real Prometheus: what is exported is what they ask for."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from snapshots import node, quiet, rank, snapshot, story, write_run

from goku_infra.pages import page
from goku_infra.pages.page import Page
from goku_infra.pages.prometheus import RANK_SERIES_LIMIT, TARGETS_FILE, render, targets

REPOSITORY = Path(__file__).parents[2]
RULES = REPOSITORY / "infra/prometheus/rules.yml"
RULE_TESTS = Path(__file__).with_name("alert_rules.yml")
CONFIG = REPOSITORY / "infra/prometheus/prometheus.yml"
DASHBOARD = REPOSITORY / "infra/grafana/dashboard.json"
TOKEN = "the-secret-of-the-run"
LIMIT_S = 60.0

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is missing: apt install prometheus")
needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="prometheus is missing: apt install prometheus"
)


def families(text: str) -> dict[str, str]:
    """Metric name -> type."""
    return dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))


def series(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]


def asked_for(expression: str) -> set[str]:
    """The metrics that an expression needs."""
    return set(re.findall(r"\bgoku_\w+", expression))


def panels() -> list[dict[str, Any]]:
    return list(json.loads(DASHBOARD.read_text())["panels"])


def dashboard_expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return found + [row["expr"] for row in board["annotations"]["list"]]


@needs_promtool
@pytest.mark.parametrize("made", [snapshot(), quiet(), quiet(ranks=[], nodes=[], loss=None, incidents=[])])
def test_the_metrics_are_what_prometheus_calls_well_formed(made):
    done = subprocess.run(["promtool", "check", "metrics"], input=render(made), capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_is_not_known_has_no_line_and_what_may_go_back_is_no_counter():
    text = render(quiet(loss=None))
    assert not series(text, "goku_loss") and "goku_loss" not in families(text)
    assert families(text)["goku_step"] == families(text)["goku_time_seconds"] == "gauge"
    for name, kind in families(text).items():
        assert (kind == "counter") == name.endswith("_total"), name


def test_a_large_run_has_series_of_its_own_only_for_odd_ranks():
    ranks = [rank(number) for number in range(RANK_SERIES_LIMIT + 1)]
    ranks[77] |= {"process_state": "T"}
    text = render(snapshot(ranks=ranks, incidents=[]))
    assert [line.split("{")[1].split(",")[0] for line in series(text, "goku_rank_step")] == ['rank="77"']
    assert len(series(render(snapshot(ranks=ranks[:-1])), "goku_rank_step")) == RANK_SERIES_LIMIT


def test_gpus_have_series_of_their_own_and_in_a_large_run_those_of_odd_nodes():
    text = render(snapshot())
    assert len(series(text, "goku_gpu_busy_ratio")) == 3 * 4  # the lost node's are not known any more
    assert 'goku_gpu_power_watts{node="n0",gpu="3"} 640.5' in text
    nodes = [node(f"n{number}") for number in range(RANK_SERIES_LIMIT // 4 + 1)]
    nodes[7] |= {"health": ["warning: GPU 2 is hot"]}
    lines = series(render(snapshot(nodes=nodes)), "goku_gpu_temperature_celsius")
    assert len(lines) == 4 and all('node="n7"' in line for line in lines)


@needs_promtool
def test_a_folder_with_odd_characters_is_a_label_all_the_same():
    text = render(snapshot(run_dir='a "b"\\c\nd'))
    assert 'run_dir="a \\"b\\"\\\\c\\nd"' in text
    assert subprocess.run(["promtool", "check", "metrics"], input=text, text=True).returncode == 0


@needs_promtool
def test_every_alert_fires_when_it_should_and_not_when_it_should_not():
    done = subprocess.run(["promtool", "test", "rules", str(RULE_TESTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test():
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    assert {name for name in alerts if name not in RULE_TESTS.read_text()} == set()


def test_rules_and_dashboard_ask_only_for_metrics_that_are_exported():
    rules = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    wanted = set().union(*map(asked_for, rules + dashboard_expressions()))
    assert len(wanted) > 20 and wanted <= set(families(render(snapshot())))


def test_the_dashboards_panels_lie_side_by_side_on_its_grid():
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    identities = [panel["id"] for panel in panels()]
    assert len(set(identities)) == len(identities)


class Prometheus:
    """A real one with the repository's configuration, but quick; a context manager."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        config = CONFIG.read_text().replace("RUN_DIR", str(run_dir)).replace("interval: 5s", "interval: 200ms")
        (folder / "prometheus.yml").write_text(config)
        (folder / "rules.yml").write_text(re.sub(r"for: \w+", "for: 0s", RULES.read_text()))
        self.words = [
            "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn",
        ]  # fmt: skip
        self.log = folder / "log"

    def __enter__(self) -> "Prometheus":
        with self.log.open("w") as log:
            environment = {**os.environ, "GOMAXPROCS": "1"}
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log, env=environment)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def get(self, path: str, **query: str) -> Any:
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.get("query", query=expression)["result"])

    def firing(self) -> dict[str, dict[str, str]]:
        """Name -> labels."""
        alerts = self.get("alerts")["alerts"]
        return {row["labels"]["alertname"]: row["labels"] for row in alerts if row["state"] == "firing"}

    def scraped(self) -> list[tuple[str, str]]:
        return [(row["scrapeUrl"], row["health"]) for row in self.get("targets")["activeTargets"]]

    def until(self, found: Any, what: str) -> Any:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if result := found():
                    return result
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"no {what} within {LIMIT_S} s\n{self.log.read_text()}")


class Run:
    """A run's folder with a page that shows `state`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = quiet(run_dir=str(folder), time_s=time.time())
        write_run(folder, story(), self.state)
        (folder / "supervisor/page_token").write_text(TOKEN)

    @contextlib.contextmanager
    def page(self) -> Iterator[Page]:
        """As a controller serves it."""
        with Page(self.folder, lambda: self.state, lambda *_: {}, TOKEN, "127.0.0.1", 0) as page:
            text = targets(str(self.folder), "127.0.0.1", page.port)
            (self.folder / "supervisor" / TARGETS_FILE).write_text(text)
            yield page


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def prometheus(tmp_path, run):
    folder = tmp_path / "prometheus"
    folder.mkdir()
    with Prometheus(folder, run.folder) as started:
        yield started


@pytest.mark.slow
@needs_prometheus
def test_a_real_prometheus_scrapes_the_page_raises_alerts_and_draws_the_dashboard(run, prometheus):
    with run.page():
        of_the_run = f'{{instance="{run.folder}"}}'
        prometheus.until(lambda: prometheus.query(f"count_over_time(goku_step{of_the_run}[1m]) > 3"), "samples")
        assert set(prometheus.firing()) == set()
        run.state = snapshot(run_dir=str(run.folder), time_s=time.time())
        wanted = {"GokuIncident", "GokuApprovalNeeded", "GokuNodeLost", "GokuNotTraining"}
        prometheus.until(lambda: wanted <= set(prometheus.firing()), "alerts")
        assert prometheus.firing()["GokuNodeLost"]["instance"] == str(run.folder)
        (sample,) = prometheus.query(f"goku_committed_step{of_the_run}")
        assert float(sample["value"][1]) == run.state["committed_step"]
        for expression in dashboard_expressions():
            assert prometheus.query(expression.replace("$run", str(run.folder))), expression


@pytest.mark.slow
@needs_prometheus
def test_prometheus_follows_a_controller_to_another_port_and_says_when_there_is_none(run, prometheus, monkeypatch):
    # The connections of a controller end with its process, which here goes on.
    monkeypatch.setattr(page._Handler, "protocol_version", "HTTP/1.0")
    with run.page() as one:
        prometheus.until(lambda: (f"http://127.0.0.1:{one.port}/metrics", "up") in prometheus.scraped(), "target")
    prometheus.until(lambda: "GokuNoController" in prometheus.firing(), "alert")
    with run.page() as other:
        where = [(f"http://127.0.0.1:{other.port}/metrics", "up")]
        prometheus.until(lambda: prometheus.scraped() == where, "target")
        prometheus.until(lambda: "GokuNoController" not in prometheus.firing(), "end of the alert")
        assert len(prometheus.query("goku_step")) == 1


@pytest.mark.slow
@needs_prometheus
def test_prometheus_with_another_token_is_told_nothing(run, prometheus):
    (run.folder / "supervisor/page_token").write_text("another")
    with run.page():
        prometheus.until(lambda: [health for _, health in prometheus.scraped()] == ["down"], "refusal")
        assert not prometheus.query("goku_step")
