"""Encoding: whatever happens on the way, the same bytes in the end; bad files are listed, not fatal."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from goku_mega.config.data import CorpusConfig, EncodeConfig
from goku_mega.data.captions import read_captions
from goku_mega.data.encode import encode, fit_to_strides
from goku_mega.data.shapes import write_corpus
from goku_mega.data.shards import ShardReader, load_index
from goku_mega.encoders.vae import latent_shape
from goku_mega.errors import ConfigError, DataError, MediaError

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


def settings(corpus: Path, output: Path, **changes: Any) -> EncodeConfig:
    return EncodeConfig(corpus=str(corpus), output=str(output), samples_per_shard=4, workers=1, **changes)


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
        assert sample.latent.shape == (8, (frames - 1) // 4 + 1, height // 8, width // 8)
        assert sample.text.shape[1] == index.text_width


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def family(group: int) -> dict[int, int]:
    """The living processes of a process group: number -> parent's number."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def has_shards(output: Path, count: int) -> bool:
    return output.exists() and len(list(output.glob("shards/*.tar"))) >= count


@pytest.mark.parametrize(("victim", "shards"), [("all", 0), ("command", 2), ("all", 5)])
def test_a_killed_encoding_run_again_gives_the_same_bytes(corpus, unbroken, tmp_path, victim, shards):
    """SIGKILL after some shards, for the command and its workers at once or for the command alone."""
    output = tmp_path / "data"
    process = start(corpus, output)
    wait_until(lambda: has_shards(output, shards))
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate(timeout=LIMIT_S)
    wait_until(lambda: not family(process.pid))  # workers do not outlive the command
    code, errors = run(corpus, output)
    assert code == 0, errors
    assert contents(output) == contents(unbroken)


def test_a_killed_worker_ends_the_command_with_what_to_do(corpus, unbroken, tmp_path):
    output = tmp_path / "data"
    process = start(corpus, output)
    wait_until(lambda: has_shards(output, 1))
    members = family(process.pid)
    worker = next(number for number, parent in members.items() if parent in members and parent != process.pid)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert "an encoding worker was killed; run the command again" in errors.splitlines()[-1]
    code, errors = run(corpus, output)
    assert code == 0, errors
    assert contents(output) == contents(unbroken)


def test_two_workers_give_the_same_bytes_and_a_second_command_is_kept_away(corpus, unbroken, tmp_path):
    output = tmp_path / "data"
    first = start(corpus, output, "workers=2")
    wait_until(lambda: has_shards(output, 1))
    with pytest.raises(DataError, match="another command is encoding into"):
        encode(settings(corpus, output))
    first.communicate(timeout=LIMIT_S)
    assert first.returncode == 0
    assert contents(output) == contents(unbroken)


def test_what_a_kill_after_the_last_commit_left_is_cleared_away(corpus, unbroken, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(unbroken, output)
    (output / "parts").mkdir()
    (output / "parts" / "00003.json").write_text("{}")
    encode(settings(corpus, output))
    assert contents(output) == contents(unbroken)


def test_a_shard_of_clips_that_do_not_fit_into_memory_together_has_the_same_bytes(
    corpus, unbroken, tmp_path, monkeypatch
):
    from goku_mega.data import encode as module

    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    whole = module._tasks(settings(corpus, unbroken), read_captions(corpus), "")[2]
    task = replace(whole, output=tmp_path, text=str(unbroken / "text_encoder"))
    (tmp_path / "parts").mkdir()
    module._make_shard(task)
    assert task.shard.read_bytes() == whole.shard.read_bytes()


@settings_of_hypothesis(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70))
def test_clips_are_cut_to_the_strides_around_their_centre(frames, height, width):
    rows, columns = np.arange(height), np.arange(width)
    clip = np.broadcast_to((rows[:, None] * 2 + columns)[None, :, :, None], (frames, height, width, 3)).astype(np.uint8)
    if min(height, width) < 16:
        with pytest.raises(MediaError, match="too small"):
            fit_to_strides(clip)
        return
    kept = fit_to_strides(clip)
    latent_shape(*kept.shape[:3])  # raises where the strides do not divide the clip
    assert frames - 4 < len(kept) <= frames and height - 16 < kept.shape[1] and width - 16 < kept.shape[2]
    top, left = (height - kept.shape[1]) // 2, (width - kept.shape[2]) // 2
    assert kept[0, 0, 0, 0] == 2 * top + left


def test_a_folder_begun_with_other_settings_is_refused(corpus, unbroken):
    code, errors = run(corpus, unbroken, "max_frames=5")
    assert code == 2
    assert "was begun with max_frames=241, now it is 5" in errors


def test_an_error_leaves_nothing_behind(tmp_path):
    output = tmp_path / "data"
    (tmp_path / "bad.mp4").write_bytes(b"junk")
    (tmp_path / "captions.jsonl").write_text('{"key": "a", "file": "bad.mp4", "caption": "a red circle"}\n')
    with pytest.raises(DataError, match=r"no file of .* can be decoded; the first: .*bad\.mp4"):
        encode(settings(tmp_path, output))
    assert not output.exists()
    with pytest.raises(ConfigError, match="vae 'tinny/' cannot be loaded"):
        encode(settings(tmp_path, output, vae="tinny/"))
    assert not output.exists()
    with pytest.raises(DataError, match="cannot make the folder"):
        encode(settings(tmp_path, tmp_path / "bad.mp4" / "data"))
