"""Perceptual hashes of key frames, and which clips of a source are alike by them (paper 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.curation import DedupConfig
from goku_mega.curate.clip import Clip
from goku_mega.errors import MissingExtra

HASH_BITS = 64


@dataclass(frozen=True)
class HashScore:
    """A hash of 64 bits for every key frame, in hexadecimal."""

    hashes: tuple[str, ...]


class Hashes:
    """ImageHash's pHash: the low frequencies of a small grey picture, each above or below their median."""

    def __init__(self) -> None:
        try:
            import imagehash
        except ImportError as error:
            raise MissingExtra("ImageHash is not installed; pip install goku-mega[curate]") from error
        self._phash = imagehash.phash

    def score(self, clip: Clip) -> HashScore:
        from PIL import Image

        return HashScore(tuple(str(self._phash(Image.fromarray(frame))) for frame in clip.key_frames))


def alike(hashes: Sequence[Sequence[str]], config: DedupConfig) -> list[tuple[int, int]]:
    """Pairs of clips of one source, by their places in `hashes`, of which enough key frames are alike (A7)."""
    bits = [_bits(of_clip) for of_clip in hashes]
    pairs = []
    for one in range(len(bits)):
        for other in range(one + 1, len(bits)):
            distances = (bits[one][:, None] != bits[other][None]).sum(-1)  # [frames of one, frames of other]
            near = distances <= config.max_distance
            shorter = near.any(int(near.shape[0] <= near.shape[1]))
            if shorter.mean() >= config.min_share:
                pairs.append((one, other))
    return pairs


def _bits(hashes: Sequence[str]) -> NDArray[np.uint8]:
    """[frames, 64]"""
    raw = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), HASH_BITS // 8)
    return np.unpackbits(raw, axis=1)
