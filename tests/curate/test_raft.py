"""RAFT is torchvision's network: the same parameters by name and shape, and the same flow from the same weights."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_media import Texture
from safetensors.torch import save_file

from goku_mega.config.curation import MotionConfig
from goku_mega.curate.networks.raft import LARGE, SMALL, FlowByRaft, Raft, RaftShape, correlation_pyramid, look_up
from goku_mega.curate.stages.motion import Motion
from goku_mega.errors import ConfigError

# Of torchvision 0.28.0's raft_large and raft_small, by `json.dumps(sorted({name: list(shape)}.items()))`.
NAMES_AND_SHAPES = {
    LARGE: "e91101f925afb05558970b0266e253ad923b9277dc0a76ed9d21ad43b12d1426",
    SMALL: "bec7862230aa1e1c8314f65f9089211a122510f48b21447e3827bd8dc999b048",
}
PARAMETERS = {LARGE: 5_257_536, SMALL: 990_162}
# What they answer to `waves` with the weights of `filled`, at every 40th row and 50th column.
HORIZONTAL = {
    LARGE: [2.378371, 3.952880, 3.669485, 3.875827, 5.733279, 5.686539, 3.889934, 5.681722, 5.712605, 2.760322,
            3.582050, 4.055837],
    SMALL: [-9.721850, -9.481020, -9.479175, -9.604381, -9.490246, -9.512911, -9.602491, -9.516200, -9.509164,
            -9.544739, -9.508183, -9.535245],
}  # fmt: skip
VERTICAL = {
    LARGE: [2.910454, 4.886046, 4.527630, 4.632987, 6.997393, 7.042714, 4.636369, 7.043879, 7.005148, 3.303446,
            4.315481, 4.952559],
    SMALL: [-0.989619, -0.966826, -0.972194, -1.353176, -1.070855, -1.034119, -1.346627, -1.057226, -1.080049,
            -1.464944, -1.065542, -1.064090],
}  # fmt: skip

both = pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])


def filled(shape: RaftShape) -> Raft:
    """Weights by a formula, the i-th tensor of sin(1.7 n + i), so that any implementation can be given them."""
    model = Raft(shape).eval()
    weights = model.state_dict()
    for place, (name, value) in enumerate(weights.items()):
        if value.is_floating_point():
            scale = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1
            made = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 1.7 + place).float().view(value.shape)
            grown = name.endswith("running_var") or (value.dim() == 1 and name.endswith("1.weight"))
            weights[name] = made * scale + float(grown)
    model.load_state_dict(weights)
    return model


def waves(phase: float) -> torch.Tensor:
    return torch.sin(torch.arange(3 * 128 * 144, dtype=torch.float64) * 0.37 + phase).float().view(1, 3, 128, 144)


@both
def test_parameters_have_torchvisions_names_and_shapes(shape: RaftShape) -> None:
    model = Raft(shape)
    listed = json.dumps(sorted((name, list(value.shape)) for name, value in model.state_dict().items()))
    assert hashlib.sha256(listed.encode()).hexdigest() == NAMES_AND_SHAPES[shape]
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[shape]


@both
def test_flow_is_torchvisions(shape: RaftShape) -> None:
    with torch.no_grad():
        flow = filled(shape)(waves(0.0), waves(0.5))
    assert flow.shape == (1, 2, 128, 144)
    found = flow[0, :, ::40, ::50].flatten(1)
    assert torch.allclose(found, torch.tensor([HORIZONTAL[shape], VERTICAL[shape]]), atol=2e-3)


def test_correlations_are_looked_up_around_the_match() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 1, 16, 16, 24)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    found = look_up(correlation_pyramid(first, second), torch.stack([x, y])[None], 1)
    assert found.shape == (1, 36, 16, 24)
    row, column = 7, 9
    around = second[0, :, row - 1 : row + 2, column - 1 : column + 2]
    expected = torch.einsum("c,cyx->xy", first[0, :, row, column], around) / 4
    assert torch.allclose(found[0, :9, row, column].view(3, 3), expected, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@both
def test_weights_are_loaded_and_the_network_is_told_by_them(shape: RaftShape, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, model = tmp_path / f"raft{suffix}", filled(shape)
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    frames = [Texture(seed=seed).at((90, 161)) for seed in (1, 2)]
    flow = FlowByRaft(path, "cpu")
    pictures = [torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for frame in frames]
    padded = [torch.nn.functional.pad(picture, (0, 7, 0, 38), mode="replicate") for picture in pictures]
    with torch.no_grad():
        expected = model(*padded)[0, :, :90, :161].norm(dim=0).double().mean()
    assert flow.mean_length(*frames, 90) == pytest.approx(float(expected), rel=1e-5)


def test_weights_of_something_else_are_refused_by_name(tmp_path: Path) -> None:
    weights = Raft(SMALL).state_dict()
    weights.pop("context_encoder.conv.bias")
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(ConfigError, match="less.pth' is not of RAFT, because of context_encoder.conv.bias"):
        Motion(MotionConfig(engine="raft", weights=str(tmp_path / "less.pth")))
    (tmp_path / "noise.pth").write_bytes(np.random.default_rng(0).bytes(1000))
    for name, complaint in {"noise.pth": "cannot be read", "none.pth": "is not there"}.items():
        with pytest.raises(ConfigError, match=f"{name}' {complaint}"):
            Motion(MotionConfig(engine="raft", weights=str(tmp_path / name)))
