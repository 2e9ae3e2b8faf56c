"""The head that turns CLIP's image feature into an aesthetic score: LAION's layers, or a linear one."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from goku_mega.errors import ConfigError

Weights = dict[str, Tensor]

LAYERS = (0, 2, 4, 6, 7)
"""Places of the linear layers in `sac+logos+ava1-l14-linearMSE.pth`; between them are dropouts alone."""
REMEDY = "give sac+logos+ava1-l14-linearMSE.pth, or safetensors of the same names"


def load_head(path: Path, width: int, device: torch.device) -> nn.Module:
    """A head for features of this width.

    Raises:
        ConfigError: no such file, it holds other weights, or they are for features of another width.
    """
    weights = read_weights(path, f"aesthetic.head {str(path)!r}", REMEDY)
    names = [f"layers.{layer}" for layer in LAYERS] if "layers.0.weight" in weights else [""]
    wanted = {f"{name}.{kind}".lstrip(".") for name in names for kind in ("weight", "bias")}
    if set(weights) != wanted:
        odd = min(set(weights) ^ wanted)
        raise ConfigError(f"aesthetic.head {str(path)!r} is no aesthetic head, because of {odd}; {REMEDY}")
    layers = [_linear(weights, name) for name in names]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    if shapes[0][0] != width or shapes[-1][1] != 1:
        raise ConfigError(
            f"aesthetic.head {str(path)!r} makes {shapes[-1][1]} of {shapes[0][0]} features, and aesthetic.clip gives "
            f"{width}; give the head that belongs to this CLIP"
        )
    return nn.Sequential(*layers).to(device).eval().requires_grad_(False)


def read_weights(path: Path, what: str, remedy: str) -> Weights:
    """The tensors of a .safetensors file, or of a file of `torch.save` that holds nothing but tensors.

    Raises:
        ConfigError: there is no such file, or it is none of these.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        read: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{what} is not there; {remedy}") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile,
            SafetensorError) as error:  # fmt: skip
        raise ConfigError(f"{what} cannot be read as weights ({type(error).__name__}); {remedy}") from error
    if not isinstance(read, dict) or not all(isinstance(value, Tensor) for value in read.values()):
        raise ConfigError(f"{what} holds something other than weights by name; {remedy}")
    return {name: value.float() if value.is_floating_point() else value for name, value in read.items()}


def _linear(weights: Weights, name: str) -> nn.Linear:
    weight, bias = (weights[f"{name}.{kind}".lstrip(".")] for kind in ("weight", "bias"))
    layer = nn.Linear(weight.shape[-1], bias.numel())
    layer.load_state_dict({"weight": weight.reshape(bias.numel(), -1), "bias": bias.reshape(-1)})
    return layer
