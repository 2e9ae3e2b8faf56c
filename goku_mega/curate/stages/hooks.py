"""Scores of key frames by something of the user's own, such as NSFW content or watermarks (paper figure 2)."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from goku_mega.config.curation import HookConfig
from goku_mega.curate.clip import Clip, Frames
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
            from goku_mega.curate.networks.classifier import Classifier

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
