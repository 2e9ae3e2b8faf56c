"""`goku-mega curate` on real files: scored once, killed at will, dealt to several commands, and the same in the end."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_media import Texture, pan, write_clip
from pyarrow import parquet
from small_corpus import overrides, settings, write_corpus
from vision_server import vision_server

from goku_mega.config.curation import (
    BalanceConfig,
    CaptionConfig,
    DedupConfig,
    HookConfig,
    KeyFramesConfig,
    ShotsConfig,
    TagConfig,
)
from goku_mega.config.data import EncodeConfig
from goku_mega.curate.curate import curate, filter_clips
from goku_mega.curate.motion_text import split_motion
from goku_mega.data.captions import read_captions
from goku_mega.data.encode import encode
from goku_mega.data.shards import load_index
from goku_mega.errors import ConfigError, DataError
from goku_mega.media.decode import PyAvVideo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OUTPUTS = ("sources.parquet", "manifest.parquet", "captions.jsonl")
LIMIT_S = 240


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory) -> Path:
    """The output of one run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    curate(settings(videos, output))
    return output


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def rows(path: Path) -> list[dict]:
    return parquet.read_table(path).to_pylist()


def scored(output: Path) -> Counter:
    """Scores that are there, of every stage under all its settings."""
    return Counter({path.parent.name: len(rows(path)) for path in (output / "scores").glob("*/*.parquet")})


def command(videos: Path, output: Path, *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "goku_mega.cli", "curate", *overrides(videos, output), "workers=2", *words]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip


def test_every_source_has_a_verdict_and_every_clip_a_tier_or_a_reason(videos, whole):
    sources = {Path(row["path"]).name: row for row in rows(whole / "sources.parquet")}
    assert {name: row["reason"] for name, row in sources.items() if row["reason"]} == {
        "cut.mp4": "same content as an earlier file",
        "broken.mp4": "set aside in probe: media",
        "tiny.mp4": "short_side_px < 48",
    }
    assert "broken.mp4" in sources["broken.mp4"]["detail"]
    clips: dict[str, list[tuple]] = {}
    for row in rows(whole / "manifest.parquet"):
        about = (row["first_frame"], row["frames"], row["tier"], row["reason"])
        clips.setdefault(Path(row["path"]).name, []).append(about)
    assert clips == {
        "copy.mp4": [(0, 50, "720p", ""), (50, 60, "720p", ""), (110, 50, "480p", "")],
        "twice.mp4": [(0, 48, "720p", ""), (48, 48, "720p", ""), (96, 48, "", "duplicate")],
        "hevc.mkv": [(0, 60, "720p", "")],
        "long-groups.mp4": [(0, 100, "720p", "")],
        "still.mp4": [(0, 60, "", "motion_px < 2")],
        "image.png": [(0, 1, "720p", "")],
    }


def test_the_captions_are_a_corpus_whose_ranges_hold_the_clips(whole):
    wanted = {row["key"]: row for row in rows(whole / "manifest.parquet") if row["tier"]}
    captions = read_captions(whole)
    assert [row["key"] for row in captions] == sorted(wanted)
    for line in (whole / "captions.jsonl").read_text().splitlines():
        row = json.loads(line)
        about = wanted[row["key"]]
        if about["kind"] == "image":
            assert "first_frame" not in row and row["caption"] == ""
            continue
        assert (row["first_frame"], row["frames"]) == (about["first_frame"], about["frames"])
        assert split_motion(row["caption"]) == ("", round(about["motion_px"], 1))
        with PyAvVideo(whole / row["file"]) as video:
            assert video.frames >= row["first_frame"] + row["frames"]
        standard = about["path"].endswith(("hevc.mkv", "long-groups.mp4"))
        assert Path(row["file"]).is_absolute() != standard


def test_encode_takes_what_curation_has_left(whole, tmp_path):
    encode(EncodeConfig(corpus=str(whole), output=str(tmp_path / "data"), workers=1))
    encoded = {row.key: row for row in load_index(tmp_path / "data").rows}
    for row in rows(whole / "manifest.parquet"):
        assert (row["key"] in encoded) == bool(row["tier"])
        if row["tier"]:
            latent = (encoded[row["key"]].t, encoded[row["key"]].h, encoded[row["key"]].w)
            assert latent == ((row["frames"] - 1) // 4 + 1, row["height"] // 8, row["width"] // 8)


def test_a_second_run_does_nothing_and_leaves_the_same_bytes(videos, whole):
    before, scores = outputs(whole), scored(whole)
    assert curate(settings(videos, whole))["worked_on"] == 0
    assert outputs(whole) == before and scored(whole) == scores


def test_a_changed_stage_runs_again_and_those_that_read_it_and_no_other(videos, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)

    def run_again() -> set[str]:
        return {stage for stage in scored(output) if len(list((output / "scores" / stage).iterdir())) > 1}

    curate(settings(videos, output, dedup=DedupConfig(max_distance=2)))
    curate(settings(videos, output))
    assert run_again() == {"alike"}
    curate(settings(videos, output, shots=ShotsConfig(shortest_frames=10)))
    curate(settings(videos, output))
    assert run_again() == {"alike", "clips", "shots"}


def test_a_moved_threshold_runs_nothing_and_gives_what_a_fresh_run_gives(videos, whole, tmp_path):
    config = settings(videos, tmp_path / "moved")
    shutil.copytree(whole, tmp_path / "moved")
    loose = replace(config.thresholds, p480=replace(config.thresholds.p480, motion_min_px=0.5))
    before = scored(tmp_path / "moved")
    filter_clips(replace(config, thresholds=loose))
    assert scored(tmp_path / "moved") == before
    curate(replace(config, thresholds=loose, output=str(tmp_path / "fresh")))
    assert outputs(tmp_path / "moved") == outputs(tmp_path / "fresh") != outputs(whole)


def test_a_file_under_another_name_is_known_by_its_content(videos, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(videos, tmp_path / "moved")
    shutil.move(tmp_path / "moved" / "hevc.mkv", tmp_path / "moved" / "renamed.mkv")
    assert curate(settings(tmp_path / "moved", tmp_path / "out"))["worked_on"] == 0


def test_a_standardised_file_that_was_removed_is_made_again_when_it_is_needed(videos, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    made = {path: path.read_bytes() for path in (output / "standard").rglob("*.mp4")}
    for path in made:
        path.unlink()
    curate(settings(videos, output, key_frames=KeyFramesConfig(per_second=2.0)))
    assert {path: path.read_bytes() for path in (output / "standard").rglob("*.mp4")} == made != {}


def test_killed_at_thirty_moments_and_run_again_it_leaves_the_same_bytes(videos, whole, tmp_path):
    """Half of the kills take the command alone, half its workers with it."""
    rng, kills, runs = random.Random(6), 0, 0
    while kills < 30:
        output = tmp_path / f"out{runs}"
        while True:
            process = command(videos, output)
            try:
                process.wait(timeout=rng.uniform(0.4, 3.2))
                break
            except subprocess.TimeoutExpired:
                kills += 1
                if rng.random() < 0.5:
                    process.send_signal(signal.SIGKILL)
                else:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert outputs(output) == outputs(whole)
        runs += 1
    curate(settings(videos, output))  # takes the journals of the killed into the tables
    assert scored(output) == scored(whole)
    assert not list(output.rglob("*.tmp"))


def test_slices_at_once_and_then_filter_give_what_one_command_gives(videos, whole, tmp_path):
    parts = [command(videos, tmp_path, f"slice={number}/3", "workers=1") for number in range(3)]
    assert [part.wait(timeout=LIMIT_S) for part in parts] == [0, 0, 0]
    assert not (tmp_path / "manifest.parquet").exists()
    filter_clips(settings(videos, tmp_path))
    assert outputs(tmp_path) == outputs(whole)


@pytest.mark.parametrize(
    ("poison", "kind", "detail"),
    [("hangs", "time", "longer than 45 s"), ("dies", "death", "SIGKILL"), ("fails", "error", "no memory left")],
)
def test_a_poisonous_source_is_set_aside_with_its_reason_and_the_rest_is_whole(
    videos, whole, tmp_path, poison, kind, detail
):
    process = command(videos, tmp_path, f"nsfw.scorer=poison:{poison}", "time_limit_s=45")
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    (still,) = (row for row in rows(tmp_path / "sources.parquet") if row["path"].endswith("still.mp4"))
    assert still["reason"] == f"set aside in nsfw: {kind}" and detail in still["detail"]
    kept = {row["key"] for row in rows(tmp_path / "manifest.parquet") if row["tier"]}
    assert kept == {row["key"] for row in rows(whole / "manifest.parquet") if row["tier"]}
    again = command(videos, tmp_path, "nsfw.scorer=poison:harmless", "retry=true")
    again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0
    assert all("still" not in row["path"] or not row["reason"] for row in rows(tmp_path / "sources.parquet"))


def test_a_fault_that_all_have_ends_the_command_in_one_line(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(22):
        pictures = pan(50, (64, 96), (0.0, 1.0), Texture(seed=number))
        write_clip(folder / f"{number}.mp4", pictures)
    process = command(folder, tmp_path / "out", "nsfw.scorer=poison:always_fails")
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert "20 sources in a row came to nothing" in errors.splitlines()[-1] and "no such driver" in errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"nsfw": HookConfig(scorer="no_such_module:score")}, "no_such_module")],
)
def test_a_stage_that_cannot_be_had_ends_the_command(videos, tmp_path, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        curate(settings(videos, tmp_path, **changes))


def test_ray_gives_what_worker_processes_give(videos, whole, tmp_path):
    pytest.importorskip("ray")
    process = command(videos, tmp_path, "engine=ray")
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    assert outputs(tmp_path) == outputs(whole)


def test_captions_tags_and_balance_come_through_a_server(videos, whole, tmp_path):
    def answer(model: str, prompt: str, pictures: list[np.ndarray]) -> str:
        if model == "tagger":
            return "human / kid" if pictures[0].mean() > 128 else "animals / cat"
        return f"{model}: {len(pictures)} pictures."

    with vision_server(answer=answer) as server:
        models = {"server": server.url, "key_frame_model": "frames", "clip_model": "clips"}
        config = settings(
            videos, tmp_path, caption=CaptionConfig(source="models", **models),
            tags=TagConfig(model="tagger", server=server.url), balance=BalanceConfig(weights="human=3", max_repeat=9),
        )  # fmt: skip
        curate(config)
        asked = len(server.requests)
        assert curate(config)["worked_on"] == 0 and len(server.requests) == asked
    kept = [row for row in rows(tmp_path / "manifest.parquet") if row["tier"]]
    assert {row["key"] for row in kept} == {row["key"] for row in rows(whole / "manifest.parquet") if row["tier"]}
    assert all(row["caption"] is None for row in rows(tmp_path / "manifest.parquet") if not row["tier"])
    taken = Counter()
    for row in kept:
        taken[row["primary"]] += row["repeat"]
    assert sum(taken.values()) == len(kept) and taken["human"] == pytest.approx(3 * taken["animals"], abs=2)
    lines = {row["key"]: row for row in map(json.loads, (tmp_path / "captions.jsonl").read_text().splitlines())}
    assert lines.keys() == {row["key"] for row in kept if row["repeat"]}
    for row in kept:
        if row["repeat"] and row["kind"] == "video":
            caption, motion = split_motion(lines[row["key"]]["caption"])
            assert "frames: 1 pictures." in caption and "clips: " in caption and motion is not None
    assert {"funnel.png", "scores.png", "classes.png", "report.json"} <= {
        path.name for path in (tmp_path / "report").iterdir()
    }


def test_scores_do_not_depend_on_the_number_of_workers(videos, whole, tmp_path):
    curate(settings(videos, tmp_path, workers=1))
    assert outputs(tmp_path) == outputs(whole)


def test_motion_scores_are_those_of_the_scenes(whole):
    motion = {
        (Path(row["path"]).name, row["first_frame"]): row["motion_px"] for row in rows(whole / "manifest.parquet")
    }
    assert motion["copy.mp4", 0] == pytest.approx(3 * 480 / 96, rel=0.02)  # 3 frames of 1 px, at a height of 480
    assert motion["still.mp4", 0] == pytest.approx(0, abs=0.02)
    assert np.isnan(motion.get(("image.png", 0)) or np.nan)
