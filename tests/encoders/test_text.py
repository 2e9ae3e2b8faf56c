"""The text encoder: words stay apart, no padding, the same bytes in any company and on any day."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from goku_mega.data.shapes import COLORS, MOTIONS, SHAPES, all_objects, caption
from goku_mega.data.shapes import Scene as ShapeScene
from goku_mega.encoders.text import TextEncoder, build_tiny_text_encoder, load_text_encoder, weight_bytes
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


def test_batches_of_any_captions_in_any_order_give_a_caption_the_same_bytes(text, captions):
    """Of all lengths: each caption is drawn again with others, more than a batch of them, and alone."""
    draw = random.Random(0)
    pool = [" ".join(draw.choices(" ".join(captions).split(), k=draw.randrange(0, 70))) for _ in range(40)]
    first = dict(zip(pool, text.encode(pool), strict=True))
    for _ in range(4):
        some = draw.sample(pool, draw.randrange(1, len(pool)))
        assert all(torch.equal(a, first[b]) for a, b in zip(text.encode(some), some, strict=True))
    assert len({len(embedding) for embedding in first.values()}) > 20


def test_what_fills_a_batch_up_changes_nothing(text):
    """As the model gives it for a caption alone, without padding, to rounding."""
    for words in (3, 15, 16, 40):
        caption = " ".join(["red circle moving"] * words)[: 7 * words]
        ids = text.tokenizer(caption, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = text.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(text.encode([caption])[0], alone, rtol=0, atol=1e-5)


def test_layers_on_several_devices_give_the_same_bytes(folder, text):
    spread = load_text_encoder(str(folder), torch.device("cpu"), torch.device("cpu", 0))
    captions = ["a red circle moving left", ""]
    assert all(torch.equal(a, b) for a, b in zip(spread.encode(captions), text.encode(captions), strict=True))


def test_what_a_layer_needs_is_brought_to_its_device(folder):
    """The last layers on torch's device without numbers: their inputs must have come there."""
    spread = load_text_encoder(str(folder), torch.device("cpu"), torch.device("meta"))
    places = [next(layer.parameters()).device.type for layer in spread.model.encoder.block]
    assert places == ["cpu", "meta"]
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        hidden = spread.model(input_ids=ids, attention_mask=ids).last_hidden_state
    assert hidden.device.type == "meta" and hidden.shape == (1, 4, 64)


def test_bytes_of_the_weights_are_known_without_loading_them(folder, text):
    assert weight_bytes(str(folder)) == sum(part.numel() * 4 for part in text.model.parameters())


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
