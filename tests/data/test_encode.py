"""Encoding: whatever happens on the way, the same bytes in the end; bad files are listed, not fatal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from goku_mega.config import CorpusConfig
from goku_mega.data.shapes import write_corpus
from goku_mega.data.shards import ShardReader, load_index

pytestmark = pytest.mark.slow

LIMIT_S = 240


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Real files, one video cut short and one that is no video."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(CorpusConfig(output=str(folder), videos=20, images=8, varied_fraction=0.5, workers=1))
    (folder / "videos" / "000003.mp4").write_bytes((folder / "videos" / "000003.mp4").read_bytes()[:900])
    (folder / "videos" / "000011.mp4").write_bytes(b"no video at all")
    return folder


def start(corpus: Path, output: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "goku_mega.cli", "encode", f"corpus={corpus}", f"output={output}",
        "samples_per_shard=4", "workers=1", *overrides,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def run(corpus: Path, output: Path, *overrides: str) -> tuple[int, str]:
    process = start(corpus, output, *overrides)
    _, errors = process.communicate(timeout=LIMIT_S)
    return process.returncode, errors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "data"
    code, errors = run(corpus, output)
    assert code == 0, errors
    return output


def test_corrupt_files_are_skipped_and_listed(unbroken):
    skipped = [json.loads(line) for line in (unbroken / "skipped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in skipped] == ["video-000003", "video-000011"]
    assert all(row["file"] in row["reason"] for row in skipped)
    assert json.loads((unbroken / "dataset.json").read_text())["samples"] == 26


def test_latents_have_the_strides_of_the_vae(corpus, unbroken):
    from goku_mega.media.decode import decode_media

    index = load_index(unbroken)
    reader = ShardReader(index)
    files = {json.loads(line)["key"]: json.loads(line)["file"] for line in (corpus / "captions.jsonl").open()}
    for number in range(len(index)):
        sample = reader.read(number)
        frames, height, width, _ = decode_media(corpus / files[sample.key]).shape
        assert sample.latent.shape == (16, (frames - 1) // 4 + 1, height // 8, width // 8)
        assert sample.text.shape[1] == index.text_width


@pytest.mark.parametrize("shards", [0, 2, 5])
def test_a_killed_encoding_run_again_gives_the_same_bytes(corpus, unbroken, tmp_path, shards):
    """SIGKILL for the command and its workers at once, after some shards."""
    output = tmp_path / "data"
    process = start(corpus, output)
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and len(list(output.glob("shards/*.tar"))) < shards or not output.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    code, errors = run(corpus, output)
    assert code == 0, errors
    assert contents(output) == contents(unbroken)


def test_more_workers_give_the_same_bytes(corpus, unbroken, tmp_path):
    code, errors = run(corpus, tmp_path / "data", "workers=2")
    assert code == 0, errors
    assert contents(tmp_path / "data") == contents(unbroken)


def test_a_folder_begun_with_other_settings_is_refused(corpus, unbroken):
    code, errors = run(corpus, unbroken, "max_frames=5")
    assert code == 2
    assert "was begun with max_frames=241, now it is 5" in errors


def test_a_corpus_without_a_readable_file_or_that_is_missing_is_refused(tmp_path):
    code, errors = run(tmp_path / "nowhere", tmp_path / "a")
    assert code == 2 and "captions.jsonl is missing" in errors
    (tmp_path / "bad.mp4").write_bytes(b"junk")
    (tmp_path / "captions.jsonl").write_text('{"key": "a", "file": "bad.mp4", "caption": "a red circle"}\n')
    code, errors = run(tmp_path, tmp_path / "b")
    assert code == 2 and "no file of" in errors and "bad.mp4" in errors
    assert not (tmp_path / "b" / "dataset.json").exists()
