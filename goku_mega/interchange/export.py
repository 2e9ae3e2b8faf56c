"""A checkpoint's weights for others: safetensors with a model card, or a whole pipeline in diffusers' folders.

`importing` reads both back. The output folder appears with everything in it, or not at all.
"""

import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goku_mega.checkpoint.in_turn import Part, read_in_turn
from goku_mega.checkpoint.index import StoredTensor
from goku_mega.checkpoint.load import Stored, load_named
from goku_mega.checkpoint.state import stored_under
from goku_mega.checkpoint.storage import LocalFolder
from goku_mega.config.checkpoints import ExportConfig
from goku_mega.encoders.hub import is_out_of_reach
from goku_mega.encoders.vae import TINY, content_key
from goku_mega.errors import CheckpointError
from goku_mega.interchange.model_card import WeightsSummary, model_card
from goku_mega.interchange.weights_files import TensorKind, write_text, write_weights

MODEL_CLASS = "GokuTransformer"
CONFIG = "config.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
ENCODER_FILES = ("*.json", "*.safetensors", "*.model")
TOKENIZER_FILES = ("spiece.model", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json")
GB = 10**9


@dataclass(frozen=True)
class _Weights:
    """What is exported of a checkpoint."""

    stored: Stored
    part: str
    kinds: tuple[TensorKind, ...]
    max_file_bytes: int

    @property
    def info(self) -> dict[str, Any]:
        return self.stored.info

    @property
    def summary(self) -> WeightsSummary:
        return WeightsSummary(
            weights=self.part,
            parameters=sum(torch.Size(kind.shape).numel() for kind in self.kinds),
            dtypes=tuple(sorted({str(kind.dtype).removeprefix("torch.") for kind in self.kinds})),
            bytes=sum(kind.bytes for kind in self.kinds),
        )

    def write(self, folder: Path, stem: str) -> list[str]:
        """The files of the weights and their config.json; the names of the former."""
        folder.mkdir(exist_ok=True)
        write_text(folder / CONFIG, _json(self._config()))
        about = {"step": str(self.info["step"]), "weights": self.part}
        return write_weights(folder, stem, self.kinds, self._read, max_file_bytes=self.max_file_bytes, about=about)

    def _read(self, kinds: Sequence[TensorKind]) -> Iterator[Tensor]:
        prefix = stored_under(self.part)
        parts = (Part(f"{prefix}/{kind.name}", kind.dtype, (0,) * len(kind.shape), kind.shape) for kind in kinds)
        return read_in_turn(self.stored, parts)

    def _config(self) -> dict[str, Any]:
        """The model's shape as Hugging Face's libraries keep it, and beside it what `importing` needs."""
        told = {name: self.info[name] for name in ("step", "run", "dataset") if name in self.info}
        return {"_class_name": MODEL_CLASS, **self.info["model"], "weights": self.part, **told}


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a checkpoint's weights to the new folder `config.output`.

    Raises:
        CheckpointError: there is no whole checkpoint, it has no such weights, the output is there already, the disk is
            full, or (in diffusers' folders) an encoder is gone. Nothing is written then.
    """
    output = Path(config.output).absolute()
    stored, (weights, files) = load_named(config.checkpoint, lambda stored: _write(output, stored, config))
    return {
        "output": str(output),
        "checkpoint": str(stored.folder),
        "step": stored.info["step"],
        "weights": weights.part,
        "tensors": len(weights.kinds),
        "parameters": weights.summary.parameters,
        "bytes": weights.summary.bytes,
        "files": files,
    }


def _write(output: Path, stored: Stored, config: ExportConfig) -> tuple[_Weights, list[str]]:
    weights = _choose(stored, config)
    with new_folder(output) as folder:
        files = _write_pipeline(folder, weights) if config.style == "diffusers" else weights.write(folder, "model")
        write_text(folder / "README.md", model_card(weights.info, weights.summary))
    return weights, files


def _choose(stored: Stored, config: ExportConfig) -> _Weights:
    prefix = f"{stored_under(config.weights)}/"
    kinds = tuple(
        TensorKind(tensor.name.removeprefix(prefix), _dtype(tensor, config), tensor.shape)
        for tensor in stored.index.tensors
        if tensor.name.startswith(prefix)
    )
    if not kinds:
        raise CheckpointError(f"{stored.folder} holds no weights {config.weights!r}; set weights to ema or model")
    return _Weights(stored, config.weights, kinds, int(config.max_file_gb * GB))


def _dtype(tensor: StoredTensor, config: ExportConfig) -> torch.dtype:
    stored: torch.dtype = getattr(torch, tensor.dtype)
    return DTYPES.get(config.dtype, stored) if stored.is_floating_point else stored


def _write_pipeline(folder: Path, weights: _Weights) -> list[str]:
    """The transformer with its encoders and its scheduler, each in its own folder."""
    dataset = weights.info.get("dataset", {})
    index: dict[str, Any] = {
        "_class_name": "GokuPipeline",
        "_diffusers_version": metadata.version("diffusers"),
        "transformer": ["goku_mega", MODEL_CLASS],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    files = [f"transformer/{name}" for name in weights.write(folder / "transformer", "diffusion_pytorch_model")]
    files += _copy(_vae_folder(dataset), folder / "vae", ENCODER_FILES)
    if weights.info["model"].get("text_width") is not None:
        text = _text_folder(dataset)
        index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
        # The tokenizer is in both: diffusers looks for it apart, `encoders.text` beside the encoder.
        files += _copy(text, folder / "text_encoder", ENCODER_FILES)
        files += _copy(text, folder / "tokenizer", TOKENIZER_FILES)
    (folder / "scheduler").mkdir()
    write_text(folder / "scheduler" / "scheduler_config.json", _json(_scheduler(weights.info, index)))
    write_text(folder / "model_index.json", _json(index))
    return files


def _scheduler(info: Mapping[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' own class of rectified flow; the shift of larger samples, which it has not, is told where it is on."""
    about = {"_class_name": index["scheduler"][1], "_diffusers_version": index["_diffusers_version"]}
    base = info.get("run", {}).get("flow", {}).get("shift_base_tokens", 0)
    return {**about, "num_train_timesteps": 1000, "shift": 1.0, **({"shift_base_tokens": base} if base else {})}


def _vae_folder(dataset: Mapping[str, Any]) -> Path:
    name = dataset.get("vae")
    if name is None or content_key(name) != dataset.get("vae_key"):
        raise CheckpointError(f"the VAE {name!r} of the checkpoint's data set is gone or has changed; put it back")
    folder = TINY if name == "tiny" else _local(name, ("vae/*", *ENCODER_FILES))
    return folder / "vae" if (folder / "vae" / CONFIG).exists() else folder


def _text_folder(dataset: Mapping[str, Any]) -> Path:
    name = dataset.get("text")
    if name is None:
        raise CheckpointError("the checkpoint does not say which text encoder its data set was made with")
    inside = Path(dataset.get("path", "")) / name
    return inside if inside.is_dir() else _local(name, ENCODER_FILES)


def _local(name_or_path: str, patterns: tuple[str, ...]) -> Path:
    """A folder as it is, a name on the hub by its downloaded files."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    try:
        offline = is_out_of_reach(name_or_path)
        return Path(snapshot_download(name_or_path, allow_patterns=list(patterns), local_files_only=offline))
    except (OSError, ValueError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"the encoder {name_or_path!r} is no folder and cannot be fetched ({why})") from None


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copy the files of a folder that match; their names after the target's."""
    names = [path.name for path in sorted(source.iterdir()) if any(fnmatch.fnmatch(path.name, p) for p in patterns)]
    if not names:
        raise CheckpointError(f"{source} holds none of {', '.join(patterns)}; it is no encoder that can be exported")
    target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / name)
        with (target / name).open("rb") as file:
            os.fsync(file.fileno())
    return [f"{target.name}/{name}" for name in names]


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end; on an error there is none.

    Raises:
        CheckpointError: `output` is there already, or the disk refuses.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise CheckpointError(f"{output} is there already; choose another output, or remove it")
    attempt = output.with_name(f"{output.name}.tmp.{uuid.uuid4().hex[:12]}")
    try:
        attempt.mkdir(parents=True)
        yield attempt
        for folder in (attempt, *(path for path in attempt.rglob("*") if path.is_dir())):
            LocalFolder(folder).sync()
        LocalFolder(attempt).rename_to(output)
    except OSError as error:
        shutil.rmtree(attempt, ignore_errors=True)
        raise CheckpointError(f"{output} cannot be written ({error})") from error
    except BaseException:
        shutil.rmtree(attempt, ignore_errors=True)
        raise


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
