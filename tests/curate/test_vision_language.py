"""Models in this process: one that has learned to name colours proves that pictures reach it, in their order."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from vision_server import COLORS

from goku_mega.config.curation import CaptionConfig, TagConfig
from goku_mega.curate.chat import ChatSettings, open_chat
from goku_mega.curate.clip import Clip, Footage
from goku_mega.curate.networks.vision_language import load_language_model, load_vision_language_model
from goku_mega.curate.stages.caption import Caption
from goku_mega.curate.stages.tags import Tags
from goku_mega.errors import ConfigError, MissingExtra
from goku_mega.media.write import write_video

SIDE_PX = 28
QUESTION = "What colours?"
SEEN = ("red", "green", "blue")
READING_TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
SEEING_TEMPLATE = (
    "{% for message in messages %}<user>{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
"""Of a model that looks and does not listen: it says the same to any question."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the colours as words."""
    special = ["<pad>", "<end>", "<image>", "<user>", "<model>"]
    bytes_and_words = Tokenizer(models.BPE())
    bytes_and_words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_and_words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bytes_and_words.train_from_iterator([" ".join(SEEN), " " + " ".join(SEEN)] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_words, pad_token="<pad>", eos_token="<end>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = READING_TEMPLATE
    return tokenizer


def text_shape(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def plain(color: str, height: int = 40, width: int = 56) -> np.ndarray:
    return np.full((height, width, 3), COLORS[color], np.uint8)


def teach_colors(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int = 60) -> None:
    lessons = []
    for colors in [*itertools.product(SEEN, repeat=2), *itertools.product(SEEN, repeat=1)]:
        answer = " ".join(colors) + "<end>"
        images = [Image.fromarray(plain(color)) for color in colors]
        text = f"<user>{'<image>' * len(colors)}<model>{answer}"
        inputs = processor(text=text, images=images, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : -len(processor.tokenizer(answer)["input_ids"])] = -100
        lessons.append((inputs, labels))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(steps):
        for inputs, labels in lessons:
            (model(**inputs, labels=labels).loss / len(lessons)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE_PX,
        patch_size=14,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text_shape(tokenizer),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )  # fmt: skip
    square = {"height": SIDE_PX, "width": SIDE_PX}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", chat_template=SEEING_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    teach_colors(model, processor)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder = tmp_path_factory.mktemp("seeing")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reading(tmp_path_factory) -> Path:
    """A language model with random weights."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    folder = tmp_path_factory.mktemp("reading")
    Qwen2ForCausalLM(text_shape(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_pictures_reach_a_model_in_their_order(seeing):
    chat = open_chat(str(seeing), ChatSettings(max_new_tokens=8), sees=True)
    for colors in [*itertools.product(SEEN, repeat=2), *itertools.product(SEEN, repeat=1)]:
        assert chat.answer(QUESTION, [plain(color) for color in colors]) == " ".join(colors)


@pytest.mark.slow
def test_the_same_question_has_the_same_answer(seeing):
    chat = load_vision_language_model(str(seeing), device="cpu", max_new_tokens=8)
    pictures = [np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)]
    assert len({chat.answer("What is it?", pictures) for _ in range(3)}) == 1


@pytest.mark.slow
def test_stages_caption_and_tag_with_models_of_this_process(seeing, reading, tmp_path):
    frames = np.repeat(np.stack([plain("red"), plain("blue")]), 10, axis=0)
    write_video(tmp_path / "a.mp4", frames, 10)
    clip = Clip("a", Footage(tmp_path / "a.mp4"), 0, 20, 10.0, (5, 15))
    names = {"key_frame_model": str(seeing), "clip_model": str(seeing), "clip_frames": 2, "max_new_tokens": 8}
    made = Caption(CaptionConfig(source="models", **names)).score(clip, tmp_path / "a.mp4")
    assert (made.key_frame_captions, made.clip_caption) == (("red", "blue"), "red blue")
    assert made.caption == "red blue red blue"
    merged = Caption(CaptionConfig(source="models", merge_model=str(reading), **names)).score(clip, tmp_path / "a.mp4")
    assert merged.caption not in ("", made.caption)
    (tmp_path / "classes.yaml").write_text("cold: [green, blue]\nwarm: [red]\n")
    tag = Tags(TagConfig(model=str(seeing), classes=str(tmp_path / "classes.yaml"), key_frames=2)).score(clip)
    assert (tag.primary, tag.subclass, tag.answer) == ("warm", "red", "red blue")


def test_a_language_model_answers_with_the_likeliest_words(reading):
    """Against words that are taken one by one from the model's own logits."""
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(reading).eval(), make_tokenizer()
    tokens = tokenizer("<user>Merge: a cat. A dog.<model>", return_tensors="pt")["input_ids"]
    asked = tokens.shape[1]
    while tokens.shape[1] < asked + 12 and tokens[0, -1] != tokenizer.eos_token_id:
        tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(tokens[0, asked:], skip_special_tokens=True)
    assert expected and len(set(tokens[0, asked:].tolist())) > 1
    chat = load_language_model(str(reading), device="cpu", max_new_tokens=12)
    assert chat.answer("Merge: a cat. A dog.", []) == expected


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("internvl", {"processor_config.json": {"processor_class": "InternVLProcessor"},
                      "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor"}}),
        ("internvl", {"processor_config.json": {"processor_class": "InternVLProcessor"}}),
        ("qwen2_vl", {"preprocessor_config.json": {"processor_class": "Qwen2VLProcessor"}}),
    ],
)  # fmt: skip
def test_a_model_that_needs_torchvision_says_so(tmp_path, kind, files):
    """torchvision is no dependency; models whose processors take videos cannot be loaded without it."""
    make_tokenizer().save_pretrained(tmp_path)
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    image_processor = {"internvl": "GotOcr2ImageProcessor", "qwen2_vl": "Qwen2VLImageProcessor"}[kind]
    files = {"preprocessor_config.json": {}, **files}
    files["preprocessor_config.json"]["image_processor_type"] = image_processor
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(MissingExtra, match="pip install torchvision.*set `server`") as caught:
        load_vision_language_model(str(tmp_path), device="cpu", max_new_tokens=8)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_model_is_refused_by_name(tmp_path, reading):
    for name in (str(tmp_path), str(reading)):
        with pytest.raises(ConfigError, match="cannot be loaded") as caught:
            load_vision_language_model(name, device="cpu", max_new_tokens=8)
        assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_model_without_a_chat_template_is_refused(tmp_path, reading):
    Qwen2ForCausalLM.from_pretrained(reading).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no chat template"):
        load_language_model(str(tmp_path), device="cpu", max_new_tokens=8)
