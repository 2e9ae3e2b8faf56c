"""A user's own scorer is called with the key frames, and what it answers is checked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import pictures_as_clip
from made_media import Texture

from goku_mega.config.curation import HookConfig
from goku_mega.curate.networks.pictures import IMAGENET, normalise, scale_frame
from goku_mega.curate.stages.hooks import Hook
from goku_mega.errors import ConfigError, DataError

LABELS = {0: "clean", 1: "watermark", 2: "other"}


@pytest.fixture
def frames() -> np.ndarray:
    return np.stack([Texture(seed=seed, tint=(60 + 60 * seed,) * 3).at((48, 64)) for seed in range(3)])


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
                       patch_size=8, id2label=LABELS, initializer_range=1.0)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_function_scores_every_key_frame(frames: np.ndarray, tmp_path: Path) -> None:
    score = Hook(HookConfig(scorer="scorers:brightness")).score(pictures_as_clip(tmp_path, frames))
    assert score.per_frame == pytest.approx(frames.mean((1, 2, 3)) / 255)
    assert score.highest == score.per_frame[2] == max(score.per_frame)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("one_for_all", r"numbers of shape \(\) for 3 key frames"),
        ("too_high", "answered 1.5"),
        ("not_a_number", "answered nan"),
        ("words", "answered list, not a number a key frame"),
    ],
)
def test_an_answer_that_is_no_score_is_refused(
    frames: np.ndarray, function: str, complaint: str, tmp_path: Path
) -> None:
    hook = Hook(HookConfig(scorer=f"scorers:{function}"))
    with pytest.raises(DataError, match=f"scorer 'scorers:{function}' .*{complaint}"):
        hook.score(pictures_as_clip(tmp_path, frames))


@pytest.mark.parametrize("scorer", ["no_such_module:function", "scorers:no_such_function", "scorers:NUMBER"])
def test_a_function_that_is_not_there_is_refused_by_name(scorer: str) -> None:
    with pytest.raises(ConfigError, match=f"scorer '{scorer}'"):
        Hook(HookConfig(scorer=scorer))


@pytest.mark.parametrize("stated", [None, {"size": 24, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}])
def test_a_classifier_gives_the_probability_of_its_label(
    frames: np.ndarray, classifier: Path, stated: dict | None, tmp_path: Path
) -> None:
    from transformers import ViTForImageClassification

    size, statistics = (32, 32), IMAGENET
    if stated:
        stated["size"] = {"height": 32, "width": 32}
        (classifier / "preprocessor_config.json").write_text(json.dumps(stated))
        statistics = type(IMAGENET)((0.5,) * 3, (0.5,) * 3)
    pixels = torch.stack([normalise(scale_frame(frame, size), statistics) for frame in frames])
    with torch.no_grad():
        model = ViTForImageClassification.from_pretrained(classifier).eval()
        expected = model(pixel_values=pixels).logits.softmax(-1)[:, 1].tolist()
    hook = Hook(HookConfig(scorer=f"classifier:{classifier}#watermark"))
    score = hook.score(pictures_as_clip(tmp_path, frames))
    assert score.per_frame == pytest.approx(expected, abs=1e-6) and len(set(score.per_frame)) == 3
    assert score.highest == max(score.per_frame)


def test_a_label_or_a_folder_that_is_not_there_is_refused_by_name(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows no label 'nsfw'; its labels are clean, watermark, other"):
        Hook(HookConfig(scorer=f"classifier:{classifier}#nsfw"))
    with pytest.raises(ConfigError, match="scorer .*nowhere.* cannot be loaded"):
        Hook(HookConfig(scorer=f"classifier:{tmp_path / 'nowhere'}#nsfw"))
