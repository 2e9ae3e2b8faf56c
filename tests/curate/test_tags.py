"""Tags: 9 classes with 86 subclasses, every answer read as exactly one of them or as none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vision_server import COLORS, vision_server

from goku_mega.config.curation import TagConfig
from goku_mega.curate.clip import Clip, Footage
from goku_mega.curate.stages.tags import OTHER, Tags, read_classes, read_tag, tag_prompt
from goku_mega.errors import ConfigError
from goku_mega.media.write import write_image, write_video

CLASSES = read_classes(None)
TAGS = [(primary, name) for primary, names in CLASSES.items() for name in names]


@pytest.fixture
def server():
    with vision_server() as running:
        yield running


def test_there_are_9_primary_classes_and_86_subclasses():
    assert len(CLASSES) == 9 and len(TAGS) == 86
    assert {"human", "scenery", "animals", "food", "urban life"} <= CLASSES.keys()
    assert {"half-selfie", "kid", "dinner", "wedding"} <= {name for _, name in TAGS}


@pytest.mark.parametrize("tag", TAGS, ids=" / ".join)
def test_every_class_is_read_from_the_forms_that_models_write(tag):
    primary, name = tag
    for answer in (
        f"{primary} / {name}",
        f"{primary.upper()}/{name.upper()}.",
        name,
        f"**{name.title()}**",
        f'Primary class: "{primary}", subclass: "{name}"',
        f"{name.removesuffix('s')}s ({primary})",
        f"{primary}_{name}".replace(" ", "_").replace("-", " "),
        f"The video is about a {name}, I would say.",
    ):
        assert read_tag(answer, CLASSES) == tag, answer


@given(st.text())
def test_every_answer_has_exactly_one_tag(answer):
    tag = read_tag(answer, CLASSES)
    assert tag in TAGS or tag == (OTHER, OTHER)


@given(st.text(alphabet=" .,:;/*\"'()-\n", max_size=9), st.sampled_from(TAGS), st.text(alphabet=" .,!*\n", max_size=9))
def test_punctuation_around_a_tag_does_not_matter(before, tag, after):
    assert read_tag(f"{before}{tag[0]} / {tag[1]}{after}", CLASSES) == tag


@pytest.mark.parametrize("answer", ["", "other", "Other / other", "human", "a carpet", "cats" * 3, "none of these"])
def test_an_answer_without_a_subclass_is_other(answer):
    assert read_tag(answer, CLASSES) == (OTHER, OTHER)


def test_a_name_inside_of_a_longer_one_is_not_meant():
    assert read_tag("a race car", CLASSES) == ("vehicles", "race car")
    assert read_tag("a cat in a race, a car", CLASSES) == ("animals", "cat")
    assert read_tag("street food", CLASSES) == ("food", "street food")


def test_of_several_subclasses_the_one_of_the_named_class_goes_first_then_the_first():
    assert read_tag("A dog at a wedding: human", CLASSES) == ("human", "wedding")
    assert read_tag("dog, cat", CLASSES) == ("animals", "dog")


def test_the_question_lists_every_class():
    lines = tag_prompt(CLASSES).splitlines()
    assert all(f"{primary}: {', '.join(names)}" in lines for primary, names in CLASSES.items())


@pytest.mark.parametrize(
    ("content", "key", "words"),
    [
        ("", "classes.yaml", "no classes"),
        ("- human", "classes.yaml", "key: value"),
        ("human: [kid, kid]", "human", "'kid' is already a subclass of human"),
        ("human: [kid]\nfood: [Kids]", "food", "'Kids' is already a subclass of human"),
        ("human: [kid]\nhuman: [baby]", "classes.yaml", "duplicate"),
        ("human: [food]\nfood: [dinner]", "human", "'food' is already a primary class"),
        ("human: [other]", "human", "fits no class"),
        ("human: []", "human", "list of subclasses"),
        ("human:", "human", "list of subclasses"),
        ("human: kid", "human", "list of subclasses, not 'kid'"),
        ("human: {kid: 1}", "human", "list of subclasses"),
        ("human: [7]", "human", "7 names no class"),
        ("human: ['']", "human", "'' names no class"),
        ("human: ['-']", "human", "'-' names no class"),
        ("no: [kid]", "False", "names no class"),
        ("7: [kid]", "7", "7 names no class"),
        ("human: [kid", "classes.yaml", "not a YAML"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused_by_file_and_key(tmp_path, content, key, words):
    file = tmp_path / "classes.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_classes(file)
    assert str(file) in str(caught.value) and key in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_missing_file_of_classes_is_named(tmp_path):
    with pytest.raises(ConfigError, match="mine.yaml"):
        read_classes(tmp_path / "mine.yaml")


def test_a_clip_is_tagged_from_four_frames_that_are_evenly_spread_over_it(server, tmp_path):
    (tmp_path / "mine.yaml").write_text("warm: [red, yellow]\ncold: [green, blue]\n")
    frames = [np.full((64, 96, 3), COLORS[color], np.uint8) for color in ("black", "green", "red", "blue", "yellow")]
    write_video(tmp_path / "a.mp4", np.repeat(np.stack(frames), 10, axis=0), 10)
    clip = Clip("a", Footage(tmp_path / "a.mp4"), 10, 40, 10.0, (15,))
    tag = Tags(TagConfig(model="T", server=server.url, classes=str(tmp_path / "mine.yaml"), max_side_px=48)).score(clip)
    assert tag.answer == "T saw green 48x32, red 48x32, blue 48x32, yellow 48x32."
    assert (tag.primary, tag.subclass) == ("cold", "green")
    assert "warm: red, yellow" in server.requests[0]["messages"][0]["content"][-1]["text"]


def test_an_image_is_tagged_from_its_one_frame(server, tmp_path):
    write_image(tmp_path / "a.png", np.full((40, 24, 3), COLORS["blue"], np.uint8))
    tag = Tags(TagConfig(model="T", server=server.url)).score(Clip("a", Footage(tmp_path / "a.png"), 0, 1, 1.0, (0,)))
    assert (tag.primary, tag.subclass, tag.answer) == (OTHER, OTHER, "T saw blue 24x40.")
