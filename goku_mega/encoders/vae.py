"""Pixels to latents and back: the causal image-video VAE of CogVideoX, through diffusers.

`tiny` is the codec that ships for the quickstart; any folder or hub name with an
`AutoencoderKLCogVideoX` works the same way, the real weights among them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from goku_mega.encoders.hub import is_out_of_reach, reason
from goku_mega.encoders.vae_stream import EncoderStream, time_chunks
from goku_mega.errors import ConfigError, DataError

TINY = Path(__file__).parent / "vae_tiny"

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4
TILE_ABOVE_PIXELS = 480 * 720
"""Pictures larger than the published weights were trained on go through in parts: bands of rows on the way to latents,
overlapping tiles on the way back."""
TILE_HEIGHT_PX, TILE_WIDTH_PX = 240, 360
"""diffusers' overlaps, 1/6 of the height and 1/5 of the width, are whole latent cells for these."""
HOST_ABOVE_PIXELS = 1088 * 1920
"""Of larger pictures, whole layers are kept in the host's memory: at this size, with the published widths, three layers
in fp32 are 28 GB and what the convolutions carry over is 24 GB."""
PAIR_BELOW_VOXELS = 17 * 256 * 256
"""A lone clip of fewer pixels goes through twice: torch's convolutions of one small clip are four times slower."""

Frames = NDArray[np.uint8]


class VideoVae:
    """A frozen VAE. The latent is the posterior's mean, each channel brought to about mean 0 and deviation 1."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.device = device
        config = vae.config
        channels = config.latent_channels
        mean = config.latents_mean or [config.shift_factor or 0.0] * channels
        std = config.latents_std or [1 / config.scaling_factor] * channels
        self.mean, self.std = (torch.tensor(part, device=device).reshape(1, -1, 1, 1, 1) for part in (mean, std))

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    def encode(self, clips: Sequence[Frames]) -> Tensor:
        """Clips [frames, height, width, 3] of one shape to latents [clips, channels, t, h, w] on the host.

        A clip's latent does not depend on its neighbours: clips go through in pairs, a lone one twice,
        since the convolutions of one clip and of several differ in their last bits; large ones alone.

        Raises:
            DataError: a shape the strides do not divide.
        """
        frames, height, width = clips[0].shape[:3]
        latent_shape(frames, height, width)
        size = group_size(frames, height, width)
        groups = (clips[start : start + size] for start in range(0, len(clips), size))
        return torch.cat([self._encode_group(group, size) for group in groups])

    def begin_clip(self, height: int, width: int) -> "ClipEncoding":
        """A clip to be encoded while its frames arrive, in chunks of `time_chunks` frames.

        Clips of which `encode` takes one at a time have the same bytes either way.
        """
        return ClipEncoding(self, height, width)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Frames:
        """Latents [clips, channels, t, h, w] to clips [clips, frames, height, width, 3]."""
        cells, rows, columns = latents.shape[2:]
        frames, height, width = TEMPORAL_STRIDE * (cells - 1) + 1, rows * SPATIAL_STRIDE, columns * SPATIAL_STRIDE
        if height * width > TILE_ABOVE_PIXELS:
            self.vae.enable_tiling(TILE_HEIGHT_PX, TILE_WIDTH_PX)
        else:
            self.vae.disable_tiling()
        if cells % 2 == 0:  # diffusers would take it for the middle of a video and return 4 * cells frames
            latents = torch.cat([latents, latents[:, :, -1:]], dim=2)
        size = group_size(frames, height, width)
        return np.concatenate([self._decode_group(group, size)[:, :frames] for group in latents.split(size)])

    def _encode_group(self, clips: Sequence[Frames], size: int) -> Tensor:
        frames, height, width = clips[0].shape[:3]
        encoding, start = self.begin_clip(height, width), 0
        for count in time_chunks(frames):
            chunk = [clip[start : start + count] for clip in clips]
            encoding.push(np.stack([*chunk, *[chunk[0]] * (size - len(clips))]))
            start += count
        return encoding.latents()[: len(clips)]

    def _decode_group(self, latents: Tensor, size: int) -> Frames:
        group = torch.stack([*latents, *[latents[0]] * (size - len(latents))]).to(self.device, torch.float32)
        x = self.vae.decode(group * self.std + self.mean).sample[: len(latents)]
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 4, 1).cpu().numpy()


class ClipEncoding:
    """Clips of one shape on their way through the encoder."""

    def __init__(self, vae: VideoVae, height: int, width: int) -> None:
        pixels = height * width
        home = vae.device if pixels <= HOST_ABOVE_PIXELS else torch.device("cpu")
        self._stream = EncoderStream(vae.vae, in_bands=pixels > TILE_ABOVE_PIXELS, activations_on=home)
        self._vae = vae
        self._parts: list[Tensor] = []

    @torch.no_grad()
    def push(self, chunk: Frames) -> None:
        """The next frames, [clips, frames, height, width, 3]."""
        pixels = torch.from_numpy(chunk).to(self._vae.device).permute(0, 4, 1, 2, 3)
        mean = self._stream.push(pixels.to(self._vae.vae.dtype) / 127.5 - 1)
        self._parts.append(((mean - self._vae.mean) / self._vae.std).cpu())

    def latents(self) -> Tensor:
        """[clips, channels, t, h, w] of all that was pushed, on the host."""
        return torch.cat(self._parts, dim=2)


def load_vae(name_or_path: str, device: torch.device | None = None) -> VideoVae:
    """Load a VAE in fp32: `tiny`, a folder in diffusers' format (or with one as `vae/`), or a hub name.

    Raises:
        ConfigError: there is no such VAE.
    """
    from diffusers import AutoencoderKLCogVideoX

    folder = _folder(name_or_path)
    # A hub name is a pipeline with the VAE inside, like the published ones, or a VAE alone.
    places = [(str(folder), None)] if folder.is_dir() else [(name_or_path, "vae"), (name_or_path, None)]
    local = is_out_of_reach(places[0][0])
    for place, subfolder in places:
        try:
            vae = AutoencoderKLCogVideoX.from_pretrained(
                place, subfolder=subfolder, torch_dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=local
            )
            return VideoVae(vae, device or torch.device("cpu"))
        except (OSError, ValueError, RuntimeError) as error:
            failure = error
    why = reason(name_or_path, failure, local=local)
    raise ConfigError(
        f"vae {name_or_path!r} cannot be loaded ({why}); give `tiny`, a folder or a hub name"
    ) from failure


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(t, h, w) of the latent of a clip: ((frames - 1) / 4 + 1, height / 8, width / 8).

    Raises:
        DataError: the strides (and the patch of two latent cells) do not divide the clip.
    """
    pixels = 2 * SPATIAL_STRIDE
    if height % pixels or width % pixels:
        raise DataError(f"{height}x{width} px: height and width must be multiples of {pixels}")
    if frames % TEMPORAL_STRIDE != 1:
        raise DataError(f"{frames} frames: the number must be {TEMPORAL_STRIDE}n + 1, like 1, 5, 9 or 241")
    return (frames - 1) // TEMPORAL_STRIDE + 1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def group_size(frames: int, height: int, width: int) -> int:
    """How many clips of this shape go through together."""
    return 2 if frames * height * width < PAIR_BELOW_VOXELS else 1


def content_key(name_or_path: str) -> str:
    """A hash of a local encoder's files, or its hub name: tells whether two data sets used the same one."""
    folder = _folder(name_or_path)
    if not folder.is_dir():
        return name_or_path
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _folder(name_or_path: str) -> Path:
    folder = TINY if name_or_path == "tiny" else Path(name_or_path)
    return folder / "vae" if (folder / "vae" / "config.json").exists() else folder
