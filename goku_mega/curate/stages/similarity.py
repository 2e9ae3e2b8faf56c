"""Where the picture of a shot changes without a cut: likeness of neighbouring samples, one a second (paper 4.2)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.curation import SplitConfig
from goku_mega.curate.clip import Footage, Frames

Features = NDArray[np.float32]
Embedder = Callable[[Iterable[Frames]], Features]

THUMBNAIL_PX = 48
LUMA_STEP = 32
CHROMA_STEP = 6
AT_ONCE = 16
"""Frames that are held at a time."""


@dataclass(frozen=True)
class SimilarityScore:
    """
    Attributes:
        cosines: of each sample's features with the next one's.
        sample_frames: numbers of the sampled frames, in the source.
    """

    cosines: tuple[float, ...]
    sample_frames: tuple[int, ...]


class Similarity:
    def __init__(self, config: SplitConfig) -> None:
        """
        Raises:
            ConfigError: DINOv2 cannot be loaded.
        """
        self._samples_per_second = config.samples_per_second
        self.embed: Embedder = colour_features
        if config.embedder != "thumbnail":
            from goku_mega.curate.networks.features import DinoFeatures

            self.embed = DinoFeatures(config.embedder, config.device)

    def score(self, footage: Footage, first: int, frames: int, frame_rate: float) -> SimilarityScore:
        """Of the shot that begins at frame `first`.

        Raises:
            MediaError: a sample cannot be decoded.
        """
        samples = sample_frames(first, frames, frame_rate, self._samples_per_second)
        portions = [samples[start : start + AT_ONCE] for start in range(0, len(samples), AT_ONCE)]
        features = np.concatenate([self.embed(footage.read(portion)) for portion in portions])
        return SimilarityScore(neighbour_cosines(features), tuple(samples))


def sample_frames(first: int, frames: int, frame_rate: float, samples_per_second: float) -> list[int]:
    """The frames nearest to 0, 1, 2, ... sampling intervals from the shot's start."""
    step = max(frame_rate / samples_per_second, 1.0)
    count = int(frames / step) + 1
    return [first + place for place in (round(number * step) for number in range(count)) if place < frames]


def neighbour_cosines(features: Features) -> tuple[float, ...]:
    """Of features of length 1, [samples, width], each with the next."""
    exact = features.astype(np.float64)
    return tuple(float(min(cosine, 1.0)) for cosine in (exact[1:] * exact[:-1]).sum(-1))


def split_frames(
    first: int, frames: int, samples: Sequence[int], cosines: Sequence[float], threshold: float
) -> list[tuple[int, int]]:
    """(first frame, frames) of the parts of a shot, cut at the later sample where a cosine is below the threshold."""
    cuts = [later for later, cosine in zip(samples[1:], cosines, strict=True) if cosine < threshold]
    starts = [first, *cuts]
    return [(start, end - start) for start, end in zip(starts, [*cuts, first + frames], strict=True)]


def colour_features(frames: Iterable[Frames]) -> Features:
    """What colours a frame has, and how much of each, [frames, width], of length 1.

    Roots of a soft histogram, fine in colour and coarse in brightness: their cosine is the share of the picture in
    which two frames have the same colours, so a camera or an object that moves through a scene changes it little.
    """
    return np.stack([_colour_feature(frame) for frame in frames])


def _colour_feature(frame: Frames) -> Features:
    from PIL import Image

    scale = THUMBNAIL_PX / min(frame.shape[:2])
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    small = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX).convert("YCbCr"), dtype=np.float64)
    places = small.reshape(-1, 3) / (LUMA_STEP, CHROMA_STEP, CHROMA_STEP)
    shape = tuple(int(255 // step) + 2 for step in (LUMA_STEP, CHROMA_STEP, CHROMA_STEP))
    histogram = np.zeros(shape)
    whole = np.floor(places).astype(int)
    beyond = places - whole
    for corner in np.ndindex(2, 2, 2):
        share = np.where(corner, beyond, 1 - beyond).prod(-1)
        index = np.ravel_multi_index(tuple((whole + corner).T), shape)
        histogram += np.bincount(index, share, minlength=histogram.size).reshape(shape)
    for axis in (1, 2):
        histogram = _blur(histogram, axis)
    roots = np.sqrt(histogram).ravel()
    return np.asarray(roots / np.linalg.norm(roots), dtype=np.float32)


def _blur(histogram: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Over neighbouring bins by 1 4 6 4 1, so that a slight change of light moves no pixel out of its colour."""
    padded = np.pad(histogram, [(2, 2) if place == axis else (0, 0) for place in range(3)])
    length = histogram.shape[axis]
    parts = [weight * padded.take(range(shift, shift + length), axis) for shift, weight in enumerate((1, 4, 6, 4, 1))]
    return np.asarray(sum(parts)) / 16
