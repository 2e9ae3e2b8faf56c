"""The text encoder: words stay apart, no padding, the same bytes in any company and on any day."""

import itertools
from pathlib import Path

import pytest
import torch

from goku_mega.data.shapes import COLORS, MOTIONS, SHAPES, all_objects, caption
from goku_mega.data.shapes import Scene as ShapeScene
from goku_mega.encoders.text import TextEncoder, build_tiny_text_encoder, load_text_encoder
from goku_mega.encoders.vae import content_key
from goku_mega.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def captions() -> list[str]:
    scenes = [ShapeScene((item,)) for item in all_objects()]
    return [caption(scene, seed, is_video=seed % 2 == 0) for scene in scenes for seed in range(6)]


@pytest.fixture(scope="module")
def folder(captions, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "encoder"
    build_tiny_text_encoder(captions, path, 0)
    return path


@pytest.fixture(scope="module")
def text(folder) -> TextEncoder:
    torch.set_num_threads(1)
    return load_text_encoder(str(folder))


def test_every_word_of_the_captions_is_one_token(text):
    for word in (*COLORS, *SHAPES, *MOTIONS, "moving", "standing"):
        assert len(text.encode([word])[0]) == 2, word  # the word and the end


def test_other_words_fall_into_letters_and_the_empty_caption_is_its_end(text):
    red, shouted, dog, empty = text.encode(["red", "RED", "drag", ""])
    assert torch.equal(red, shouted)
    assert len(dog) > 2
    assert empty.shape == (1, text.width)
    assert all(torch.isfinite(embedding).all() for embedding in (red, dog, empty))


def test_a_caption_has_the_same_bytes_in_any_company(text):
    captions = ["a red circle moving left", "", "a still blue square on a plain ground", "a red circle moving left"]
    together = text.encode(captions)
    assert [len(embedding) for embedding in together] == [6, 1, 9, 6]
    assert all(torch.equal(a, text.encode([b])[0]) for a, b in zip(together, captions, strict=True))
    assert all(embedding.dtype == torch.float32 and embedding.shape[1] == 64 for embedding in together)


def test_a_word_is_found_again_in_sentences_it_was_not_fitted_on(text):
    """A nearest mean over the colour's token, taken from circles, names the colour in squares and triangles."""

    def token(color: str, shape: str, motion: str) -> torch.Tensor:
        return text.encode([f"a {color} {shape} moving {motion}"])[0][1]

    motions = MOTIONS[1:]
    means = {color: torch.stack([token(color, "circle", motion) for motion in motions]).mean(0) for color in COLORS}
    for color, shape, motion in itertools.product(COLORS, ("square", "triangle"), motions):
        found = token(color, shape, motion)
        nearest = min(means, key=lambda name: float((means[name] - found).norm()))
        assert nearest == color, (color, shape, motion)


def test_embeddings_have_unit_scale(text):
    assert torch.cat(text.encode(["a red circle moving left", "a triangle"])).std() == pytest.approx(1, abs=0.15)


def test_the_same_captions_and_seed_give_the_same_bytes(captions, folder, tmp_path):
    build_tiny_text_encoder(reversed(captions), tmp_path / "again", 0)
    build_tiny_text_encoder(captions, tmp_path / "other", 1)
    assert content_key(str(tmp_path / "again")) == content_key(str(folder))
    assert content_key(str(tmp_path / "other")) != content_key(str(folder))


def test_building_leaves_the_global_generator_alone(captions, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_tiny_text_encoder(captions[:20], tmp_path / "encoder", 0)
    assert torch.equal(before, torch.get_rng_state())


def test_captions_without_words_are_refused(tmp_path):
    with pytest.raises(DataError, match="no words"):
        build_tiny_text_encoder(["", " "], tmp_path / "encoder", 0)


def test_an_encoder_without_its_vocabulary_is_refused(folder, tmp_path):
    """transformers 5 would go on with an empty vocabulary, in which every word is unknown."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ConfigError, match=r"spiece\.model"):
        load_text_encoder(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/no-such-model"])
def test_an_encoder_that_is_not_there_is_one_line(monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=name) as raised:
        load_text_encoder(name)
    assert "\n" not in str(raised.value)
