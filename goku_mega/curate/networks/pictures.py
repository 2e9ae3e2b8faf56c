"""Frames to what image networks take, in torch alone, and where and in what portions networks run."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from goku_mega.encoders.hub import is_out_of_reach, reason
from goku_mega.errors import ConfigError

LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError)


class Statistics(NamedTuple):
    """Mean and standard deviation of red, green and blue in what a network was trained on, of 1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def pick_device(device: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    try:
        picked = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used on this machine; use auto, cpu or cuda") from error
    return picked


def load_model(kind: Any, name_or_path: str, what: str, device: torch.device) -> Any:
    """A model of transformers, frozen, in fp32; `what` it is for goes into the error.

    Raises:
        ConfigError: there is no such model, or it is of another kind.
    """
    from transformers import logging

    logging.disable_progress_bar()
    local = is_out_of_reach(name_or_path)
    try:
        model, found = kind.from_pretrained(
            name_or_path, dtype=torch.float32, local_files_only=local, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise ConfigError(
            f"{what} {name_or_path!r} cannot be loaded ({reason(name_or_path, error, local=local)}); give a folder or "
            "a hub name"
        ) from error
    if found["missing_keys"]:
        raise ConfigError(
            f"{what} {name_or_path!r} lacks weights that it needs, {min(found['missing_keys'])} among them; give a "
            f"folder or a hub name of a {kind.__name__}"
        )
    return model.to(device).eval().requires_grad_(False)


def centre_crop(frame: NDArray[np.uint8], short_side_px: int, crop_px: int, statistics: Statistics) -> Tensor:
    """A frame [height, width, 3] as [3, crop, crop] fp32: its shorter side scaled, its middle, normalised."""
    height, width = frame.shape[:2]
    scale = short_side_px / min(height, width)
    size = (max(short_side_px, int(height * scale)), max(short_side_px, int(width * scale)))
    scaled = scale_frame(frame, size)
    top, left = (size[0] - crop_px) // 2, (size[1] - crop_px) // 2
    return normalise(scaled[:, top : top + crop_px, left : left + crop_px], statistics)


def scale_frame(frame: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """A frame [height, width, 3] to [3, *size] fp32 from 0 to 255, bicubic without aliases, in whole levels."""
    picture = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    return functional.interpolate(picture, size, mode="bicubic", antialias=True)[0].round_().clamp_(0, 255)


def normalise(picture: Tensor, statistics: Statistics) -> Tensor:
    """[3, height, width] from 0 to 255, to a network's scale."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in statistics)
    return (picture / 255 - mean) / deviation


@torch.no_grad()
def one_by_one(frames: Iterable[NDArray[np.uint8]], prepare: Callable[..., Tensor], network: Any) -> Tensor:
    """`network` on every prepared frame, [frames, ...] fp32 on the host.

    One frame at a time: the bits of a frame's answer do not depend on its neighbours', nor the memory on their number.
    """
    return torch.stack([network(prepare(frame)[None])[0].float().cpu() for frame in frames])
