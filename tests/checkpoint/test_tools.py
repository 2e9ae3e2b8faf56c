"""What the checkpoint commands answer: true of the files, quick where it can be, and never a step from losing data."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import PARTS, SHAPES, differences, find_latest, state

from goku_mega import cli
from goku_mega.checkpoint import tools
from goku_mega.checkpoint.diff import diff
from goku_mega.checkpoint.load import Stored, load_into
from goku_mega.checkpoint.rewrite import reshard
from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.checkpoint.storage import LocalFolder
from goku_mega.checkpoint.tools import inspect, list_checkpoints, prune, verify
from goku_mega.config.checkpoints import CheckpointFolder, DiffConfig, InspectConfig, PruneConfig, ReshardConfig
from goku_mega.errors import CheckpointError, ConfigError
from goku_mega.parallel.shards import Shard

RECIPE = {"seed": 3, "checkpoint": {"keep": 2, "keep_every_steps": 4, "keep_best": 1}}


def save(run_dir: Path, step: int, **info: Any) -> Path:
    """One more checkpoint; none is deleted."""
    about = {"run": RECIPE, "model": {"size": "tiny"}, "layout": "tp=2", **info}
    return save_checkpoint(run_dir / "checkpoints", step, state("rows", step=step), about, keep=99)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in range(1, 8):
        save(tmp_path / "run", step, loss=abs(step - 2.0))
    return tmp_path / "run"


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def flip(path: Path, at: int = 1000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def steps(answer: dict[str, Any], **like: Any) -> list[int]:
    return [row["step"] for row in answer["checkpoints"] if all(row[name] == value for name, value in like.items())]


@pytest.fixture
def no_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(folder: LocalFolder, name: str, *arguments: Any) -> Any:
            assert not name.endswith(".distcp"), name
            return function(folder, name, *arguments)

        return call

    for name in ("read", "read_into"):
        monkeypatch.setattr(LocalFolder, name, guarded(getattr(LocalFolder, name)))


def test_list_shows_newest_first_with_loss_and_why_each_is_kept(run_dir: Path, no_data_is_read: None):
    flip(checkpoint(run_dir, 5) / "manifest.json", 20)
    answer = list_checkpoints(CheckpointFolder(path=str(run_dir)))
    assert steps(answer) == [7, 6, 5, 4, 3, 2, 1]
    assert steps(answer, intact=False) == [5]
    assert "manifest.json" in answer["checkpoints"][2]["fault"]
    assert {row["step"]: row["kept_as"] for row in answer["checkpoints"] if row["kept_as"]} == {
        7: "newest", 6: "newest", 4: "every 4", 2: "best",
    }  # fmt: skip
    newest = answer["checkpoints"][0]
    assert (newest["loss"], newest["world"], newest["layout"]) == (5.0, 1, "tp=2")
    assert newest["bytes"] == sum(
        f.stat().st_size for f in checkpoint(run_dir, 7).iterdir() if f.name != "manifest.json"
    )
    single = list_checkpoints(CheckpointFolder(path=str(checkpoint(run_dir, 3))))
    assert steps(single) == [3]


def test_inspect_counts_what_was_saved(run_dir: Path, no_data_is_read: None):
    answer = inspect(InspectConfig(path=str(run_dir), tensors="ema/blocks.0.*"))
    assert (answer["step"], answer["path"], answer["fault"]) == (7, str(checkpoint(run_dir, 7)), None)
    numbers = sum(math.prod(shape) for shape, _ in SHAPES.values())
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in SHAPES.values())
    assert {part["part"]: (part["tensors"], part["numbers"], part["bytes"]) for part in answer["parts"]} == {
        part: (len(SHAPES), numbers, size) for part in ("model", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    }
    assert answer["chunks"] == 4 * len(SHAPES)
    assert answer["files"] == [{
        "file": "__0_0.distcp", "chunks": answer["chunks"],
        "bytes": (checkpoint(run_dir, 7) / "__0_0.distcp").stat().st_size,
    }]  # fmt: skip
    assert answer["tensors"] == [
        {"tensor": "ema/blocks.0.mlp.fc1.bias", "dtype": "float32", "shape": [11], "bytes": 44, "chunks": 1},
        {"tensor": "ema/blocks.0.mlp.fc1.weight", "dtype": "float32", "shape": [11, 6], "bytes": 264, "chunks": 1},
    ]
    assert (answer["layout"], answer["recipe"]["checkpoint.keep"], answer["recipe"]["seed"]) == ("tp=2", 2, 3)
    assert "tensors" not in inspect(InspectConfig(path=str(run_dir)))


def test_inspect_takes_the_newest_that_can_be_read(run_dir: Path):
    (checkpoint(run_dir, 7) / "index.safetensors").unlink()
    assert inspect(InspectConfig(path=str(run_dir)))["step"] == 6
    with pytest.raises(CheckpointError, match="index.safetensors"):
        inspect(InspectConfig(path=str(checkpoint(run_dir, 7))))


@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "index"])
def test_verify_finds_what_list_cannot(run_dir: Path, monkeypatch: pytest.MonkeyPatch, damage: str):
    monkeypatch.setattr(tools, "PIECE_BYTES", 2**22)
    file = checkpoint(run_dir, 6) / ("index.safetensors" if damage == "index" else "__0_0.distcp")
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        flip(file)
    answer = verify(CheckpointFolder(path=str(run_dir)))
    assert steps(answer, intact=False) == [6]
    assert (answer["intact"], answer["damaged"], answer["latest_intact_step"]) == (6, 1, 7)
    assert str(file) in answer["checkpoints"][1]["fault"]


def test_verify_reads_large_files_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tools, "PIECE_BYTES", 2**22)
    tensor = torch.rand(3 * 2**20 + 5)
    shards = {"w": Shard(tensor, tuple(tensor.shape), (0,))}
    path = save_checkpoint(tmp_path, 1, {"model": shards}, {}, keep=1)
    assert verify(CheckpointFolder(path=str(tmp_path)))["damaged"] == 0
    for at in (0, 2**22 - 1, 2**22, 3 * 2**22):
        flip(path / "__0_0.distcp", at)
        assert verify(CheckpointFolder(path=str(tmp_path)))["damaged"] == 1
        flip(path / "__0_0.distcp", at)
    assert verify(CheckpointFolder(path=str(path)))["damaged"] == 0


def test_a_place_without_checkpoints_is_said_so(tmp_path: Path):
    for command in (list_checkpoints, verify):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            command(CheckpointFolder(path=str(tmp_path)))


def compare(first: Path, second: Path) -> dict[str, Any]:
    return diff(DiffConfig(first=str(first), second=str(second)))


def test_diff_of_the_same_numbers_in_another_layout_is_empty(tmp_path: Path):
    first = save(tmp_path / "a", 1)
    second = reshard(ReshardConfig(checkpoint=str(first), output=str(tmp_path / "b"), files=3))["checkpoint"]
    answer = compare(first, Path(second))
    assert answer["same"] and (answer["equal"], answer["different"]) == (4 * len(SHAPES), 0)
    assert answer["info"] == []


def test_diff_says_how_far_tensors_are_apart(tmp_path: Path):
    same, half = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 2.0])
    a = {
        "same": same, "far": torch.tensor([1.0, -4.0, 0.0]), "wide": torch.ones(2, 3), "half": half,
        "bits": torch.tensor([0.0]), "mine": torch.ones(1),
    }  # fmt: skip
    b = {
        "same": same, "far": torch.tensor([1.5, -4.0, -1.0]), "wide": torch.ones(3, 2), "half": half.bfloat16(),
        "bits": torch.tensor([-0.0]), "yours": torch.ones(1),
    }  # fmt: skip
    for name, tensors, seed in (("a", a, 1), ("b", b, 2)):
        shards = {key: Shard(t, tuple(t.shape), (0,) * t.dim()) for key, t in tensors.items()}
        save_checkpoint(tmp_path / name, 1, {"model": shards}, {"run": {"seed": seed, "flow": {"x": 1}}}, keep=1)
    answer = compare(tmp_path / "a", tmp_path / "b")
    assert not answer["same"] and answer["equal"] == 1
    rows = {row.pop("tensor"): row for row in answer["tensors"]}
    assert rows == {
        "model/far": {"differing": 2, "of": 3, "max_abs": 1.0, "max_rel": 0.25},
        "model/half": {"differing": 0, "of": 2, "max_abs": 0.0, "max_rel": 0.0},
        "model/bits": {"differing": 0, "of": 1, "max_abs": 0.0, "max_rel": 0.0},
    }
    assert (answer["only_in_first"], answer["only_in_second"]) == (["model/mine"], ["model/yours"])
    assert answer["shapes"] == [{"tensor": "model/wide", "first": [2, 3], "second": [3, 2]}]
    assert answer["dtypes"] == [{"tensor": "model/half", "first": "float32", "second": "bfloat16"}]
    assert answer["info"] == [{"setting": "run.seed", "first": 1, "second": 2}]
    json.dumps(answer, allow_nan=False)


def test_diff_does_not_compare_what_is_damaged(run_dir: Path):
    flip(checkpoint(run_dir, 7) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="is damaged"):
        compare(checkpoint(run_dir, 7), checkpoint(run_dir, 6))


@pytest.mark.parametrize("files", [1, 2, 5])
def test_resharded_files_hold_the_same_bits_in_equal_shares(run_dir: Path, tmp_path: Path, files: int):
    answer = reshard(ReshardConfig(checkpoint=str(run_dir), output=str(tmp_path / "out"), files=files))
    path = find_latest(tmp_path / "out")
    assert path is not None and answer["checkpoint"] == str(path)
    data = sorted(path.glob("*.distcp"))
    assert [file.name for file in data] == [f"__{number}_0.distcp" for number in range(files)]
    assert answer["bytes"] == sum(file.stat().st_size for file in data)
    loaded = state("columns", step=None, parts=PARTS)
    load_into(path, loaded)
    assert differences(loaded, step=7) == []
    old, new = Stored.open(checkpoint(run_dir, 7)), Stored.open(path)
    assert {**new.info, "rewritten_from": None} == {**old.info, "rewritten_from": None}
    assert new.index.tensors == old.index.tensors


def test_shares_of_a_large_tensor_are_equal(tmp_path: Path):
    tensor = torch.rand(1024, 64)
    source = save_checkpoint(tmp_path / "a", 1, {"model": {"w": Shard(tensor, (1024, 64), (0, 0))}}, {}, keep=1)
    reshard(ReshardConfig(checkpoint=str(source), output=str(tmp_path / "b"), files=4))
    sizes = [file.stat().st_size for file in (tmp_path / "b").rglob("*.distcp")]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 4096 and sum(sizes) >= tensor.nbytes


def test_resharding_in_another_dtype_rounds_floating_point_alone(tmp_path: Path):
    tensors = {"w": torch.rand(5, 7), "n": torch.arange(5)}
    shards = {name: Shard(t, tuple(t.shape), (0,) * t.dim()) for name, t in tensors.items()}
    source = save_checkpoint(tmp_path / "a", 1, {"model": shards}, {}, keep=1)
    done = reshard(ReshardConfig(checkpoint=str(source), output=str(tmp_path / "b"), dtype="bf16"))
    stored = Stored.open(done["checkpoint"])
    assert {t.name: t.dtype for t in stored.index.tensors} == {"model/w": "bfloat16", "model/n": "int64"}
    found = {name: torch.zeros_like(t) for name, t in tensors.items()}
    stored.fill({f"model/{name}": Shard(t, tuple(t.shape), (0,) * t.dim()) for name, t in found.items()})
    assert torch.equal(found["w"], tensors["w"].bfloat16().float()) and torch.equal(found["n"], tensors["n"])


def test_torchs_own_tool_reads_a_resharded_checkpoint(run_dir: Path, tmp_path: Path):
    from checkpoint_cases import whole
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = reshard(ReshardConfig(checkpoint=str(run_dir), output=str(tmp_path / "out"), files=2))["checkpoint"]
    dcp_to_torch_save(path, tmp_path / "all.pt")
    everything = torch.load(tmp_path / "all.pt")
    assert all(torch.equal(everything[f"ema/{name}"], whole("ema", name, step=7)) for name in SHAPES)


def test_resharding_leaves_nothing_where_it_fails(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".owner").write_text("a run that has saved nothing yet")
    for taken in (run_dir / "checkpoints", tmp_path / "new"):
        with pytest.raises(CheckpointError, match="holds checkpoints already, or a run writes there"):
            reshard(ReshardConfig(checkpoint=str(run_dir), output=str(taken)))
    flip(checkpoint(run_dir, 7) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="is damaged"):
        reshard(ReshardConfig(checkpoint=str(checkpoint(run_dir, 7)), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    done = reshard(ReshardConfig(checkpoint=str(run_dir), output=str(tmp_path / "out")))
    assert done["step"] == 6  # the newest that is whole
    monkeypatch.setattr(LocalFolder, "free_bytes", lambda folder: 100)
    with pytest.raises(CheckpointError, match="are to be written"):
        reshard(ReshardConfig(checkpoint=str(run_dir), output=str(tmp_path / "full")))
    assert not (tmp_path / "full").exists()


def left(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def test_prune_first_says_and_then_does_the_same(run_dir: Path):
    rules = {"path": str(run_dir), "keep": 2, "keep_every_steps": 4, "keep_best": 1}
    said = prune(PruneConfig(**rules))
    assert left(run_dir) == [1, 2, 3, 4, 5, 6, 7]
    assert steps(said, verdict="would be deleted") == [5, 3, 1] and steps(said, verdict="stays") == [7, 6, 4, 2]
    done = prune(PruneConfig(**rules, delete=True))
    assert left(run_dir) == [2, 4, 6, 7]
    assert (done["count"], done["bytes"]) == (said["count"], said["bytes"]) == (3, done["bytes"])
    assert prune(PruneConfig(**rules))["count"] == 0


def test_prune_never_leaves_less_than_one_that_is_whole_by_every_byte(run_dir: Path):
    for step in (7, 6, 5):
        flip(checkpoint(run_dir, step) / "__0_0.distcp")
    answer = prune(PruneConfig(path=str(run_dir), keep=1, delete=True))
    assert left(run_dir) == [4, 5, 6, 7]  # the damaged are newer than all that is whole: not for this to judge
    assert find_latest(run_dir / "checkpoints") == checkpoint(run_dir, 4)
    assert steps(answer, verdict="deleted") == [3, 2, 1]
    flip(checkpoint(run_dir, 4) / "__0_0.distcp")
    assert prune(PruneConfig(path=str(run_dir), keep=1, delete=True))["count"] == 0
    assert left(run_dir) == [4, 5, 6, 7]
    with pytest.raises(CheckpointError, match="is one checkpoint"):
        prune(PruneConfig(path=str(checkpoint(run_dir, 4)), delete=True))


def test_prune_keeps_at_least_one():
    with pytest.raises(ConfigError, match="keep is 0"):
        PruneConfig(path="x", keep=0)


def answer_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_command_answers_in_json_and_takes_its_places_without_names(run_dir: Path, tmp_path: Path, capsys):
    where = str(run_dir)
    assert len(answer_of(capsys, "checkpoint", "list", where)["checkpoints"]) == 7
    assert answer_of(capsys, "checkpoint", "verify", where)["intact"] == 7
    assert answer_of(capsys, "checkpoint", "inspect", where, "tensors=model/*")["tensors"][0]["chunks"] == 1
    assert answer_of(capsys, "checkpoint", "reshard", where, str(tmp_path / "out"), "files=2")["files"] == 2
    assert answer_of(capsys, "checkpoint", "diff", where, str(tmp_path / "out"))["same"] is True
    assert answer_of(capsys, "checkpoint", "prune", where, "keep=1")["count"] == 6
    assert len(left(run_dir)) == 7
    nowhere = str(tmp_path / "nowhere")
    for words in (
        ["list", nowhere], ["diff", where, nowhere], ["diff", where], ["reshard", where, str(tmp_path / "out")],
        ["prune", where, "keep=0"], ["list", where, "more"],
    ):  # fmt: skip
        assert cli.main(["checkpoint", *words]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err


def test_checkpoints_in_an_object_store_are_handled_alike(tmp_path: Path):
    store = f"memory://{tmp_path.name}/run"
    for step in (1, 2, 3):
        about = {"run": RECIPE, "model": {"size": "tiny"}}
        save_checkpoint(f"{store}/checkpoints", step, state("rows", step=step), about, keep=99)
    assert steps(list_checkpoints(CheckpointFolder(path=store)), kept_as="newest") == [3, 2]
    assert verify(CheckpointFolder(path=store))["latest_intact_step"] == 3
    assert inspect(InspectConfig(path=store))["step"] == 3
    assert steps(prune(PruneConfig(path=store, keep=1, delete=True)), verdict="deleted") == [2, 1]
    assert steps(list_checkpoints(CheckpointFolder(path=store))) == [3]
    done = reshard(ReshardConfig(checkpoint=store, output=f"{store}-other", files=2))
    assert diff(DiffConfig(first=store, second=done["checkpoint"]))["same"]
    local = reshard(ReshardConfig(checkpoint=f"{store}-other", output=str(tmp_path / "local")))
    assert diff(DiffConfig(first=store, second=local["checkpoint"]))["same"]
