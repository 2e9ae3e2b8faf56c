"""A data set behind an S3 URL: the run on it is the run on the folder, bit by bit, and can be sampled from."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from commands import run_command
from s3_server import Fault, Front, faulty_front, make_bucket, s3_server, s3_settings

from goku_mega.config.data import CorpusConfig, EncodeConfig
from goku_mega.data.encode import TEXT_ENCODER, encode
from goku_mega.data.shapes import write_corpus
from goku_mega.data.shard_store import fetch_folder
from goku_mega.errors import DataError

pytestmark = pytest.mark.slow

STEPS = 4
LIMIT_S = 240
INTERNAL_ERROR = b"<Error><Code>InternalError</Code><Message>no luck</Message></Error>"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Fifteen samples in three shards, all of which are seen in two steps."""
    corpus, output = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("data")
    write_corpus(CorpusConfig(output=str(corpus), videos=9, images=6, height=48, width=48, frames=5, workers=1))
    encode(EncodeConfig(corpus=str(corpus), output=str(output), samples_per_shard=5, workers=1))
    return output


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    """S3, here and in the processes that a test starts, with a front that can make it fail."""
    with s3_server() as server, faulty_front(server) as running, s3_settings(running.endpoint):
        yield running


@pytest.fixture(scope="module")
def url(dataset, front) -> str:
    place = f"{make_bucket(uuid.uuid4().hex)}/some/data"
    fsspec.filesystem("s3").put(f"{dataset}/", f"{place}/", recursive=True)
    return place


@pytest.fixture(scope="module")
def local_run(dataset, tmp_path_factory) -> Path:
    """Trained in two goes on the folder."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    for steps in (STEPS, 2 * STEPS):
        train(run_dir, dataset, steps)
    return run_dir


@pytest.fixture(scope="module")
def remote_run(url, front, tmp_path_factory) -> Path:
    """The same on the URL, with faults of the store in the first go and a cache."""
    folder = tmp_path_factory.mktemp("remote")
    cached = ("data.slow_read_s=1", f"data.cache_folder={folder}/cache")
    faults = iter([Fault(deaf=True), *[Fault(status=400, body=INTERNAL_ERROR)] * 3])
    front.rule = lambda method, path: next(faults, None) if method == "GET" and "/shards/" in path else None
    train(folder / "run", url, STEPS, *cached)
    front.mend()
    front.seen.clear()
    train(folder / "run", url, 2 * STEPS, *cached)
    return folder / "run"


def train(run_dir: Path, place: Path | str, steps: int, *overrides: str) -> str:
    words = ["train", f"run_dir={run_dir}", f"data.path={place}", f"steps={steps}", "data.samples_per_step=8"]
    words += ["optimizer.warmup_steps=2", *overrides]
    return run_command(words, 1, run_dir.with_suffix(f".{steps}.log"), timeout_s=LIMIT_S)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def sample(run_dir: Path, output: Path, scratch: Path) -> "subprocess.CompletedProcess[str]":
    """One image, by a command whose temporary files are in `scratch`."""
    scratch.mkdir()
    words = [f"checkpoint={run_dir}", "prompt=a red circle", f"output={output}", "steps=2", "frames=1"]
    return subprocess.run(
        [sys.executable, "-m", "goku_mega.cli", "sample", *words, "height=48", "width=48", "weights=model"],
        env=os.environ | {"TMPDIR": str(scratch)}, text=True, capture_output=True, timeout=LIMIT_S,
    )  # fmt: skip


def test_a_run_on_a_url_and_its_resume_have_the_losses_of_the_folder_bit_by_bit(local_run, remote_run):
    assert "resumed from" in remote_run.with_suffix(f".{2 * STEPS}.log").read_text()
    local, remote = rows(local_run), rows(remote_run)
    assert [row["step"] for row in remote] == list(range(2 * STEPS))
    for name in ("loss", "gradient_norm", "tokens"):
        assert [row[name] for row in remote] == [row[name] for row in local]
    assert len({row["loss"] for row in local}) == 2 * STEPS


def test_the_rows_tell_what_the_store_did_wrong(local_run, remote_run):
    first = rows(remote_run)[STEPS - 1]
    assert first["read_failures"] >= 1 and first["slow_reads"] >= 1
    assert all(row["read_failures"] == row["slow_reads"] == 0 for row in rows(local_run))


def test_a_cache_that_has_all_leaves_no_shard_to_be_asked_for_by_the_next_run(remote_run, front):
    asked = [path for method, path in front.seen if method == "GET"]
    assert any("dataset.json" in path for path in asked)
    assert not [path for path in asked if "/shards/" in path]


def test_sampling_finds_the_text_encoder_behind_the_url_and_leaves_no_copy(local_run, remote_run, tmp_path):
    for name, run_dir in (("local", local_run), ("remote", remote_run)):
        done = sample(run_dir, tmp_path / f"{name}.png", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert not list((tmp_path / name).glob("goku_mega_text_*"))
    assert (tmp_path / "remote.png").read_bytes() == (tmp_path / "local.png").read_bytes()


def test_a_text_encoder_that_is_gone_from_the_url_is_one_line(url, remote_run, tmp_path):
    store, gone = fsspec.filesystem("s3"), f"{url}/{TEXT_ENCODER}"
    kept = {path: store.cat_file(path) for path in store.find(gone)}
    store.rm(gone, recursive=True)
    done = sample(remote_run, tmp_path / "nothing.png", tmp_path / "scratch")
    for path, content in kept.items():
        store.pipe_file(path, content)
    assert done.returncode == 2 and kept
    assert f"needs its data set's text encoder, but {gone} is gone" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "nothing.png").exists()


def test_a_folder_is_fetched_whole_from_a_store_that_fails_now_and_then(dataset, url, front, tmp_path):
    front.fail(Fault(status=400, body=INTERNAL_ERROR), times=2, method="GET")
    assert fetch_folder(url, TEXT_ENCODER, tmp_path) == tmp_path / TEXT_ENCODER
    front.mend()
    names = {path.name for path in (dataset / TEXT_ENCODER).iterdir()}
    assert len(names) > 2
    assert {path.name: path.read_bytes() for path in (tmp_path / TEXT_ENCODER).iterdir()} == {
        name: (dataset / TEXT_ENCODER / name).read_bytes() for name in names
    }
    assert fetch_folder(url, "no_such_folder", tmp_path) is None


def test_a_folder_that_may_not_be_read_is_one_line(url, front, tmp_path):
    denied = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    front.fail(Fault(status=403, body=denied), method="GET")
    fsspec.filesystem("s3").invalidate_cache()
    with pytest.raises(DataError, match=f"{url}/{TEXT_ENCODER} cannot be listed .*; see to the place and the right"):
        fetch_folder(url, TEXT_ENCODER, tmp_path)
    front.mend()
