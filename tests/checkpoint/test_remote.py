"""Checkpoints in an object store: a real S3 server on loopback, and faults between it and the training."""

import logging
import os
import shutil
import signal
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import differences, names_in, state
from commands import run_command
from s3_server import Fault, Front, make_bucket

from goku_mega.checkpoint.commit import OWNER
from goku_mega.checkpoint.load import Stored, fill, load_newest
from goku_mega.checkpoint.manifest import committed
from goku_mega.checkpoint.save import Saver, save_checkpoint
from goku_mega.checkpoint.state import State
from goku_mega.checkpoint.storage import open_folder
from goku_mega.data.shards import NULL_TEXT, EncodedSample, write_index, write_shard
from goku_mega.errors import CheckpointError
from launch import run_ranks

pytestmark = pytest.mark.slow

REFUSED = Fault(status=403, body=b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
"""A fault that nobody repeats, as others would be for a minute: by the driver, by the folder and by the writer."""


@pytest.fixture
def front(shared_front: Front) -> Front:
    """S3 behind a front without a fault."""
    shared_front.mend()
    shared_front.seen.clear()
    return shared_front


@pytest.fixture
def place(front: Front) -> str:
    """The checkpoints of a run in a bucket of its own."""
    return f"{make_bucket(uuid.uuid4().hex)}/run/checkpoints"


def objects(place: str) -> list[str]:
    """Every object under a URL, by its name there."""
    import fsspec

    store, path = fsspec.core.url_to_fs(place)
    store.invalidate_cache()
    return sorted(name.removeprefix(f"{path}/") for name in store.find(path))


def content_of(place: str, folder: str) -> dict[str, bytes]:
    """Every object whose name begins so."""
    import fsspec

    store, path = fsspec.core.url_to_fs(place)
    return {name: store.cat_file(f"{path}/{name}") for name in objects(place) if name.startswith(folder)}


def steps(place: str) -> list[int]:
    return [found.step for found in committed(open_folder(place))]


def advance(mine: State, step: int, rank: int = 0, world: int = 1) -> None:
    for part, shards in state("rows", rank, world, step=step).items():
        for name, shard in shards.items():
            mine[part][name].tensor.copy_(shard.tensor)


def save_steps(rank: int, world: int, place: str, last: int, keep: int, node: str, store_every: int) -> list[str]:
    """Save every step; what went wrong at each."""
    mine, faults = state("rows", rank, world, step=0), []
    node_folder = f"{node}{rank}" if node else ""
    with Saver(place, mine, keep=keep, node_folder=node_folder, store_every=store_every) as saver:
        for step in range(1, last + 1):
            advance(mine, step, rank, world)
            saver.save(step, {"layout": "rows"})
            saver.fence()
            advance(mine, 100 + step, rank, world)
            outcome = saver.wait()
            assert outcome is not None
            faults.append(outcome.fault)
    return faults


def load(rank: int, world: int, place: str, kind: str, node: str = "") -> tuple[int, list[str], str]:
    """Step of the newest checkpoint, the boxes that are not as they were then, and where it was read."""
    mine = state(kind, rank, world, step=None)
    loaded = load_newest(place, lambda stored: fill(stored, mine), node_folder=f"{node}{rank}" if node else "")
    assert loaded is not None
    step = loaded[0].info["step"]
    return step, differences(mine, step), str(loaded[0].folder)


def assert_saved(place: str, step: int) -> None:
    assert load(0, 1, place, "columns")[:2] == (step, [])


# --- Saved there, loaded from there ----------------------------------------------------------------------------------


def test_what_two_ranks_save_beside_their_training_three_and_one_load(place: str) -> None:
    assert run_ranks(save_steps, 2, 2, place, 4, 2, "", 1) == [[""] * 4] * 2
    for world, kind in ((3, "columns"), (1, "rows")):
        for step, wrong, where in run_ranks(load, world, world, place, kind):
            assert (step, wrong) == (4, [])
            assert where.startswith(f"{place}/step_00000004.")
    # Two are kept; of the others no object is left.
    assert steps(place) == [4, 3]
    kept = {found.folder.name for found in committed(open_folder(place))}
    files = (".metadata", "__0_0.distcp", "__1_0.distcp", "index.safetensors", "info.json", "manifest.json")
    assert objects(place) == sorted([OWNER, *(f"{folder}/{file}" for folder in kept for file in files)])


def save_at_once(rank: int, world: int, place: str) -> str:
    return str(save_checkpoint(place, 3, state("rows", rank, world, step=3), {"layout": "rows"}, keep=1))


def test_a_save_that_waits_writes_there_too(place: str) -> None:
    run_ranks(save_at_once, 2, 2, place)
    assert steps(place) == [3]
    assert_saved(place, 3)
    [found] = committed(open_folder(place))
    assert Stored.open(str(found.folder)).info["layout"] == "rows"


def test_every_second_save_goes_on_from_the_nodes_into_the_store(place: str, tmp_path: Path) -> None:
    node = str(tmp_path / "node")
    assert run_ranks(save_steps, 2, 2, place, 5, 9, node, 2) == [[""] * 5] * 2
    assert steps(place) == [4, 2]
    for rank in range(2):
        assert names_in(Path(f"{node}{rank}")) == ["step_00000004", "step_00000005"]
    for step, wrong, where in run_ranks(load, 2, 2, place, "columns", node):
        assert (step, wrong) == (5, [])
        assert where.startswith(node)
    for rank in range(2):
        shutil.rmtree(f"{node}{rank}")
    for step, wrong, where in run_ranks(load, 3, 3, place, "columns", node):
        assert (step, wrong) == (4, [])
        assert where.startswith(place)


def test_what_is_damaged_there_is_passed_over_and_said(place: str, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        save_checkpoint(place, step, state("rows", step=step), {}, keep=9)
    folder = committed(open_folder(place))[0].folder
    content = bytearray(folder.read("__0_0.distcp"))
    content[len(content) // 2] ^= 1
    folder.write("__0_0.distcp", [content])
    with caplog.at_level(logging.WARNING):
        assert_saved(place, 1)
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("goku_mega")]
    assert "passed over the checkpoint of step 2" in said
    assert "__0_0.distcp is damaged" in said


# --- A store that fails, or takes its time ---------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["__0_0.distcp", "index.safetensors", "manifest.json"])
def test_a_store_that_refuses_an_object_costs_that_save_and_no_other(place: str, front: Front, refused: str) -> None:
    mine = state("rows", step=1)
    with Saver(place, mine, keep=9) as saver:
        saver.save(1, {})
        saver.wait()
        front.fail(REFUSED, method="PUT", path=refused)
        advance(mine, 2)
        saver.save(2, {})
        saver.fence()
        advance(mine, 3)  # the training goes on
        outcome = saver.wait()
        assert outcome is not None
        assert refused in outcome.fault
        assert "\n" not in outcome.fault
        assert saver.failures == 1
        front.mend()
        assert steps(place) == [1]
        assert not [name for name in objects(place) if name.startswith("step_00000002")]
        saver.save(3, {})
        saver.wait()
        assert saver.failures == 0
        assert steps(place) == [3, 1]
    assert_saved(place, 3)


def test_what_a_store_that_was_gone_has_kept_of_a_failed_save_is_removed_by_the_next(place: str, front: Front) -> None:
    mine = state("rows", step=1)
    with Saver(place, mine, keep=9) as saver:
        front.rule = lambda method, path: REFUSED if "manifest.json" in path or method in ("DELETE", "POST") else None
        saver.save(1, {})
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.fault
        front.mend()
        assert [name for name in objects(place) if name.startswith("step_00000001")]  # it could not be removed
        assert steps(place) == []
        advance(mine, 2)
        saver.save(2, {})
    assert steps(place) == [2]
    assert not [name for name in objects(place) if name.startswith("step_00000001")]
    assert_saved(place, 2)


def test_the_last_save_that_the_store_refuses_is_an_error(place: str, front: Front) -> None:
    saver = Saver(place, state("rows", step=1), keep=9)
    front.fail(REFUSED, method="PUT", path="manifest.json")
    saver.save(1, {})
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 1 could not be saved: .*manifest\.json"
    ) as error:
        saver.close()
    assert "\n" not in str(error.value)
    front.mend()
    assert steps(place) == []


def test_a_store_that_refuses_everything_is_said_before_the_training_begins(place: str, front: Front) -> None:
    front.fail(REFUSED, method="PUT")
    with pytest.raises(CheckpointError, match=place) as error:
        Saver(place, state("rows"), keep=1)
    assert "\n" not in str(error.value)


def test_a_slow_store_is_waited_for_only_when_the_next_save_is_due(
    place: str, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    mine = state("rows", step=1)
    caplog.set_level(logging.WARNING)
    with Saver(place, mine, keep=9) as saver:
        saver.save(1, {})
        saver.wait()
        front.fail(Fault(delay_s=0.4), method="PUT")  # of which a save takes five, one after the other
        advance(mine, 2)
        began = time.monotonic()
        saver.save(2, {})
        saver.fence()
        assert time.monotonic() - began < 1.5  # a busy machine takes its time, but not for five of them
        advance(mine, 3)
        assert saver.waits == 0
        waited = saver.save(3, {})
        assert saver.waits == 1
        assert waited > 1
        front.mend()
    assert "step 3 is due, but that of step 2 is being written" in caplog.text
    assert steps(place) == [3, 2, 1]
    for found in committed(open_folder(place)):
        loaded = state("columns", step=None)
        fill(Stored.open(str(found.folder)), loaded)
        assert differences(loaded, found.step) == []


@pytest.mark.parametrize("during", ["__0_0.distcp", "manifest.json"])
def test_a_writer_killed_while_it_talks_to_the_store_is_replaced(place: str, front: Front, during: str) -> None:
    """A store may still carry out what it asked for, over what its successor has written: that must be the same."""
    mine = state("rows", step=1)
    with Saver(place, mine, keep=9) as saver:
        saver.save(1, {})
        saver.wait()
        front.seen.clear()
        front.fail(Fault(delay_s=1), times=1, method="PUT", path=during)
        advance(mine, 2)
        saver.save(2, {})
        saver.fence()
        while not [path for method, path in front.seen if method == "PUT" and during in path]:
            time.sleep(0.01)
        assert steps(place) == [1]  # not yet
        written = content_of(place, "step_00000002")
        assert len(written) == (0 if during == "__0_0.distcp" else 4)
        os.kill(saver.writer_pid, signal.SIGKILL)
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.fault == ""
    assert steps(place) == [2, 1]
    assert written.items() <= content_of(place, "step_00000002").items()
    time.sleep(1)
    assert_saved(place, 2)


def test_of_two_jobs_the_older_can_neither_commit_nor_remove_what_the_newer_writes(place: str) -> None:
    with Saver(place, state("rows", step=1), keep=9) as first:
        first.save(1, {})
        first.wait()
        with Saver(place, state("rows", step=2), keep=9) as second:
            token = open_folder(place).read(OWNER).decode()
            open_folder(place).child(f"step_00000007.{token}-5").write("__0_0.distcp", [b"being written just now"])
            first.save(5, {})
            outcome = first.wait()
            assert outcome is not None
            assert f"another job has taken over {place}" in outcome.fault
            assert f"step_00000007.{token}-5/__0_0.distcp" in objects(place)
            second.save(2, {})
            second.wait()
            assert second.failures == 0
        with pytest.raises(CheckpointError, match="another job has taken over"):
            first.close()
    assert steps(place) == [2, 1]


# --- The command -----------------------------------------------------------------------------------------------------


def write_dataset(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    samples = [
        EncodedSample(
            f"sample-{number:03d}",
            rng.standard_normal((16, 1, 8, 8)).astype(np.float32),
            rng.standard_normal((3, 64)).astype(np.float32),
            {"caption": ""},
        )
        for number in range(24)
    ]
    write_index(folder / "index.parquet", write_shard(folder / "shards" / "00000.tar", samples))
    np.save(folder / NULL_TEXT, rng.standard_normal((1, 64)).astype(np.float32))
    (folder / "dataset.json").write_text('{"latent_channels": 16, "text_width": 64, "text": "none", "vae": "none"}')
    return folder


def train(dataset: Path, run_dir: Path, place: str, steps: int, ranks: int) -> str:
    words = [
        "train", f"run_dir={run_dir}", f"data.path={dataset}", f"steps={steps}", "checkpoint.every_steps=2",
        f"checkpoint.store={place}", "data.samples_per_step=8",
    ]  # fmt: skip
    return run_command(words, ranks, run_dir.with_suffix(f".{steps}.log"))


@pytest.mark.slow
def test_training_saves_there_and_goes_on_from_there(place: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    train(dataset, tmp_path / "run", place, 4, 2)
    assert steps(place) == [4, 2]
    assert not (tmp_path / "run" / "checkpoints").exists()
    said = train(dataset, tmp_path / "run", place, 6, 1)
    assert f"resumed from {place}/step_00000004." in said
    assert steps(place) == [6, 4, 2]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
