"""Whatever happens to a checkpoint's files, it is noticed, and the newest whole one is found instead."""

import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_cases import differences, find_latest, open_checkpoint, state

from goku_mega.checkpoint import tools
from goku_mega.checkpoint.load import fill, load_info, load_into, load_newest
from goku_mega.checkpoint.manifest import FileRecord, manifest_bytes, record_bytes
from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.config.checkpoints import CheckpointFolder
from goku_mega.errors import CheckpointError
from launch import run_ranks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 10 and 20."""
    for step in (10, 20):
        save_checkpoint(tmp_path / "checkpoints", step, state("rows", step=step), {"layout": {"tp": 2}}, keep=5)
    return tmp_path / "checkpoints"


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def load_newest_into(folder: Path) -> int:
    """Fill boxes from the newest whole checkpoint, as a run does that is resumed; its step."""
    read = state("columns", step=None)
    loaded = load_newest(folder, lambda stored: fill(stored, read))
    assert loaded is not None
    step = loaded[0].info["step"]
    assert differences(read, step) == []
    return step


def test_a_flipped_bit_in_any_file_is_noticed(folder: Path) -> None:
    """While it is loaded, and by `find_latest`, which reads what a load does not."""
    choose = random.Random(7)
    newest = folder / "step_00000020"
    for file in sorted(newest.iterdir()):
        for _ in range(20):
            position, bit = choose.randrange(file.stat().st_size), choose.randrange(8)
            flip(file, position, bit)
            assert find_latest(folder) == folder / "step_00000010", (file.name, position, bit)
            if file.name != ".metadata":
                assert load_newest_into(folder) == 10, (file.name, position, bit)
            flip(file, position, bit)
    assert find_latest(folder) == newest
    assert load_newest_into(folder) == 20


def test_what_is_passed_over_while_loading_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(folder / "step_00000020" / "__0_0.distcp", 5000, 3)
    with caplog.at_level(logging.WARNING):
        assert load_newest_into(folder) == 10
    assert "__0_0.distcp is damaged" in caplog.text
    assert "going back to step 10 loses 10 steps" in caplog.text
    flip(folder / "step_00000010" / "__0_0.distcp", 5000, 3)
    with pytest.raises(CheckpointError, match=r"no older checkpoint in .* is whole"):
        load_newest_into(folder)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [cut, empty, Path.unlink])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "info.json", "manifest.json"])
def test_a_cut_or_missing_file_makes_the_older_one_the_latest(
    folder: Path, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    harm(folder / "step_00000020" / name)
    with caplog.at_level(logging.WARNING):
        assert find_latest(folder, verify=False) == folder / "step_00000010"
    assert f"step_00000020/{name}" in caplog.text
    assert "going back to step 10 loses 10 steps" in caplog.text


def test_files_swapped_between_checkpoints_are_noticed(folder: Path) -> None:
    shutil.copy(folder / "step_00000010" / "__0_0.distcp", folder / "step_00000020" / "__0_0.distcp")
    assert find_latest(folder) == folder / "step_00000010"


def test_an_older_checkpoint_under_a_newer_name_is_noticed(folder: Path) -> None:
    shutil.copytree(folder / "step_00000010", folder / "step_00000030")
    assert find_latest(folder) == folder / "step_00000020"


def find_on_every_rank(rank: int, folder: Path) -> tuple[Path | None, list[str]]:
    mine = state("rows", rank, 2, step=None)
    loaded = load_newest(folder, lambda stored: fill(stored, mine))
    assert loaded is not None
    return find_latest(folder), differences(mine, loaded[0].info["step"])


def test_all_ranks_agree_on_the_checkpoint_to_load(folder: Path) -> None:
    flip(folder / "step_00000020" / "__0_0.distcp", 100, 3)
    assert run_ranks(find_on_every_rank, 2, folder) == [(folder / "step_00000010", [])] * 2


def test_when_every_checkpoint_is_damaged_the_file_is_named(folder: Path) -> None:
    cut(folder / "step_00000020" / "info.json")
    flip(folder / "step_00000010" / ".metadata", 5, 0)
    with pytest.raises(CheckpointError, match=r"step_00000020/info\.json has \d+ bytes instead of \d+, and 1 more"):
        find_latest(folder)


def test_an_empty_folder_has_no_latest_and_cannot_be_opened(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}; give the output folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "step_00000003")


def test_a_run_folder_its_checkpoints_and_one_of_them_can_be_opened(folder: Path) -> None:
    newest = folder / "step_00000020"
    assert [open_checkpoint(path) for path in (folder.parent, folder, newest)] == [newest] * 3
    assert open_checkpoint(folder / "step_00000010") == folder / "step_00000010"


def test_a_checkpoint_copied_elsewhere_under_another_name_can_be_opened(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "best"
    shutil.copytree(folder / "step_00000020", copy)
    assert open_checkpoint(copy) == copy
    assert tools.verify(CheckpointFolder(path=str(copy)))["latest_intact_step"] == 20


def test_a_damaged_checkpoint_asked_for_by_name_is_not_replaced_by_another(folder: Path) -> None:
    flip(folder / "step_00000020" / "__0_0.distcp", 100, 3)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged: its checksum is"):
        open_checkpoint(folder / "step_00000020")


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Change a file and make the manifest agree, as an attacker or a newer version would."""
    (path / name).write_bytes(content)
    files = {name: record_bytes((path / name).read_bytes()) for name in os.listdir(path) if name != "manifest.json"}
    (path / "manifest.json").write_bytes(manifest_bytes(20, files))


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch harm-was-done",)


def test_code_in_the_metadata_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there for torch's own tools; nothing of ours unpickles it."""
    monkeypatch.chdir(folder)
    rewrite(folder / "step_00000020", ".metadata", pickle.dumps(Harmful()))
    read = state("rows", step=None)
    load_into(open_checkpoint(folder / "step_00000020"), read)
    assert differences(read, 20) == []
    assert not (folder / "harm-was-done").exists()


def test_a_newer_format_is_refused(folder: Path) -> None:
    path = folder / "step_00000020"
    rewrite(path, "info.json", json.dumps({**load_info(path), "format": 99}).encode())
    with pytest.raises(CheckpointError, match="has checkpoint format 99, this goku_mega reads format 2"):
        load_info(path)


def test_the_manifest_covers_every_file(folder: Path) -> None:
    path = folder / "step_00000020"
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert {*listed, "manifest.json"} == {file.name for file in path.iterdir()}
    assert all(record_bytes((path / name).read_bytes()) == FileRecord(**record) for name, record in listed.items())


def test_list_and_verify_tell_the_damaged_from_the_intact(folder: Path) -> None:
    rows = tools.list_checkpoints(CheckpointFolder(path=str(folder)))["checkpoints"]
    assert [(row["step"], row["intact"], row["world"], row["layout"]) for row in rows] == [
        (20, True, 1, {"tp": 2}),
        (10, True, 1, {"tp": 2}),
    ]
    assert all(row["bytes"] > 0 and row["age_s"] >= 0 for row in rows)
    flip(folder / "step_00000020" / "__0_0.distcp", 100, 3)
    result = tools.verify(CheckpointFolder(path=str(folder.parent)))
    assert (result["intact"], result["damaged"], result["latest_intact_step"]) == (1, 1, 10)
    assert "__0_0.distcp is damaged" in result["checkpoints"][0]["fault"]
    json.dumps(result)
    for absent in ("nothing", "step_00000099"):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            tools.list_checkpoints(CheckpointFolder(path=str(folder / absent)))
