"""Embeddings of captions for the shards: from a folder shared by all processes where it has them, else made.

A folder keeps them by the caption's hash, under the encoder's key. A file counts only with its checksum, so that any
process may be killed at any moment.
"""

import hashlib
import io
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from goku_mega.data.shards import npy
from goku_mega.data.whole_files import temporary_name

if TYPE_CHECKING:
    import torch

    from goku_mega.encoders.text import TextEncoder

CHECKSUM_BYTES = 8
"""Before the array of every file: its xxh3."""

Embedding = NDArray[np.float32]

logger = logging.getLogger(__name__)


class EmbeddingFolder:
    """The embeddings that were kept of one text encoder."""

    def __init__(self, folder: Path, limit_bytes: float) -> None:
        """
        Args:
            limit_bytes: how much this process may add; a file that does not fit is not kept.
        """
        self.folder = folder
        self._left_bytes = limit_bytes

    def read(self, caption: str) -> Embedding | None:
        path = self._path(caption)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if xxhash.xxh3_64_digest(content[CHECKSUM_BYTES:]) != content[:CHECKSUM_BYTES]:
            logger.warning("%s is damaged; it is made again", path)
            return None
        array: Embedding = np.load(io.BytesIO(content[CHECKSUM_BYTES:]))
        return array

    def write(self, caption: str, embedding: Embedding) -> None:
        """Keep an embedding; a folder that fails is done without."""
        content = npy(embedding)
        if len(content) > self._left_bytes:
            return
        path = self._path(caption)
        temporary = path.with_name(temporary_name(path.name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(xxhash.xxh3_64_digest(content) + content)
            temporary.replace(path)
            self._left_bytes -= CHECKSUM_BYTES + len(content)
        except OSError as error:
            logger.warning("%s cannot be kept (%s)", path, error.strerror)
            self._left_bytes = 0
            with suppress(OSError):
                temporary.unlink()

    def _path(self, caption: str) -> Path:
        name = hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / name


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder, 0 where there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


class CaptionEncoder:
    """A text encoder behind its folder; loaded when a caption is met that is not there."""

    def __init__(self, name_or_path: str, devices: "Sequence[torch.device]", kept: EmbeddingFolder) -> None:
        self._name, self._devices, self._kept = name_or_path, devices, kept
        self._encoder: TextEncoder | None = None

    def encode(self, captions: Iterable[str]) -> dict[str, Embedding]:
        """The embedding [text_tokens, width] of each caption."""
        found = {caption: self._kept.read(caption) for caption in captions}
        missing = [caption for caption, embedding in found.items() if embedding is None]
        if missing:
            if self._encoder is None:
                from goku_mega.encoders.text import load_text_encoder

                self._encoder = load_text_encoder(self._name, *self._devices)
            for caption, tensor in zip(missing, self._encoder.encode(missing), strict=True):
                found[caption] = made = tensor.numpy()
                self._kept.write(caption, made)
        return {caption: embedding for caption, embedding in found.items() if embedding is not None}
