"""Encoding: whatever happens on the way, the same bytes in the end; bad files are listed, not fatal."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from goku_mega.config.data import CorpusConfig, EncodeConfig
from goku_mega.data import encode_worker
from goku_mega.data.encode import _encoders, _tasks, encode
from goku_mega.data.encode_worker import ShardMade, WorkerEnds, make_shards
from goku_mega.data.shapes import draw_scene, render_clip, write_corpus
from goku_mega.data.shards import ShardReader, load_index
from goku_mega.encoders import vae as vae_module
from goku_mega.errors import ConfigError, DataError
from goku_mega.media.decode import decode_media
from goku_mega.media.write import write_video

pytestmark = pytest.mark.slow

LIMIT_S = 240
KILLS = 30
NURSERY = Path(__file__).with_name("encode_nursery.py")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Real files, one video cut short and one that is no video."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(
        CorpusConfig(
            output=str(folder), videos=20, images=8, height=48, width=48, frames=5, varied_fraction=0.3, workers=1
        )
    )
    (folder / "videos" / "000003.mp4").write_bytes((folder / "videos" / "000003.mp4").read_bytes()[:900])
    (folder / "videos" / "000011.mp4").write_bytes(b"no video at all")
    return folder


def settings(corpus: Path, output: Path, **changes: Any) -> EncodeConfig:
    return EncodeConfig(
        **{"corpus": str(corpus), "output": str(output), "samples_per_shard": 4, "workers": 1} | changes
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


@dataclass
class Nursery:
    """Starts commands that have their imports behind them, one at a time."""

    process: subprocess.Popen[str]
    log: Path

    def start(self, corpus: Path, output: Path, *words: str) -> int:
        """The command's process group."""
        self.log.unlink(missing_ok=True)
        command = ["encode", f"corpus={corpus}", f"output={output}", "samples_per_shard=4", "workers=1", *words]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, str(self.log)]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def code(self) -> int:
        """The command's exit code, when neither it nor a worker of it is left."""
        return self._answer()

    def errors(self) -> str:
        return self.log.read_text()

    def run(self, corpus: Path, output: Path, *words: str) -> None:
        self.start(corpus, output, *words)
        assert self.code() == 0, self.errors()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nurseries(tmp_path_factory) -> Iterator[list[Nursery]]:
    folder = tmp_path_factory.mktemp("nurseries")
    processes = [
        subprocess.Popen([sys.executable, NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    yield [Nursery(process, folder / f"{number}.log") for number, process in enumerate(processes)]
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory) -> Path:
    """By the real command, in one go."""
    output = tmp_path_factory.mktemp("whole") / "data"
    words = [f"--corpus={corpus}", f"--output={output}", "samples_per_shard=4", "workers=1"]
    subprocess.run([sys.executable, "-m", "goku_mega.cli", "encode", *words], check=True, timeout=LIMIT_S)
    return output


def test_corrupt_files_are_skipped_and_listed(unbroken):
    skipped = [json.loads(line) for line in (unbroken / "skipped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in skipped] == ["video-000003", "video-000011"]
    assert all(row["file"] in row["reason"] for row in skipped)
    assert json.loads((unbroken / "dataset.json").read_text())["samples"] == 26


def test_latents_have_the_strides_of_the_vae(corpus, unbroken):
    index = load_index(unbroken)
    reader = ShardReader(index)
    files = {json.loads(line)["key"]: json.loads(line)["file"] for line in (corpus / "captions.jsonl").open()}
    for number in range(len(index)):
        sample = reader.read(number)
        frames, height, width, _ = decode_media(corpus / files[sample.key]).shape
        assert sample.latent.shape == (8, (frames - 1) // 4 + 1, height // 8, width // 8)
        assert sample.text.shape[1] == index.text_width


def test_the_webdataset_library_reads_every_sample_as_our_index_does(unbroken):
    index = load_index(unbroken)
    reader = ShardReader(index)
    numbers = {row.key: number for number, row in enumerate(index.rows)}
    shards = [str(path) for path in sorted(unbroken.glob("shards/*.tar"))]
    seen = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
        ours = reader.read(numbers[sample["__key__"]])
        assert np.array_equal(sample["latent.npy"], ours.latent.numpy())
        assert np.array_equal(sample["text.npy"], ours.text.numpy())
        assert sample["json"]["caption"] == index.rows[numbers[sample["__key__"]]].caption
        seen.append(sample["__key__"])
    assert seen == [row.key for row in index.rows]


def test_killed_at_thirty_random_moments_the_bytes_are_the_same(corpus, unbroken, nurseries, tmp_path):
    """SIGKILL to all of a command, to the command alone or to a worker; one command, or two slices at once."""
    draw = random.Random(20)
    began = time.monotonic()
    nurseries[0].run(corpus, tmp_path / "timed")
    whole_s = time.monotonic() - began
    kills = runs = 0
    while kills < KILLS:
        output = tmp_path / str(runs)
        runs += 1
        while kills < KILLS and not (output / "dataset.json").exists():
            left = 1 - len(list(output.glob("parts/*.json"))) / 7
            slices = draw.choice([["0/1"], ["0/2", "1/2"]])
            workers = draw.choice([1, 2])
            commands = list(zip(nurseries, slices, strict=False))
            groups = [nursery.start(corpus, output, f"slice={of}", f"workers={workers}") for nursery, of in commands]
            time.sleep(draw.uniform(0, whole_s * left))
            kills += sum([kill(group, draw.choice(["all", "command", "worker"])) for group in groups])
            for nursery, _ in commands:
                nursery.code()
            wait_until(lambda groups=groups: not any(map(family, groups)))  # no worker outlives its command
        nurseries[0].run(corpus, output, "workers=2")
        assert contents(output) == contents(unbroken)


def kill(group: int, victim: str) -> bool:
    """Whether there was something to kill."""
    members = family(group)
    workers = [number for number, parent in members.items() if parent == group]
    with contextlib.suppress(ProcessLookupError):
        if victim == "all":
            os.killpg(group, signal.SIGKILL)
        elif victim == "worker" and workers:
            os.kill(workers[0], signal.SIGKILL)
        else:
            os.kill(group, signal.SIGKILL)
        return bool(members)
    return False


def test_a_killed_worker_ends_the_command_with_what_to_do(corpus, unbroken, nurseries, tmp_path):
    output = tmp_path / "data"
    group = nurseries[0].start(corpus, output)
    wait_until(lambda: list(output.glob("parts/*.json")))
    [worker] = [number for number, parent in family(group).items() if parent == group]
    os.kill(worker, signal.SIGKILL)
    assert nurseries[0].code() == 2
    assert "an encoding worker was killed; run the command again" in nurseries[0].errors().splitlines()[-1]
    nurseries[0].run(corpus, output)
    assert contents(output) == contents(unbroken)


def test_slices_and_a_second_command_share_the_work(corpus, unbroken, nurseries, tmp_path):
    output = tmp_path / "data"
    for nursery, words in zip(nurseries, (["slice=1/3"], ["slice=1/3", "workers=2"]), strict=True):
        nursery.start(corpus, output, *words)  # of the same shards, at once
    assert [nursery.code() for nursery in nurseries] == [0, 0]
    made = [line for nursery in nurseries for line in nursery.errors().splitlines() if "is written" in line]
    assert len(made) == 2 and len(set(line.split()[-5] for line in made)) == 2  # shards 1 and 4, each by one of them
    assert "shards_left: 5" in nurseries[0].errors() and not (output / "dataset.json").exists()
    nurseries[0].run(corpus, output, "slice=0/3")
    nurseries[1].run(corpus, output, "slice=2/3")
    assert contents(output) == contents(unbroken)


def test_a_command_waits_for_a_shard_that_another_has_and_makes_it_if_that_one_dies(
    corpus, unbroken, nurseries, tmp_path
):
    output = tmp_path / "data"
    first = nurseries[0].start(corpus, output)
    wait_until(lambda: list(output.glob("shards/*.tar")))
    os.kill(next(number for number, parent in family(first).items() if parent == first), signal.SIGSTOP)
    nurseries[1].start(corpus, output)
    time.sleep(3)  # long enough to make what is free
    assert not (output / "dataset.json").exists()
    os.killpg(first, signal.SIGKILL)
    assert nurseries[0].code() == -signal.SIGKILL
    assert nurseries[1].code() == 0
    assert contents(output) == contents(unbroken)


def test_what_a_kill_after_the_last_commit_left_is_cleared_away(corpus, unbroken, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(unbroken, output)
    part = {"shard": json.loads((output / "shards.json").read_text())[3], "rows": [], "skipped": []}
    (output / "parts").mkdir()
    (output / "parts" / "00003.json").write_text(json.dumps(part))
    (output / "parts" / "00003.lock").touch()
    encode(settings(corpus, output))
    assert contents(output) == contents(unbroken)


def make_one(corpus: Path, unbroken: Path, output: Path, **how: Any) -> tuple[bytes, bytes]:
    """Shard 2, here in this process, and as it should be."""
    (output / "parts").mkdir(parents=True)
    config = settings(corpus, output)
    [encoders] = _encoders(config, ["cpu"], str(unbroken / "text_encoder"), 1)
    from goku_mega.data.captions import read_captions

    task = _tasks(config, read_captions(corpus))[2]
    made, ends = list(make_shards(encoders, [task], **how))
    assert isinstance(made, ShardMade) and isinstance(ends, WorkerEnds) and 0 < ends.vae_s < ends.total_s
    return task.shard.read_bytes(), (unbroken / "shards" / "00002.tar").read_bytes()


def test_taking_turns_gives_the_bytes_of_decoding_ahead(corpus, unbroken, tmp_path):
    made, expected = make_one(corpus, unbroken, tmp_path / "data", pieces_ahead=0)
    assert made == expected


def test_clips_that_cannot_wait_for_another_of_their_shape_have_the_same_bytes(corpus, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_worker, "WAITING_SAMPLES", 0)
    made, expected = make_one(corpus, unbroken, tmp_path / "data")
    assert made == expected


def test_a_clip_in_a_range_of_a_long_file_is_the_clip_cut_out_whether_it_goes_through_in_pieces_or_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(vae_module, "PAIR_BELOW_VOXELS", 8 * 48 * 48)  # of the clips, those of 9 and 17 frames go alone
    scene = draw_scene("two", True, np.random.default_rng(4))
    write_video(tmp_path / "long.mp4", render_clip(scene, seed=4, frames=27, height=48, width=48), 24)
    pixels = decode_media(tmp_path / "long.mp4")
    rows, whole = [], vae_module.load_vae("tiny")
    for number, (first, frames) in enumerate([(0, 5), (3, 11), (7, 20), (26, 1)]):
        row = {"key": f"c{number}", "file": str(tmp_path / "long.mp4"), "caption": "a red circle", "clip": "extra"}
        rows.append({**row, "first_frame": first, "frames": frames})
    rows.append({**rows[0], "key": "past", "first_frame": 20, "frames": 8})
    rows.append({**rows[0], "key": "rest", "first_frame": 22, "frames": None})
    output = tmp_path / "data"
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("goku_mega.data.workers.START", "fork")  # workers see the smaller bound of pieces
        result = encode(settings(tmp_path, output))
    assert (result["samples"], result["skipped"]) == (5, 1)
    assert "has no frame 27; its frames are 0 to 26" in (output / "skipped.jsonl").read_text()
    index = load_index(output)
    reader = ShardReader(index)
    for number, row in enumerate(index.rows):
        about = next(item for item in rows if item["key"] == row.key)
        count = about["frames"] or 27 - about["first_frame"]
        clip = pixels[about["first_frame"] :][: count - (count - 1) % 4]
        assert np.array_equal(reader.read(number).latent.numpy(), whole.encode([clip])[0].numpy())


def test_a_spread_text_encoder_and_kept_embeddings_give_the_same_bytes(corpus, unbroken, nurseries, tmp_path):
    output, cache = tmp_path / "data", tmp_path / "cache"
    nurseries[0].run(corpus, output, "text_devices=all", f"text_cache={cache}", "text_cache_gib=0")
    assert contents(output) == contents(unbroken)
    kept = [path for path in cache.rglob("*") if path.is_file()]
    captions = {row.caption for row in load_index(unbroken).rows}
    assert len(kept) >= len(captions) + 1  # the empty caption is among them, and those of the damaged files
    kept[0].write_bytes(kept[0].read_bytes()[:-1] + b"?")
    shutil.rmtree(output)
    nurseries[0].run(corpus, output, f"text_cache={cache}")
    assert f"{kept[0].name} is damaged; it is made again" in nurseries[0].errors()
    assert contents(output) == contents(unbroken)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "stray", "index", "null_text"])
def test_verify_finds_damage_and_encode_makes_lost_shards_again(corpus, unbroken, tmp_path, harm):
    output = tmp_path / "data"
    shutil.copytree(unbroken, output)
    assert encode(EncodeConfig(output=str(output), verify=True))["samples"] == 26
    shard, other = output / "shards" / "00001.tar", output / "shards" / "00004.tar"
    if harm == "flip":
        for path in (shard, other):
            data = bytearray(path.read_bytes())
            data[random.Random(harm).randrange(len(data))] ^= 1
            path.write_bytes(data)
        expected = r"2 damaged file.*00001\.tar: its checksum is not.*00004\.tar: its checksum is not.*remove these"
    elif harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
        expected = r"1 damaged file.*00001\.tar: it has \d+ bytes of \d+"
    elif harm == "gone":
        shard.unlink()
        expected = r"00001\.tar: No such file"
    elif harm == "stray":
        shutil.copy(shard, output / "shards" / "00099.tar")
        expected = r"00099\.tar: it does not belong"
    elif harm == "index":
        (output / "index.parquet").write_bytes((unbroken / "index.parquet").read_bytes() + b"\0PAR1")
        expected = "damaged"
    else:
        data = bytearray((output / "null_text.npy").read_bytes())
        data[-1] ^= 1
        (output / "null_text.npy").write_bytes(data)
        expected = r"null_text\.npy: its checksum is not"
    with pytest.raises(DataError, match=expected):
        encode(EncodeConfig(output=str(output), verify=True))
    if harm in ("flip", "gone"):
        shard.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
        encode(settings(corpus, output))
        assert contents(output) == contents(unbroken)


def test_verify_finds_an_index_that_says_something_else_than_the_shards(unbroken, tmp_path):
    import xxhash

    from goku_mega.data.shards import write_index

    output = tmp_path / "data"
    shutil.copytree(unbroken, output)
    rows = list(load_index(output).rows)
    for wrong, expected in (
        (rows[0]._replace(latent_offset=rows[0].latent_offset + 512), "the index says"),
        (rows[0]._replace(h=rows[0].h + 1), "another shape than the index says"),
        (rows[0]._replace(key="nobody"), "in it and not in the index"),
    ):
        write_index(output / "index.parquet", [wrong, *rows[1:]])
        dataset = json.loads((output / "dataset.json").read_text())
        dataset["xxh3_128"]["index.parquet"] = xxhash.xxh3_128_hexdigest((output / "index.parquet").read_bytes())
        (output / "dataset.json").write_text(json.dumps(dataset))
        with pytest.raises(DataError, match=f"1 damaged file.*{expected}"):
            encode(EncodeConfig(output=str(output), verify=True))


def test_a_shard_that_is_made_again_from_another_file_is_refused(corpus, unbroken, tmp_path):
    changed, output = tmp_path / "corpus", tmp_path / "data"
    shutil.copytree(corpus, changed)
    config = settings(changed, output)
    shutil.copytree(unbroken, output)
    first = changed / "videos" / "000000.mp4"
    size = first.stat().st_size
    others = (path for path in sorted((changed / "videos").glob("*.mp4")) if 900 < path.stat().st_size < size)
    content = next(others).read_bytes()
    first.write_bytes(content + bytes(size - len(content)))  # as long as before: the corpus looks the same
    for path in (output / "shards").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"shards/0000\d\.tar of .*: made again, with other bytes than before"):
        encode(config)


def test_a_folder_begun_with_other_settings_is_refused(corpus, unbroken):
    with pytest.raises(DataError, match="was begun with max_frames=241, now it is 5"):
        encode(settings(corpus, unbroken, max_frames=5))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": ""}, "corpus is missing"),
        ({"slice": "2/2"}, "slice is '2/2'; write number/parts"),
        ({"slice": "half"}, "slice is 'half'"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        EncodeConfig(**{"corpus": str(tmp_path), "output": str(tmp_path)} | changes)
