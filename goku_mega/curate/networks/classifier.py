"""The probability of one label by an image classifier of transformers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goku_mega.curate.clip import Frames
from goku_mega.curate.networks.pictures import (
    IMAGENET,
    Statistics,
    load_model,
    normalise,
    one_by_one,
    pick_device,
    scale_frame,
)  # fmt: skip
from goku_mega.errors import ConfigError


class Classifier:
    """A classifier and its label."""

    def __init__(self, name_or_path: str, label: str, device: str) -> None:
        """
        Raises:
            ConfigError: there is no such classifier, or it does not know the label.
        """
        from transformers import AutoModelForImageClassification

        self._device = pick_device(device)
        self._model = load_model(AutoModelForImageClassification, name_or_path, "scorer", self._device)
        labels = {text: number for number, text in self._model.config.id2label.items()}
        if label not in labels:
            raise ConfigError(f"scorer {name_or_path!r} knows no label {label!r}; its labels are {', '.join(labels)}")
        self._label = int(labels[label])
        self._size, self._statistics = _preparation(name_or_path, self._model.config)

    def __call__(self, frames: Iterable[Frames]) -> list[float]:
        return [float(probability) for probability in one_by_one(frames, self._prepare, self._probability)]

    def _prepare(self, frame: Frames) -> Tensor:
        return normalise(scale_frame(frame, self._size), self._statistics).to(self._device)

    def _probability(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self._model(pixel_values=pictures).logits
        return torch.softmax(logits.float(), -1)[:, self._label]


def _preparation(name_or_path: str, config: Any) -> tuple[tuple[int, int], Statistics]:
    """Height and width that the classifier takes, and its normalisation, by its preprocessor_config.json if any."""
    from transformers.utils import cached_file

    found = cached_file(name_or_path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    stated = json.loads(Path(found).read_text()) if found else {}
    own = int(getattr(config, "image_size", 224))
    size: Any = stated.get("crop_size") or stated.get("size") or own
    if not isinstance(size, dict):
        size = {"shortest_edge": size}
    height, width = (size.get(side, size.get("shortest_edge", own)) for side in ("height", "width"))
    mean, deviation = stated.get("image_mean", IMAGENET.mean), stated.get("image_std", IMAGENET.deviation)
    return (int(height), int(width)), Statistics(tuple(mean), tuple(deviation))
