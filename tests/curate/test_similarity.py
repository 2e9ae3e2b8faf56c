"""Pictures of one scene are alike and of two are not, and a shot is parted where they stop being alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_and_open
from hypothesis import given
from hypothesis import strategies as st
from made_media import Texture, cross_fade, pan
from torch.nn import functional

from goku_mega.config.curation import SplitConfig
from goku_mega.curate.stages.similarity import (
    Similarity,
    colour_features,
    neighbour_cosines,
    sample_frames,
    split_frames,
)
from goku_mega.errors import ConfigError

SIZE = (480, 854)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return neighbour_cosines(colour_features([one, other]))[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("moved_px", [16, 160])
def test_a_pan_over_a_scene_stays_alike(seed: int, moved_px: int) -> None:
    texture = Texture(seed=seed)
    assert cosine(texture.at(SIZE), texture.at(SIZE, (0, -moved_px))) > 0.95


def test_other_colours_are_another_scene() -> None:
    tints = [(150, 100, 90), (90, 150, 100), (100, 90, 150), (128, 128, 128)]
    scenes = [Texture(seed=4, tint=tint).at(SIZE) for tint in tints]
    assert all(cosine(one, other) < 0.5 for one in scenes for other in scenes if one is not other)
    assert all(cosine(one, one) > 1 - 1e-6 for one in scenes)


def test_slight_changes_of_light_are_no_other_scene() -> None:
    scene = Texture(seed=4, tint=(150, 100, 90)).at(SIZE)
    brighter = np.clip(scene.astype(np.int16) + 4, 0, 255).astype(np.uint8)
    assert cosine(scene, brighter) > 0.95


def test_a_cross_fade_is_parted_from_both_scenes(tmp_path: Path) -> None:
    one, other = (Texture(seed=seed, tint=tint) for seed, tint in ((1, (150, 100, 95)), (2, (95, 120, 150))))
    faded = cross_fade(pan(48, SIZE, (0, 1), one), pan(48, SIZE, (0, 1), other), 48)
    clip = write_and_open(
        tmp_path / "fade.mp4", iter([*pan(49, SIZE, (0, 1), one), *faded, *pan(49, SIZE, (0, 1), other)])
    )
    score = Similarity(SplitConfig()).score(clip.footage, 0, clip.frames, 24.0)
    assert score.sample_frames == (0, 24, 48, 72, 96, 120, 144)
    parts = split_frames(0, clip.frames, score.sample_frames, score.cosines, 0.85)
    assert parts == [(0, 72), (72, 24), (96, clip.frames - 96)]


@pytest.mark.parametrize(("rate", "expected"), [(24.0, [7, 31, 55]), (29.97, [7, 37, 67]), (60.0, [7, 67])])
def test_samples_are_a_second_apart_from_the_start_of_the_shot(rate: float, expected: list[int]) -> None:
    assert sample_frames(7, 66, rate, 1.0) == expected


def test_a_cosine_at_the_threshold_keeps_and_one_below_cuts_at_the_later_sample() -> None:
    samples, cosines = [10, 34, 58, 82], (0.85, 0.8499, 0.9)
    assert split_frames(10, 90, samples, cosines, 0.85) == [(10, 48), (58, 42)]


@given(st.integers(1, 400), st.floats(5, 60), st.floats(0, 1), st.randoms(use_true_random=False))
def test_parts_cover_the_shot_once(frames: int, rate: float, threshold: float, random) -> None:
    samples = sample_frames(3, frames, rate, 1.0)
    cosines = [random.random() for _ in samples[1:]]
    parts = split_frames(3, frames, samples, cosines, threshold)
    assert [number for first, count in parts for number in range(first, first + count)] == [*range(3, 3 + frames)]
    assert len(parts) == 1 + sum(cosine < threshold for cosine in cosines)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dino_features_are_the_class_token_of_transformers_model(dino: Path) -> None:
    from transformers import Dinov2Model

    frame = Texture(seed=1).at((256, 256))
    pixels = torch.from_numpy(frame[16:240, 16:240].copy()).permute(2, 0, 1).double() / 255
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(dino).eval()(pixel_values=pixels[None].float()).last_hidden_state
    expected = functional.normalize(hidden[:, 0], dim=-1).numpy()
    embedded = Similarity(SplitConfig(embedder=str(dino))).embed([frame])
    assert np.allclose(embedded, expected, atol=1e-5)


def test_dino_features_do_not_depend_on_the_frames_beside_them(dino: Path) -> None:
    frames = [Texture(seed=seed).at((90, 160)) for seed in range(4)]
    embed = Similarity(SplitConfig(embedder=str(dino), device="cpu")).embed
    together, alone = embed(frames), np.concatenate([embed([frame]) for frame in frames])
    assert np.array_equal(together, alone) and np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_an_embedder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embedder .*nowhere.* cannot be loaded"):
        Similarity(SplitConfig(embedder=str(tmp_path / "nowhere")))


def test_a_device_that_is_not_there_is_refused_by_name(dino: Path) -> None:
    with pytest.raises(ConfigError, match="device 'cuda:77' cannot be used"):
        Similarity(SplitConfig(embedder=str(dino), device="cuda:77"))
