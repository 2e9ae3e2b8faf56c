"""A clip of any length and size through CogVideoX's encoder in bounded memory, with the result of the whole.

In time: the library's own chunks of frames, with the last inputs of the causal convolutions carried over. In space:
layer by layer, each in bands of rows that see their neighbours' edges, so that group norms have the statistics of the
whole picture; pictures that are encoded tile by tile and blended are 9 to 14% of a deviation away from it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BAND_PIXELS = 240 * 720
"""Pixels of a layer that are worked on at once, at the layer's own resolution."""


def time_chunks(frames: int, chunk_frames: int = 8) -> list[int]:
    """Lengths of the chunks in which a clip is encoded: the library's, which gives the rest to the first.

    Group norms are over a whole chunk, so other chunks would be other latents.
    """
    first = frames if frames < chunk_frames else chunk_frames + frames % chunk_frames
    return [first, *[chunk_frames] * ((frames - first) // chunk_frames)]


class EncoderStream:
    """The encoder on its way through clips of one shape; holds two frames a convolution, never a clip."""

    def __init__(self, vae: Any, *, in_bands: bool, activations_on: torch.device) -> None:
        """
        Args:
            vae: diffusers' AutoencoderKLCogVideoX.
            in_bands: whether the layers are computed band by band.
            activations_on: where whole layers are kept then; off the device, its memory does not grow with the picture.
        """
        self._vae = vae
        self._bands = BandedEncoder(vae.encoder, activations_on) if in_bands else None
        self._carried: Any = None

    def push(self, pixels: Tensor) -> Tensor:
        """The next chunk [clips, 3, frames, height, width] to its latents' means [clips, channels, t, h, w]."""
        if self._bands is not None:
            moments = self._bands.push(pixels)
        else:
            moments, self._carried = self._vae.encoder(pixels, conv_cache=self._carried)
        if self._vae.quant_conv is not None:
            moments = self._vae.quant_conv(moments)
        mean: Tensor = moments.chunk(2, dim=1)[0]
        return mean


class BandedEncoder:
    """diffusers' CogVideoXEncoder3D, computed in bands of rows: [clips, channels, frames, rows, columns] throughout."""

    def __init__(self, encoder: Any, activations_on: torch.device) -> None:
        self.encoder = encoder
        self.home = activations_on
        self.device = next(encoder.parameters()).device
        self._carried: dict[nn.Module, Tensor] = {}

    def push(self, pixels: Tensor) -> Tensor:
        hidden = self._convolved(self.encoder.conv_in, pixels)
        for block in self.encoder.down_blocks:
            for resnet in block.resnets:
                hidden = self._resnet(resnet, hidden)
            for downsampler in block.downsamplers or ():
                hidden = self._downsampled(downsampler, hidden)
        for resnet in self.encoder.mid_block.resnets:
            hidden = self._resnet(resnet, hidden)
        return self._convolved(self.encoder.conv_out, hidden, norm=self.encoder.norm_out).to(self.device)

    def _resnet(self, block: Any, x: Tensor) -> Tensor:
        hidden = self._convolved(block.conv1, x, norm=block.norm1)
        hidden = self._convolved(block.conv2, hidden, norm=block.norm2)
        changes_width = block.in_channels != block.out_channels
        for top, bottom in _bands(*x.shape[-2:]):
            straight = x[..., top:bottom, :].to(self.device)
            straight = block.conv_shortcut(straight) if changes_width else straight
            hidden[..., top:bottom, :] += straight.to(self.home)
        return hidden

    def _convolved(self, causal: Any, x: Tensor, norm: nn.GroupNorm | None = None) -> Tensor:
        """A causal 3x3x3 convolution, after a norm and SiLU where one is given."""
        height, width = x.shape[-2:]
        scale_and_shift = None if norm is None else self._statistics(norm, x)
        before = self._carried.get(causal)
        carried = x.new_empty((*x.shape[:2], causal.time_pad, height, width), device=self.home)
        out: Tensor | None = None
        for top, bottom in _bands(height, width):
            above, below = max(top - 1, 0), min(bottom + 1, height)
            band = x[..., above:below, :].to(self.device)
            if scale_and_shift is not None:
                band = F.silu(band * scale_and_shift[0] + scale_and_shift[1])
            past = band[:, :, :1].expand(-1, -1, causal.time_pad, -1, -1)
            band = torch.cat([past if before is None else before[..., above:below, :].to(self.device), band], dim=2)
            carried[..., top:bottom, :] = band[:, :, -causal.time_pad :, top - above : bottom - above]
            band = F.pad(band, (1, 1, int(top == 0), int(bottom == height)))
            result = F.conv3d(band, causal.conv.weight, causal.conv.bias)
            if out is None:
                out = result.new_empty((*result.shape[:3], height, width), device=self.home)
            out[..., top:bottom, :] = result
        self._carried[causal] = carried
        assert out is not None
        return out

    def _downsampled(self, downsampler: Any, x: Tensor) -> Tensor:
        """Half the height and width; an output row is made of three rows, of which the next begins with the last."""
        out: Tensor | None = None
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        for top, bottom in _bands(height, width):
            result = downsampler(x[..., 2 * top : 2 * bottom + 1, :].to(self.device))
            if out is None:
                out = result.new_empty((*result.shape[:3], height, width), device=self.home)
            out[..., top:bottom, :] = result
        assert out is not None
        return out

    def _statistics(self, norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a group norm multiplies by and adds, [clips, channels, 1, 1, 1], from sums over all bands in fp64."""
        sums = torch.zeros(2, len(x), norm.num_groups, dtype=torch.float64, device=self.device)
        for top, bottom in _bands(*x.shape[-2:]):
            band = x[..., top:bottom, :].to(self.device, torch.float64).reshape(len(x), norm.num_groups, -1)
            sums[0] += band.sum(-1)
            sums[1] += band.square().sum(-1)
        mean, square = sums / (x[0].numel() // norm.num_groups)
        inverse = (square - mean.square() + norm.eps).rsqrt()
        channels = x.shape[1] // norm.num_groups
        mean, inverse = (part.repeat_interleave(channels, dim=1) for part in (mean, inverse))
        scale = norm.weight.double() * inverse
        shift = norm.bias.double() - mean * scale
        return scale.to(x.dtype)[..., None, None, None], shift.to(x.dtype)[..., None, None, None]


def _bands(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows of a layer, in bands of about BAND_PIXELS."""
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)
