"""Scores of key frames by something of the user's own, such as NSFW content or watermarks (paper figure 2)."""

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goku_mega.config.curation import HookConfig
from goku_mega.curate.clip import Clip, Frames
from goku_mega.curate.networks.pictures import (
    IMAGENET,
    Statistics,
    load_model,
    normalise,
    one_by_one,
    pick_device,
    scale_frame,
)
from goku_mega.errors import ConfigError, DataError

CLASSIFIER = "classifier:"

Scorer = Callable[[Frames], Any]
"""Key frames [frames, height, width, 3] to a number from 0 to 1 for each."""


@dataclass(frozen=True)
class HookScore:
    """Of every key frame, and the highest."""

    highest: float
    per_frame: tuple[float, ...]


class Hook:
    def __init__(self, config: HookConfig) -> None:
        """
        Raises:
            ConfigError: there is no such function, no such classifier, or it does not know the label.
        """
        self._name = config.scorer
        if config.scorer.startswith(CLASSIFIER):
            folder, _, label = config.scorer.removeprefix(CLASSIFIER).partition("#")
            self._scorer: Scorer = Classifier(folder, label, "auto")
        else:
            self._scorer = load_function(config.scorer)

    def score(self, clip: Clip) -> HookScore:
        """
        Raises:
            MediaError: a key frame cannot be decoded.
            DataError: the scorer's answer is not a number from 0 to 1 for every frame.
        """
        frames = clip.key_frames
        per_frame = checked(self._name, self._scorer(frames), len(frames))
        return HookScore(max(per_frame), per_frame)


class Classifier:
    """The probability of one label by an image classifier of transformers."""

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


def load_function(name: str) -> Scorer:
    """A function by `module:function`.

    Raises:
        ConfigError: there is none.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"scorer {name!r} cannot be loaded ({error}); its module must be on PYTHONPATH and have that function"
        ) from error
    if not callable(found):
        raise ConfigError(f"scorer {name!r} is no function but a {type(found).__name__}; name a function")
    scorer: Scorer = found
    return scorer


def checked(name: str, answer: Any, frames: int) -> tuple[float, ...]:
    """What a scorer has answered for so many frames.

    Raises:
        DataError: it is not a number from 0 to 1 for each.
    """
    try:
        numbers = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"scorer {name!r} answered {type(answer).__name__}, not a number a key frame") from error
    if numbers.shape != (frames,):
        raise DataError(
            f"scorer {name!r} answered numbers of shape {numbers.shape} for {frames} key frames; one a frame is wanted"
        )
    wrong = numbers[~((numbers >= 0) & (numbers <= 1))]
    if wrong.size:
        raise DataError(f"scorer {name!r} answered {wrong[0]}; numbers from 0 to 1 are wanted")
    return tuple(numbers.tolist())


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
