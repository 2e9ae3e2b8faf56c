"""Weights in safetensors files, one or several with an index beside them, as the Hugging Face libraries lay them out.

Written and read tensor by tensor: neither side ever holds more than some of them.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from goku_mega.checkpoint.progress import byte_progress
from goku_mega.errors import CheckpointError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
STEMS = ("model", "diffusion_pytorch_model")
"""What the files of a model are called before their number: by transformers, and by diffusers."""
HEADER_ALIGNMENT = 8
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The format's names of dtypes."""


@dataclass(frozen=True)
class TensorKind:
    """A tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


Reader = Callable[[Sequence[TensorKind]], Iterator[Tensor]]
"""Gives tensors in the order they are asked for, each when its turn has come."""


def write_weights(
    folder: Path,
    stem: str,
    kinds: Iterable[TensorKind],
    read: Reader,
    *,
    max_file_bytes: int,
    about: dict[str, str],
) -> list[str]:
    """Write tensors into `folder`; the names of the files.

    One file `STEM.safetensors`, or, where they are more than `max_file_bytes` (0: never), `STEM-00001-of-0000N` and so
    on with an index. Only a tensor that is larger by itself makes a larger file.

    Args:
        about: metadata for the files' heads.
    """
    # The format wants each tensor at a multiple of its numbers' size; the largest first makes it so without gaps.
    ordered = sorted(kinds, key=lambda kind: (-kind.dtype.itemsize, kind.name))
    files = _divide(ordered, max_file_bytes)
    names = [f"{stem}-{number:05d}-of-{len(files):05d}{SUFFIX}" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [f"{stem}{SUFFIX}"]
    with byte_progress("write", sum(kind.bytes for kind in ordered)) as advance:
        for name, inside in zip(names, files, strict=True):
            _write_file(folder / name, inside, read, about, advance)
    if len(files) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(kind.bytes for kind in ordered)},
        "weight_map": {kind.name: name for name, inside in zip(names, files, strict=True) for kind in inside},
    }
    write_text(folder / f"{stem}{INDEX_SUFFIX}", json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [*names, f"{stem}{INDEX_SUFFIX}"]


def _divide(kinds: Sequence[TensorKind], max_file_bytes: int) -> list[list[TensorKind]]:
    files: list[list[TensorKind]] = [[]]
    filled = 0
    for kind in kinds:
        if files[-1] and max_file_bytes and filled + kind.bytes > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(kind)
        filled += kind.bytes
    return files


def _write_file(
    path: Path,
    kinds: Sequence[TensorKind],
    read: Reader,
    about: dict[str, str],
    advance: Callable[[int], None],
) -> None:
    head: dict[str, Any] = {"__metadata__": {"format": "pt", **about}}
    end = 0
    for kind in kinds:
        start, end = end, end + kind.bytes
        head[kind.name] = {"dtype": CODES[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in read(kinds):
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class WeightsFiles:
    """Tensors in safetensors files, by name."""

    files: dict[str, Path]
    """Which file each tensor is in."""

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Whether a folder has such files, whole or not."""
        return any((folder / f"{stem}{suffix}").is_file() for stem in STEMS for suffix in (SUFFIX, INDEX_SUFFIX))

    @classmethod
    def open(cls, path: Path) -> "WeightsFiles":
        """One file, or a folder with one or with an index of several.

        Raises:
            CheckpointError: there is none, or one of them is missing or damaged.
        """
        if path.is_file():
            return cls(dict.fromkeys(_names(path), path))
        for stem in STEMS:
            index = path / f"{stem}{INDEX_SUFFIX}"
            if index.is_file():
                return cls._open_index(index)
            if (path / f"{stem}{SUFFIX}").is_file():
                return cls.open(path / f"{stem}{SUFFIX}")
        wanted = " or ".join(f"{stem}{SUFFIX}" for stem in STEMS)
        raise CheckpointError(f"{path} is no safetensors file and no folder with {wanted} (or their index)")

    @classmethod
    def _open_index(cls, index: Path) -> "WeightsFiles":
        try:
            places = json.loads(index.read_bytes())["weight_map"].items()
            files = {str(name): index.parent / file for name, file in places}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index} is damaged: it is not the index of safetensors files") from None
        inside = {file: set(_names(file)) for file in set(files.values())}
        for name, file in files.items():
            if name not in inside[file]:
                raise CheckpointError(f"{file} does not hold {name}, though {index.name} says so")
        return cls(files)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name. They are mapped, not read: the bytes come from the files as they are used."""
        found: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.files.values()):
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name, place in self.files.items() if place == file}
        return found


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or is not a whole safetensors file ({error})") from None
