"""The aesthetic score is CLIP's embedding, of length 1, through the head, and the mean over key frames."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clips import pictures_as_clip
from made_media import Texture
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from goku_mega.config.curation import AestheticConfig
from goku_mega.curate.networks.aesthetic_head import LAYERS
from goku_mega.curate.networks.pictures import CLIP, centre_crop
from goku_mega.curate.stages.aesthetic import Aesthetic
from goku_mega.errors import ConfigError

WIDTH = 24


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=56, patch_size=14, projection_dim=WIDTH)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture
def frames() -> np.ndarray:
    return np.stack([Texture(seed=seed).at((112, 160)) for seed in range(3)])


def laion_head() -> nn.Sequential:
    torch.manual_seed(1)
    widths = (WIDTH, 1024, 128, 64, 16, 1)
    layers: list[nn.Module] = [nn.Dropout(0.0) for _ in range(8)]
    for place, inputs, outputs in zip(LAYERS, widths[:-1], widths[1:], strict=True):
        layers[place] = nn.Linear(inputs, outputs)
    return nn.Sequential(*layers).eval()


def expected_scores(clip_model: Path, frames: np.ndarray, head: nn.Module) -> list[float]:
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(clip_model).eval()
    with torch.no_grad():
        pixels = torch.stack([centre_crop(frame, 56, 56, CLIP) for frame in frames])
        return head(functional.normalize(model(pixel_values=pixels).image_embeds, dim=-1))[:, 0].tolist()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_scores_are_the_heads_of_clips_embeddings(
    clip_model: Path, frames: np.ndarray, suffix: str, tmp_path: Path
) -> None:
    head = laion_head()
    weights = {f"layers.{name}": value for name, value in head.state_dict().items()}
    path = tmp_path / f"head{suffix}"
    torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    score = Aesthetic(AestheticConfig(clip=str(clip_model), head=str(path))).score(pictures_as_clip(path, frames))
    assert score.per_frame == pytest.approx(expected_scores(clip_model, frames, head), abs=1e-5)
    assert score.mean == pytest.approx(np.mean(score.per_frame))
    assert len(set(score.per_frame)) == 3


def test_a_linear_head_is_a_head_too(clip_model: Path, frames: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(2)
    head = nn.Linear(WIDTH, 1)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    config = AestheticConfig(clip=str(clip_model), head=str(tmp_path / "head.pth"))
    score = Aesthetic(config).score(pictures_as_clip(tmp_path, frames))
    assert score.per_frame == pytest.approx(expected_scores(clip_model, frames, head), abs=1e-5)


def test_a_frames_score_does_not_depend_on_the_frames_beside_it(
    clip_model: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    torch.save(nn.Linear(WIDTH, 1).state_dict(), tmp_path / "head.pth")
    stage = Aesthetic(AestheticConfig(clip=str(clip_model), head=str(tmp_path / "head.pth"), device="cpu"))
    together = stage.score(pictures_as_clip(tmp_path, frames)).per_frame
    alone = [stage.score(pictures_as_clip(tmp_path, frame[None])).mean for frame in frames]
    assert list(together) == alone


def test_the_middle_of_a_picture_is_scaled_and_normalised() -> None:
    frame = np.zeros((60, 100, 3), np.uint8)
    frame[:, 20:80] = (255, 128, 0)
    cropped = centre_crop(frame, 30, 30, CLIP)
    mean, deviation = (torch.tensor(values) for values in CLIP)
    inner = (torch.tensor((255, 128, 0)) / 255 - mean) / deviation
    assert cropped.shape == (3, 30, 30)
    assert torch.allclose(cropped[:, 2:-2, 2:-2], inner[:, None, None].expand(3, 26, 26), atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"weight": torch.zeros(1, 9), "bias": torch.zeros(1)}, "makes 1 of 9 features, and aesthetic.clip gives 24"),
        ({"weight": torch.zeros(2, 24), "bias": torch.zeros(2)}, "makes 2 of 24 features"),
        ({"weight": torch.zeros(1, 24)}, "is no aesthetic head, because of bias"),
        ({"layers.0.weight": torch.zeros(1, 24)}, "is no aesthetic head, because of layers"),
        ([1, 2], "holds something other than weights"),
        (None, "is not there"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_by_name(
    clip_model: Path, weights: object, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "head.pth"
    if weights is not None:
        torch.save(weights, path)
    with pytest.raises(ConfigError, match=f"aesthetic.head .*{complaint}") as refused:
        Aesthetic(AestheticConfig(clip=str(clip_model), head=str(path)))
    assert "\n" not in str(refused.value)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="aesthetic.clip .*") as refused:
        Aesthetic(AestheticConfig(clip=str(tmp_path), head="head.pth"))
    assert "\n" not in str(refused.value)
