"""Weights in safetensors, alone or in diffusers' folders, back to a checkpoint: `export` the other way round."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goku_mega.checkpoint.in_turn import Part
from goku_mega.checkpoint.index import StoredTensor
from goku_mega.checkpoint.rewrite import check_no_checkpoints, info_of_new, write_checkpoint
from goku_mega.checkpoint.state import stored_under
from goku_mega.checkpoint.storage import open_folder
from goku_mega.config.checkpoints import ImportConfig
from goku_mega.config.training import ComputeConfig, FlowConfig
from goku_mega.encoders.vae import content_key
from goku_mega.errors import CheckpointError
from goku_mega.interchange.weights_files import WeightsFiles
from goku_mega.model.sizes import SIZES, ModelShape
from goku_mega.model.specs import make_engine
from goku_mega.model.transformer import GokuTransformer, megatron_config
from goku_mega.parallel.groups import single_process_groups
from goku_mega.parallel.parallelize import core_attention
from goku_mega.parallel.shards import Shard


@dataclass(frozen=True)
class Exported:
    """Weights outside of a checkpoint."""

    info: dict[str, Any]
    """What a checkpoint would keep beside them."""
    tensors: dict[str, Tensor]
    """By parameter name; mapped from the files, not read."""

    @classmethod
    def open(cls, source: Path, *, vae: str = "", text: str = "") -> "Exported":
        """The weights in a .safetensors file, in a folder with some, or in diffusers' folders.

        Args:
            vae, text: encoders that belong to them; empty: those that the source has or names.

        Raises:
            CheckpointError: the source is missing, damaged or no Goku model.
        """
        folder = source / "transformer" if (source / "model_index.json").is_file() else source
        tensors = WeightsFiles.open(folder).tensors()
        about = _read_config(folder.parent if folder.is_file() else folder)
        shape = _stated_shape(about, folder) if "hidden_size" in about else _shape_by_size(tensors, source)
        _check(tensors, shape, source)
        info = {
            "step": int(about.get("step", 0)),
            "run": about.get("run", {"seed": 0, "flow": asdict(FlowConfig())}),
            "model": {"size": about.get("size", "imported"), **asdict(shape)},
            "dataset": _dataset(source, about.get("dataset", {}), vae, text),
            "layout": f"imported from {source.resolve()}",
        }
        return cls(info, tensors)

    def fill(self, shards: Mapping[str, Shard]) -> None:
        """Copy the weights into a model's boxes, by parameter name."""
        for name, shard in shards.items():
            shard.tensor.copy_(shard.take(self.tensors[name]))


def import_weights(config: ImportConfig) -> dict[str, Any]:
    """Write the weights in `config.source` as a checkpoint in the folder `config.output`, in the dtypes they have.

    Raises:
        CheckpointError: the source is missing, damaged or no Goku model, or there are checkpoints in the output.
    """
    output = open_folder(config.output)
    check_no_checkpoints(output)
    exported = Exported.open(Path(config.source), vae=config.vae, text=config.text)
    info = info_of_new(exported.info)
    parts = ("model", "ema") if config.weights == "both" else (config.weights,)
    named = {f"{stored_under(part)}/{name}": tensor for part in parts for name, tensor in exported.tensors.items()}
    stored = [StoredTensor(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in named.items()]
    path = write_checkpoint(output, stored, lambda parts: (_cut(named, part) for part in parts), info, files=1)
    return {
        "checkpoint": str(path),
        "step": info["step"],
        "size": info["model"]["size"],
        "parts": list(parts),
        "tensors": len(exported.tensors),
        "parameters": sum(tensor.numel() for tensor in exported.tensors.values()),
    }


def is_exported(path: Path) -> bool:
    """Whether `path` is weights outside of a checkpoint: a safetensors file, or a folder with some."""
    return path.is_file() or (path / "model_index.json").is_file() or WeightsFiles.are_in(path)


def _cut(tensors: dict[str, Tensor], part: Part) -> Tensor:
    box = tuple(slice(start, start + size) for start, size in zip(part.offsets, part.sizes, strict=True))
    return tensors[part.name][box]


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} cannot be read: it is not the JSON of a model's configuration")
    return content


def _stated_shape(about: dict[str, Any], folder: Path) -> ModelShape:
    try:
        values = {field.name: about[field.name] for field in fields(ModelShape)}
        return ModelShape(**{**values, "patch": tuple(values["patch"])})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a Goku model ({error})") from None


def _shape_by_size(tensors: dict[str, Tensor], source: Path) -> ModelShape:
    """The shape of weights without a config: the size that has as many layers of their widths."""

    def length(name: str, dim: int) -> int | None:
        return tensors[name].shape[dim] if name in tensors else None

    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    widths = (layers, length("patch_embedding.weight", 0), length("blocks.0.mlp.linear_fc1.weight", 0))
    text_width = length("caption_projection.linear_1.weight", 1)
    for shape in SIZES.values():
        if (shape.layers, shape.hidden_size, shape.ffn_hidden_size, shape.text_width is None) == (
            *widths, text_width is None,
        ):  # fmt: skip
            cells = shape.patch_dim // shape.latent_channels
            channels = (length("patch_embedding.weight", 1) or 0) // cells
            return ModelShape(**{**asdict(shape), "latent_channels": channels, "text_width": text_width})
    raise CheckpointError(
        f"{source} has no config.json, and its weights are of none of the sizes {', '.join(SIZES)} "
        f"({layers} layers, widths {widths[1]} and {widths[2]}); put the model's config.json beside them"
    )


def _check(tensors: dict[str, Tensor], shape: ModelShape, source: Path) -> None:
    expected = _parameter_shapes(shape)
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        name, count = (missing or unknown)[0], len(missing or unknown)
        what = "lacks" if missing else "has, though the model has not,"
        raise CheckpointError(f"{source} holds another model: it {what} {name} and {count - 1} more tensors")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{source} holds another model: {name} is {tuple(tensor.shape)}, its config.json makes it "
                f"{expected[name]}"
            )


def _parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The whole model's parameters, from one built without memory."""
    groups = single_process_groups()
    engine = make_engine(
        ComputeConfig(), shape, tp=1, device=torch.device("cpu"), dtype=torch.float32, recomputes=False
    )
    attention = core_attention(engine, shape, groups)
    block = partial(engine.block, cross_attention=shape.text_width is not None, self_core_attention=attention)
    with torch.device("meta"):
        model = GokuTransformer(
            shape, config=megatron_config(shape, **engine.settings), block=block, groups=groups.model
        )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _dataset(source: Path, named: dict[str, Any], vae: str, text: str) -> dict[str, Any]:
    """Which encoders belong to the weights: those asked for, those in the source's folders, or those it names."""
    dataset = {"path": str(source.resolve()), **named}
    inside = source / "model_index.json"
    vae = vae or (str(source.resolve() / "vae") if inside.is_file() else "")
    text = text or (str(source.resolve() / "text_encoder") if inside.is_file() else "")
    if vae:
        place = str(Path(vae).resolve()) if vae != "tiny" and Path(vae).is_dir() else vae
        dataset |= {"vae": place, "vae_key": content_key(place)}
    if text:
        dataset["text"] = str(Path(text).resolve()) if Path(text).is_dir() else text
    return dataset
