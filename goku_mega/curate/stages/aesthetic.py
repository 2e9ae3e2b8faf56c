"""Aesthetic score of a clip: CLIP's feature of every key frame through LAION's head, 1 to 10, and their mean."""

import math
from dataclasses import dataclass
from pathlib import Path

from goku_mega.config.curation import AestheticConfig
from goku_mega.curate.clip import Clip


@dataclass(frozen=True)
class AestheticScore:
    """Of every key frame, and their mean."""

    mean: float
    per_frame: tuple[float, ...]


class Aesthetic:
    def __init__(self, config: AestheticConfig) -> None:
        """
        Raises:
            ConfigError: CLIP or the head cannot be loaded, or they do not belong together.
        """
        from goku_mega.curate.networks.aesthetic_head import load_head
        from goku_mega.curate.networks.features import ClipFeatures
        from goku_mega.curate.networks.pictures import pick_device

        self._device = pick_device(config.device)
        self._features = ClipFeatures(config.clip, self._device)
        self._head = load_head(Path(config.head), self._features.width, self._device)

    def score(self, clip: Clip) -> AestheticScore:
        """
        Raises:
            MediaError: a key frame cannot be decoded.
        """
        features = self._features(clip.key_frames).to(self._device)
        per_frame = tuple(float(self._head(feature[None])) for feature in features)  # the head's weights are frozen
        return AestheticScore(math.fsum(per_frame) / len(per_frame), per_frame)
