"""RAFT (arXiv 2003.12039), large and small, with parameters named as torchvision names them, and flow by it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from goku_mega.curate.networks.aesthetic_head import read_weights
from goku_mega.curate.networks.pictures import pick_device, scale_frame
from goku_mega.errors import ConfigError

STRIDE = 8
"""Pixels of a cell, in which the flow is found before it is made fine."""
LEVELS = 4
SMALLEST_SIDE_PX = 2 * STRIDE * 2 ** (LEVELS - 1)
"""Below it, the coarsest level of correlations has no two values to interpolate between."""
UPDATES = 12
WEIGHTS_REMEDY = "give raft_large's or raft_small's weights as torchvision publishes them, .pth or .safetensors"

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class RaftShape:
    """Widths of one of the two networks."""

    block: Literal["residual", "bottleneck"]
    features: tuple[int, ...]
    """Channels of the feature encoder: stem, three stages, output."""
    context: tuple[int, ...]
    context_norm: bool
    """Whether the context encoder has batch norms; the feature encoder always has instance norms."""
    radius: int
    """Cells around a match in which correlations are looked up, at each level."""
    correlation: tuple[int, ...]
    """Channels of the motion encoder's layers over correlations."""
    flow: tuple[int, int]
    """Channels of its layers over the flow."""
    motion: int
    hidden: int
    kernels: tuple[tuple[int, int], ...]
    """Of the recurrent units, one after the other."""
    head: int
    mask: bool
    """Whether fine flow is a learnt mixture of its neighbours, or else interpolated."""


LARGE = RaftShape(
    block="residual", features=(64, 64, 96, 128, 256), context=(64, 64, 96, 128, 256), context_norm=True, radius=4,
    correlation=(256, 192), flow=(128, 64), motion=128, hidden=128, kernels=((1, 5), (5, 1)), head=256, mask=True,
)  # fmt: skip
SMALL = RaftShape(
    block="bottleneck", features=(32, 32, 64, 96, 128), context=(32, 32, 64, 96, 160), context_norm=False, radius=3,
    correlation=(96,), flow=(64, 32), motion=82, hidden=96, kernels=((3, 3),), head=128, mask=False,
)  # fmt: skip


class FlowByRaft:
    """RAFT with its weights."""

    def __init__(self, weights: Path, device: str) -> None:
        """
        Raises:
            ConfigError: the weights cannot be read, or are not RAFT's.
        """
        self._device = pick_device(device)
        self._model = load_raft(weights).to(self._device)

    @torch.no_grad()
    def mean_length(self, first: NDArray[np.uint8], second: NDArray[np.uint8], short_side_px: int) -> float:
        """Mean length of the flow between frames [height, width, 3], px of frames brought to `short_side_px`."""
        scale = short_side_px / min(first.shape[:2])
        size = (round(first.shape[0] * scale), round(first.shape[1] * scale))
        pad = [max(SMALLEST_SIDE_PX, -(-side // STRIDE) * STRIDE) - side for side in size]
        pictures = []
        for frame in (first, second):
            picture = scale_frame(frame, size)[None].to(self._device) / 127.5 - 1
            pictures.append(functional.pad(picture, (0, pad[1], 0, pad[0]), mode="replicate"))
        flow = self._model(*pictures)[0, :, : size[0], : size[1]]
        return float(flow.norm(dim=0).double().mean())


def load_raft(path: Path) -> "Raft":
    """Either network, told by its weights.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    what = f"motion.weights {str(path)!r}"
    weights = read_weights(path, what, WEIGHTS_REMEDY)
    model = Raft(LARGE if "mask_predictor.conv.weight" in weights else SMALL)
    wanted = model.state_dict()
    for name in sorted(set(weights) | set(wanted)):
        if name not in weights or name not in wanted or weights[name].shape != wanted[name].shape:
            raise ConfigError(f"{what} is not of RAFT, because of {name}; {WEIGHTS_REMEDY}")
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


class Raft(nn.Module):
    def __init__(self, shape: RaftShape) -> None:
        super().__init__()
        self.shape = shape
        context_norm: Norm | None = nn.BatchNorm2d if shape.context_norm else None
        self.feature_encoder = Encoder(shape.block, shape.features, nn.InstanceNorm2d)
        self.context_encoder = Encoder(shape.block, shape.context, context_norm)
        self.update_block = UpdateBlock(shape)
        self.mask_predictor = MaskPredictor(shape.hidden, shape.head) if shape.mask else None

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow [batch, 2, height, width] px, x before y, of pictures [batch, 3, height, width] from -1 to 1.

        Height and width are multiples of 8 and at least `SMALLEST_SIDE_PX`.
        """
        features = self.feature_encoder(torch.cat([first, second])).chunk(2)
        pyramid = correlation_pyramid(*features)
        hidden, context = self.context_encoder(first).split(
            [self.shape.hidden, self.shape.context[-1] - self.shape.hidden], dim=1
        )
        hidden, context = hidden.tanh(), context.relu()
        start = _places(features[0])
        places = start
        for _ in range(UPDATES):
            correlations = look_up(pyramid, places, self.shape.radius)
            hidden, change = self.update_block(hidden, context, correlations, places - start)
            places = places + change
        return self._fine(places - start, hidden)

    def _fine(self, flow: Tensor, hidden: Tensor) -> Tensor:
        """Flow of cells, in cells, to flow of pixels, in pixels."""
        if self.mask_predictor is None:
            return STRIDE * functional.interpolate(flow, scale_factor=STRIDE, mode="bilinear", align_corners=True)
        batch, _, rows, columns = flow.shape
        mask = self.mask_predictor(hidden).view(batch, 1, 9, STRIDE, STRIDE, rows, columns).softmax(2)
        around = functional.unfold(STRIDE * flow, 3, padding=1).view(batch, 2, 9, 1, 1, rows, columns)
        mixed = (mask * around).sum(2)  # [batch, 2, STRIDE, STRIDE, rows, columns]
        return mixed.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, STRIDE * rows, STRIDE * columns)


def correlation_pyramid(first: Tensor, second: Tensor) -> list[Tensor]:
    """Products of every cell of one with every cell of the other, [batch * cells, 1, rows, columns], and halved."""
    batch, width, rows, columns = first.shape
    products = torch.matmul(first.flatten(2).transpose(1, 2), second.flatten(2)) / torch.tensor(width).sqrt()
    levels = [products.view(batch * rows * columns, 1, rows, columns)]
    for _ in range(LEVELS - 1):
        levels.append(functional.avg_pool2d(levels[-1], 2))
    return levels


def look_up(pyramid: list[Tensor], places: Tensor, radius: int) -> Tensor:
    """Correlations around each cell's match, of all levels, [batch, levels * (2 radius + 1)^2, rows, columns]."""
    batch, _, rows, columns = places.shape
    reach = torch.arange(-radius, radius + 1, device=places.device, dtype=places.dtype)
    around = torch.stack(torch.meshgrid(reach, reach, indexing="ij"), -1)  # x along the first axis, as it was trained
    middle = places.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for level, products in enumerate(pyramid):
        extent = torch.tensor([products.shape[-1] - 1, products.shape[-2] - 1], device=places.device)
        grid = 2 * (middle / 2**level + around) / extent - 1
        found.append(functional.grid_sample(products, grid, align_corners=True).view(batch, rows, columns, -1))
    return torch.cat(found, -1).permute(0, 3, 1, 2).contiguous()


class Encoder(nn.Module):
    """A picture to features at an eighth of its size."""

    def __init__(self, block: str, widths: tuple[int, ...], norm: Norm | None) -> None:
        super().__init__()
        kind = ResidualBlock if block == "residual" else BottleneckBlock
        self.convnormrelu = conv_unit(3, widths[0], 7, norm, stride=2)
        self.layer1 = nn.Sequential(kind(widths[0], widths[1], norm, 1), kind(widths[1], widths[1], norm, 1))
        self.layer2 = nn.Sequential(kind(widths[1], widths[2], norm, 2), kind(widths[2], widths[2], norm, 1))
        self.layer3 = nn.Sequential(kind(widths[2], widths[3], norm, 2), kind(widths[3], widths[3], norm, 1))
        self.conv = nn.Conv2d(widths[3], widths[4], 1)

    def forward(self, pictures: Tensor) -> Tensor:
        stages = self.layer3(self.layer2(self.layer1(self.convnormrelu(pictures))))
        features: Tensor = self.conv(stages)
        return features


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Norm | None, stride: int) -> None:
        super().__init__()
        self.convnormrelu1 = conv_unit(inputs, outputs, 3, norm, stride=stride)
        self.convnormrelu2 = conv_unit(outputs, outputs, 3, norm)
        self.downsample = _shortcut(inputs, outputs, norm, stride)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.convnormrelu2(self.convnormrelu1(x))
        return (self.downsample(x) + change).relu()


class BottleneckBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Norm | None, stride: int) -> None:
        super().__init__()
        self.convnormrelu1 = conv_unit(inputs, outputs // 4, 1, norm)
        self.convnormrelu2 = conv_unit(outputs // 4, outputs // 4, 3, norm, stride=stride)
        self.convnormrelu3 = conv_unit(outputs // 4, outputs, 1, norm)
        self.downsample = _shortcut(inputs, outputs, norm, stride)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.convnormrelu3(self.convnormrelu2(self.convnormrelu1(x)))
        return (self.downsample(x) + change).relu()


class UpdateBlock(nn.Module):
    """One step: what the correlations and the flow say, into the hidden state, and out of it a change of flow."""

    def __init__(self, shape: RaftShape) -> None:
        super().__init__()
        self.motion_encoder = MotionEncoder(shape)
        inputs = shape.motion + shape.context[-1] - shape.hidden
        self.recurrent_block = RecurrentBlock(shape.hidden, inputs, shape.kernels)
        self.flow_head = FlowHead(shape.hidden, shape.head)

    def forward(self, hidden: Tensor, context: Tensor, correlations: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([context, self.motion_encoder(flow, correlations)], 1)
        hidden = self.recurrent_block(hidden, seen)
        return hidden, self.flow_head(hidden)


class MotionEncoder(nn.Module):
    def __init__(self, shape: RaftShape) -> None:
        super().__init__()
        self.convcorr1 = conv_unit(LEVELS * (2 * shape.radius + 1) ** 2, shape.correlation[0], 1, None)
        self.convcorr2: nn.Module = (
            conv_unit(shape.correlation[0], shape.correlation[1], 3, None)
            if len(shape.correlation) > 1
            else nn.Identity()
        )
        self.convflow1 = conv_unit(2, shape.flow[0], 7, None)
        self.convflow2 = conv_unit(shape.flow[0], shape.flow[1], 3, None)
        self.conv = conv_unit(shape.correlation[-1] + shape.flow[1], shape.motion - 2, 3, None)

    def forward(self, flow: Tensor, correlations: Tensor) -> Tensor:
        both = torch.cat([self.convcorr2(self.convcorr1(correlations)), self.convflow2(self.convflow1(flow))], 1)
        return torch.cat([self.conv(both), flow], 1)


class RecurrentBlock(nn.Module):
    def __init__(self, hidden: int, inputs: int, kernels: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        for number, kernel in enumerate(kernels, start=1):
            self.add_module(f"convgru{number}", ConvGru(hidden, inputs, kernel))

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        for unit in self.children():
            hidden = unit(hidden, x)
        return hidden


class ConvGru(nn.Module):
    def __init__(self, hidden: int, inputs: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.convz = nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding)
        self.convr = nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding)
        self.convq = nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([hidden, x], 1)
        update, reset = self.convz(both).sigmoid(), self.convr(both).sigmoid()
        proposed = self.convq(torch.cat([reset * hidden, x], 1)).tanh()
        return (1 - update) * hidden + update * proposed


class FlowHead(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        change: Tensor = self.conv2(self.conv1(hidden).relu())
        return change


class MaskPredictor(nn.Module):
    """For every pixel of a cell, the shares of the nine cells around it."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.convrelu = conv_unit(hidden, width, 3, None)
        self.conv = nn.Conv2d(width, STRIDE * STRIDE * 9, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        shares: Tensor = self.conv(self.convrelu(hidden))
        return 0.25 * shares


def conv_unit(
    inputs: int, outputs: int, kernel: int, norm: Norm | None, *, stride: int = 1, activated: bool = True
) -> nn.Sequential:
    """Convolution, norm, ReLU, the convolution at place 0 and the norm at place 1."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2)]
    if norm is not None:
        layers.append(norm(outputs))
    if activated:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _shortcut(inputs: int, outputs: int, norm: Norm | None, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 else conv_unit(inputs, outputs, 1, norm, stride=stride, activated=False)


def _places(features: Tensor) -> Tensor:
    """(x, y) of every cell, [batch, 2, rows, columns]."""
    batch, _, rows, columns = features.shape
    y, x = torch.meshgrid(
        torch.arange(rows, device=features.device), torch.arange(columns, device=features.device), indexing="ij"
    )
    return torch.stack([x, y]).float()[None].repeat(batch, 1, 1, 1)
