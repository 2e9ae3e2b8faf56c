"""Features of single pictures, of length 1: DINOv2's for likeness, CLIP's for aesthetics."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from goku_mega.curate.networks.pictures import CLIP, IMAGENET, centre_crop, load_model, one_by_one, pick_device

DINO_SHORT_SIDE_PX = 256
DINO_CROP_PX = 224


class DinoFeatures:
    """DINOv2's class token after its last norm."""

    def __init__(self, name_or_path: str, device: str) -> None:
        """
        Raises:
            ConfigError: there is no such model.
        """
        from transformers import Dinov2Model

        self._device = pick_device(device)
        self._model = load_model(Dinov2Model, name_or_path, "embedder", self._device)

    def __call__(self, frames: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """[frames, width] of frames [height, width, 3]."""
        return np.asarray(one_by_one(frames, self._prepare, self._feature).numpy())

    def _prepare(self, frame: NDArray[np.uint8]) -> Tensor:
        return centre_crop(frame, DINO_SHORT_SIDE_PX, DINO_CROP_PX, IMAGENET).to(self._device)

    def _feature(self, pictures: Tensor) -> Tensor:
        hidden: Tensor = self._model(pixel_values=pictures).last_hidden_state
        return torch.nn.functional.normalize(hidden[:, 0], dim=-1)


class ClipFeatures:
    """CLIP's image embedding, in the space that it shares with text."""

    def __init__(self, name_or_path: str, device: torch.device) -> None:
        """
        Raises:
            ConfigError: there is no such model.
        """
        from transformers import CLIPVisionModelWithProjection

        self._device = device
        self._model = load_model(CLIPVisionModelWithProjection, name_or_path, "aesthetic.clip", device)
        self.width = int(self._model.config.projection_dim)

    def __call__(self, frames: Iterable[NDArray[np.uint8]]) -> Tensor:
        """[frames, width] of frames [height, width, 3]."""
        return one_by_one(frames, self._prepare, self._feature)

    def _prepare(self, frame: NDArray[np.uint8]) -> Tensor:
        side = int(self._model.config.image_size)
        return centre_crop(frame, side, side, CLIP).to(self._device)

    def _feature(self, pictures: Tensor) -> Tensor:
        embedding: Tensor = self._model(pixel_values=pictures).image_embeds
        return torch.nn.functional.normalize(embedding, dim=-1)
