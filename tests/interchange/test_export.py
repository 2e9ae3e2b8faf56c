"""Weights that leave as safetensors or as diffusers' folders are the checkpoint's, and come back as they left."""

import json
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_cases import open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from goku_mega import cli
from goku_mega.checkpoint import in_turn
from goku_mega.checkpoint.in_turn import Part, read_in_turn
from goku_mega.checkpoint.load import Stored, load_info
from goku_mega.checkpoint.save import save_checkpoint
from goku_mega.config.checkpoints import ExportConfig, ImportConfig
from goku_mega.encoders.vae import TINY
from goku_mega.errors import CheckpointError
from goku_mega.interchange import export as exporting
from goku_mega.interchange.export import export
from goku_mega.interchange.importing import import_weights
from goku_mega.interchange.initial import initialise_from
from goku_mega.model.sizes import SIZES
from goku_mega.parallel.groups import single_process_groups
from goku_mega.parallel.parallelize import build_model
from goku_mega.parallel.shards import Shard
from goku_mega.sample.sampler import Drawing, Pipeline, Prompt

MakeRun = Callable[..., Path]
SMALL_GB = 1e-4
DRAWING = Drawing(2, 2.0, "euler")
PROMPTS = [Prompt("a red circle moving left", 3, (2, 4, 4))]


@pytest.fixture(scope="module")
def run_dir(make_run: MakeRun) -> Path:
    return make_run(shift_base_tokens=4)


def weights_of(run_dir: Path, part: str) -> dict[str, Tensor]:
    stored = Stored.open(open_checkpoint(run_dir))
    kept = [tensor for tensor in stored.index.tensors if tensor.name.startswith(f"{part}/")]
    parts = (Part(t.name, getattr(torch, t.dtype), (0,) * len(t.shape), t.shape) for t in kept)
    return {t.name.removeprefix(f"{part}/"): read for t, read in zip(kept, read_in_turn(stored, parts), strict=True)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Bit for bit, dtypes and names too."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("part", ["ema", "model"])
def test_one_file_holds_the_chosen_weights_bit_for_bit(run_dir: Path, tmp_path: Path, part: str):
    done = export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out"), weights=part))
    assert done["files"] == ["model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert same(found, weights_of(run_dir, part))
    assert (done["tensors"], done["parameters"]) == (len(found), sum(t.numel() for t in found.values()))


def test_ema_and_model_are_not_the_same_weights(run_dir: Path):
    assert not same(weights_of(run_dir, "ema"), weights_of(run_dir, "model"))


def test_large_weights_are_divided_over_files_that_the_hubs_library_reads(run_dir: Path, tmp_path: Path):
    from huggingface_hub import load_torch_model

    output = tmp_path / "out"
    done = export(ExportConfig(checkpoint=str(run_dir), output=str(output), max_file_gb=SMALL_GB))
    *files, index = done["files"]
    assert len(files) > 2 and index == "model.safetensors.index.json"
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    described = json.loads((output / index).read_text())
    assert described["metadata"]["total_size"] == done["bytes"]
    for file in files:
        inside = load_file(output / file)
        assert {name for name, place in described["weight_map"].items() if place == file} == set(inside)
        # Only a tensor that is too large alone has a file of that size, and then it is alone in it.
        assert len(inside) == 1 or sum(t.nbytes for t in inside.values()) <= SMALL_GB * 1e9
    expected = weights_of(run_dir, "ema")
    module = torch.nn.Module()
    for name, tensor in expected.items():
        *owners, last = name.split(".")
        owner = module
        for part in owners:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(last, torch.nn.Parameter(torch.zeros_like(tensor)))
    load_torch_model(module, output, strict=True)
    assert same(module.state_dict(), expected)


def test_numbers_are_written_in_the_dtype_asked_for(run_dir: Path, tmp_path: Path):
    export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out"), dtype="bf16"))
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in weights_of(run_dir, "ema").items()}
    assert same(read_all(tmp_path / "out"), expected)


def test_mixed_dtypes_scalars_keep_what_they_are(tmp_path: Path):
    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16), "b": torch.rand(2, 5, dtype=torch.float64),
        "c": torch.tensor(1.5), "d": torch.tensor([True, False, True]),
    }  # fmt: skip
    shards = {name: Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in tensors.items()}
    save_checkpoint(tmp_path / "run", 1, {"model": shards}, {"model": {}}, keep=1)
    export(ExportConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "out"), weights="model"))
    assert same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(length))
    starts = {name: 8 + length + head[name]["data_offsets"][0] for name in tensors}
    assert all(start % tensors[name].itemsize == 0 for name, start in starts.items())  # so it can be mapped as it is


def test_the_card_says_what_the_checkpoint_says_and_no_more(run_dir: Path, tmp_path: Path):
    export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "goku_mega"
    assert "license" not in yaml.safe_load(head) and "# license: to be chosen" in head
    parameters = sum(tensor.numel() for tensor in weights_of(run_dir, "ema").values())
    for said in ("7 steps", f"{parameters:,}", "float32", "moving average", "shift_base_tokens: 4", "| vae | tiny |"):
        assert said in body, said
    assert "Measured" not in body

    measured = tmp_path / "measured"
    shards = {"w": Shard(torch.zeros(2), (2,), (0,))}
    save_checkpoint(measured, 3, {"model": shards}, {"model": {}, "figures": {"FVD": 217.5}, "loss": 0.25}, keep=1)
    export(ExportConfig(checkpoint=str(measured), output=str(tmp_path / "out2"), weights="model"))
    assert re.search(r"Measured.*0\.25.*FVD \| 217\.5", (tmp_path / "out2" / "README.md").read_text(), re.S)


@pytest.mark.parametrize("style", ["safetensors", "diffusers"])
@pytest.mark.parametrize("max_file_gb", [0.0, SMALL_GB])
def test_what_comes_back_is_what_left_and_samples_alike(run_dir: Path, tmp_path: Path, style: str, max_file_gb: float):
    out, back = tmp_path / "out", tmp_path / "back"
    export(ExportConfig(checkpoint=str(run_dir), output=str(out), style=style, max_file_gb=max_file_gb))
    done = import_weights(ImportConfig(source=str(out), output=str(back)))
    assert (done["step"], done["parts"]) == (7, ["model", "ema"])
    for part in ("model", "ema"):
        assert same(weights_of(back, part), weights_of(run_dir, "ema"))
    old, new = (load_info(open_checkpoint(path)) for path in (run_dir, back))
    assert (new["model"], new["run"], new["step"]) == (old["model"], old["run"], old["step"])

    model = build_model(Pipeline.from_checkpoint(out, weights="ema").shape, single_process_groups(), seed=5)
    initialise_from(back, model.shards, weights="model")  # as a new run of training does
    assert same({name: shard.tensor for name, shard in model.shards.items()}, weights_of(run_dir, "ema"))

    first, *others = (
        Pipeline.from_checkpoint(path, weights="ema").latents(PROMPTS, DRAWING)[0] for path in (run_dir, back, out)
    )
    assert all(torch.equal(first, other) for other in others)


def test_diffusers_and_transformers_load_the_folders_parts(run_dir: Path, tmp_path: Path):
    from diffusers import AutoencoderKLCogVideoX, FlowMatchEulerDiscreteScheduler
    from transformers import T5EncoderModel, T5Tokenizer

    out = tmp_path / "out"
    export(ExportConfig(checkpoint=str(run_dir), output=str(out), style="diffusers"))
    index = json.loads((out / "model_index.json").read_text())
    parts = {name for name in index if not name.startswith("_")}
    assert parts == {path.name for path in out.iterdir() if path.is_dir()}
    AutoencoderKLCogVideoX.from_pretrained(out, subfolder="vae")
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler").config.shift == 1.0
    encoder = T5EncoderModel.from_pretrained(out / "text_encoder").eval().requires_grad_(False)
    tokenizer = T5Tokenizer.from_pretrained(out / "tokenizer")
    text = Pipeline.from_checkpoint(run_dir, weights="ema").text.encode(["a red circle"])[0]
    tokens = tokenizer("a red circle", return_tensors="pt")["input_ids"]
    # Captions are encoded in batches of a fixed shape, which changes last bits.
    torch.testing.assert_close(encoder(input_ids=tokens).last_hidden_state[0], text, rtol=1e-4, atol=1e-5)


def test_a_moved_folder_brings_its_encoders_along(run_dir: Path, tmp_path: Path):
    export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out"), style="diffusers"))
    (tmp_path / "out").rename(tmp_path / "moved")
    import_weights(ImportConfig(source=str(tmp_path / "moved"), output=str(tmp_path / "back")))
    dataset = load_info(open_checkpoint(tmp_path / "back"))["dataset"]
    assert (dataset["vae"], dataset["text"]) == (str(tmp_path / "moved/vae"), str(tmp_path / "moved/text_encoder"))


def test_no_more_than_a_batch_of_tensors_is_in_memory(run_dir: Path, tmp_path: Path, monkeypatch):
    """Whatever the number of tensors: counted by those alive whenever another is made."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    empty = torch.empty

    def watched(*size: object, **options: object) -> Tensor:
        tensor = empty(*size, **options)
        made.append(weakref.ref(tensor))
        alive.append(sum(other.nbytes for ref in made if (other := ref()) is not None))
        return tensor

    monkeypatch.setattr(in_turn, "BATCH_BYTES", 8000)
    monkeypatch.setattr(torch, "empty", watched)
    done = export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out")))
    largest = max(tensor.nbytes for tensor in weights_of(run_dir, "ema").values())
    assert len(alive) > 20
    assert done["bytes"] > 5 * (8000 + largest)
    assert max(alive[: done["tensors"]]) <= 8000 + 2 * largest


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def test_imported_numbers_stay_in_their_file_until_they_are_used(tmp_path: Path):
    from goku_mega.interchange.weights_files import WeightsFiles

    save_file({"w": torch.ones(2**23)}, tmp_path / "model.safetensors")
    before = anonymous_bytes()
    tensors = WeightsFiles.open(tmp_path).tensors()
    assert tensors["w"].sum() == 2**23
    assert anonymous_bytes() - before < 2**23


@pytest.mark.parametrize("style", ["safetensors", "diffusers"])
@pytest.mark.parametrize("at", [1, 20])
def test_an_export_that_fails_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch, style: str, at: int):
    def disk_is_full_at_the_last(stored: Stored, parts: Iterable[Part]) -> Iterator[Tensor]:
        for number, part in enumerate(parts, start=1):
            if number == at:
                raise OSError(28, "No space left on device")
            yield torch.zeros(part.sizes, dtype=part.dtype)

    monkeypatch.setattr(exporting, "read_in_turn", disk_is_full_at_the_last)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out"), style=style))
    assert list(tmp_path.iterdir()) == []


def test_an_export_never_writes_over_what_is_there(run_dir: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out")))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="is there already"):
        export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out")))
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_missing_weights_and_encoders_are_named(make_run: MakeRun, run_dir: Path, tmp_path: Path):
    save_checkpoint(tmp_path / "run", 1, {"model": {"w": Shard(torch.zeros(2), (2,), (0,))}}, {"model": {}}, keep=1)
    with pytest.raises(CheckpointError, match="no weights 'ema'"):
        export(ExportConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "out")))
    changed = make_run(vae_key="0" * 16)
    with pytest.raises(CheckpointError, match="VAE 'tiny' .* gone or has changed"):
        export(ExportConfig(checkpoint=str(changed), output=str(tmp_path / "out"), style="diffusers"))
    assert not (tmp_path / "out").exists()


def test_encoders_from_the_hub_are_copied_from_their_downloaded_files(make_run: MakeRun, tmp_path: Path, monkeypatch):
    run_dir = make_run(vae="maker/vae", vae_key="maker/vae", text="maker/t5")
    data = Path(load_info(open_checkpoint(run_dir))["dataset"]["path"])
    places = {"maker/vae": TINY, "maker/t5": data / "text_encoder"}
    monkeypatch.setattr("goku_mega.interchange.export.is_out_of_reach", lambda name: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: places[name])
    done = export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out"), style="diffusers"))
    for file in ("vae/config.json", "text_encoder/spiece.model", "tokenizer/spiece.model"):
        name, last = file.split("/")
        source = TINY if name == "vae" else data / "text_encoder"
        assert (tmp_path / "out" / file).read_bytes() == (source / last).read_bytes() and file in done["files"]


def test_an_encoder_that_cannot_be_fetched_is_named(make_run: MakeRun, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("goku_mega.interchange.export.is_out_of_reach", lambda name: True)
    run_dir = make_run(vae="nobody/vae", vae_key="nobody/vae")
    with pytest.raises(CheckpointError, match="encoder 'nobody/vae' is no folder and cannot be fetched"):
        export(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "out"), style="diffusers"))
    assert list(tmp_path.iterdir()) == []


def exported(run_dir: Path, folder: Path, max_file_gb: float = 0.0) -> Path:
    export(ExportConfig(checkpoint=str(run_dir), output=str(folder), max_file_gb=max_file_gb))
    return folder


def refused(source: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        import_weights(ImportConfig(source=str(source), output=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()
    return str(error.value)


def test_weights_that_are_no_goku_model_are_refused_and_nothing_is_written(run_dir: Path, tmp_path: Path):
    assert "no safetensors file and no folder with" in refused(tmp_path, tmp_path)
    folder = exported(run_dir, tmp_path / "out")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if name != "final_layer.linear.bias"}, file)
    assert "lacks final_layer.linear.bias" in refused(folder, tmp_path)
    save_file({**tensors, "more": torch.zeros(1)}, file)
    assert "has, though the model has not, more" in refused(folder, tmp_path)
    save_file({**tensors, "final_layer.linear.bias": torch.zeros(3)}, file)
    assert "final_layer.linear.bias is (3,)" in refused(folder, tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    assert "not a whole safetensors file" in refused(folder, tmp_path)
    (folder / "config.json").write_text("{")
    save_file(tensors, file)
    assert "config.json cannot be read" in refused(folder, tmp_path)
    (folder / "config.json").unlink()
    assert "none of the sizes" in refused(folder, tmp_path)


def test_a_file_missing_among_several_is_named(run_dir: Path, tmp_path: Path):
    folder = exported(run_dir, tmp_path / "out", SMALL_GB)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    assert str(lost) in refused(folder, tmp_path)


def test_weights_alone_are_known_by_their_size(tmp_path: Path):
    model = build_model(SIZES["tiny"], single_process_groups(), seed=0, fsdp=False)
    tensors = {name: shard.tensor for name, shard in model.shards.items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    source = tmp_path / "weights.safetensors"
    import_weights(ImportConfig(source=str(source), output=str(tmp_path / "back"), weights="ema", vae="tiny"))
    info = load_info(open_checkpoint(tmp_path / "back"))
    assert (info["model"]["layers"], info["model"]["heads"], info["model"]["text_width"]) == (4, 4, 64)
    assert info["dataset"]["vae"] == "tiny"
    assert same(weights_of(tmp_path / "back", "ema"), tensors)
    assert weights_of(tmp_path / "back", "model") == {}
    with pytest.raises(CheckpointError, match="does not say which encoders its weights go with"):
        Pipeline.from_checkpoint(tmp_path / "back", weights="ema")
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        import_weights(ImportConfig(source=str(source), output=str(tmp_path / "back")))


def test_the_commands_go_there_and_back(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    assert cli.main(["checkpoint", "export", str(run_dir), out, "dtype=bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 7
    assert cli.main(["checkpoint", "import", out, back, "weights=ema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parts"] == ["ema"]
    assert {tensor.dtype for tensor in weights_of(Path(back), "ema").values()} == {torch.bfloat16}
    for words in (["export", str(run_dir), out], ["export", out, str(tmp_path / "other")], ["import", back, out]):
        assert cli.main(["checkpoint", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
