"""Captions: key frames, the clip and the merging model each see what they must, over a server that really looks."""

from pathlib import Path

import numpy as np
import pytest
from vision_server import COLORS, vision_server

from goku_mega.config.curation import CaptionConfig
from goku_mega.curate.clip import Clip, Footage
from goku_mega.curate.stages.caption import Caption, join_captions, merge_prompt, sidecar_caption
from goku_mega.errors import ConfigError, DataError, MediaError
from goku_mega.media.write import write_image, write_video

FRAME_RATE = 10
SCENES = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """A second of each colour, 10 frames a second, 96x64."""
    frames = [np.full((64, 96, 3), COLORS[color], np.uint8) for color in SCENES for _ in range(FRAME_RATE)]
    path = tmp_path_factory.mktemp("caption") / "colors.mp4"
    write_video(path, np.stack(frames), FRAME_RATE)
    return path


@pytest.fixture(scope="module")
def clip(video) -> Clip:
    """From the green second on."""
    return Clip("colors", Footage(video), 10, 30, FRAME_RATE, (12, 22, 32))


@pytest.fixture
def server():
    with vision_server() as running:
        yield running


def config(server, **settings) -> CaptionConfig:
    names = {"key_frame_model": "K", "clip_model": "C", "merge_model": "M"}
    return CaptionConfig(source="models", server=server.url, **{**names, "max_side_px": 48, **settings})


def questions_to(server, model: str) -> list[str]:
    return [body["messages"][0]["content"][-1]["text"] for body in server.requests if body["model"] == model]


def test_each_model_sees_its_frames_in_their_order_and_no_larger_than_set(server, clip, video):
    made = Caption(config(server, clip_frames=6)).score(clip, video)
    assert made.key_frame_captions == ("K saw green 48x32.", "K saw blue 48x32.", "K saw yellow 48x32.")
    two_of_each = ", ".join(f"{color} 48x32" for color in SCENES[1:] for _ in range(2))
    assert made.clip_caption == f"C saw {two_of_each}."
    assert made.caption == "M read: K saw yellow 48x32."


def test_the_merging_model_reads_every_description_and_when_it_is_of(server, clip, video):
    made = Caption(config(server)).score(clip, video)
    (prompt,) = questions_to(server, "M")
    assert "one video of 3.0 seconds" in prompt
    places = [prompt.index(f"The whole video:\n{made.clip_caption}")]
    places += [
        prompt.index(f"After {second} seconds:\n{caption}")
        for second, caption in zip(("0.2", "1.2", "2.2"), made.key_frame_captions, strict=True)
    ]
    assert places == sorted(places)


def test_the_clips_model_is_told_how_many_frames_of_how_long_a_clip_it_sees(server, clip, video):
    Caption(config(server, clip_frames=5)).score(clip, video)
    (prompt,) = questions_to(server, "C")
    assert "These 5 pictures" in prompt and "one video of 3.0 seconds" in prompt and "camera" in prompt


def test_without_a_merging_model_descriptions_are_joined(server, clip, video):
    made = Caption(config(server, merge_model="")).score(clip, video)
    assert made.caption == " ".join((made.clip_caption, *made.key_frame_captions))


def test_without_a_clips_model_key_frames_alone_are_merged(server, clip, video):
    made = Caption(config(server, clip_model="")).score(clip, video)
    assert made.clip_caption == "" and not questions_to(server, "C")
    assert "The whole video" not in questions_to(server, "M")[0]


def test_one_description_is_not_merged_with_itself(server, video):
    still = Clip("still", Footage(video), 0, 10, FRAME_RATE, (5,))
    made = Caption(config(server, clip_model="")).score(still, video)
    assert made.caption == made.key_frame_captions[0] == "K saw red 48x32."
    assert not questions_to(server, "M")


def test_an_image_is_described_once(server, tmp_path):
    path = tmp_path / "blue.png"
    write_image(path, np.full((40, 24, 3), COLORS["blue"], np.uint8))
    made = Caption(config(server)).score(Clip("blue", Footage(path), 0, 1, 1.0, (0,)), path)
    assert made.caption == "K saw blue 24x40." and made.clip_caption == ""
    assert len(server.requests) == 1 and "of a video" not in questions_to(server, "K")[0]


def test_captions_do_not_depend_on_who_answers_first(server, clip, video):
    first = Caption(config(server)).score(clip, video)
    assert all(Caption(config(server)).score(clip, video) == first for _ in range(3))


@pytest.mark.parametrize("answer", ["", "  \n", "<think>I wonder"])
def test_an_answer_without_words_is_no_caption(server, clip, video, answer):
    server.answer = lambda *_: answer
    with pytest.raises(DataError, match="no words"):
        Caption(config(server)).score(clip, video)


def test_a_model_that_the_server_lacks_ends_the_run(server, clip, video):
    server.models = ("K", "C")
    with pytest.raises(ConfigError, match="no model 'M'"):
        Caption(config(server)).score(clip, video)


def test_a_caption_beside_the_source_is_taken_in_one_line_for_each_of_its_clips(clip, tmp_path):
    (tmp_path / "dance.txt").write_text("\ufeffTwo people\n dance, 舞.\n", encoding="utf-8")
    stage = Caption(CaptionConfig(source="sidecar"))
    made = stage.score(clip, tmp_path / "dance.mp4")
    assert (made.caption, made.key_frame_captions, made.clip_caption) == ("Two people dance, 舞.", (), "")


def test_the_caption_with_the_sources_whole_name_wins(tmp_path):
    (tmp_path / "a.txt").write_text("Of both.")
    (tmp_path / "a.png.txt").write_text("Of the image.")
    assert sidecar_caption(tmp_path / "a.png") == "Of the image."
    assert sidecar_caption(tmp_path / "a.mp4") == "Of both."


@pytest.mark.parametrize(("content", "words"), [(None, "no caption"), (b" \n", "empty"), (b"caf\xe9", "UTF-8")])
def test_a_source_without_a_caption_is_told_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MediaError, match=words) as caught:
        sidecar_caption(tmp_path / "a.mp4")
    assert "a.txt" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_without_a_source_of_captions_there_is_none(clip, video):
    assert Caption(CaptionConfig()).score(clip, video).caption == ""


def test_joining_keeps_each_description_once_and_the_clips_first():
    assert join_captions(("A.", "B.", "A."), "C.") == "C. A. B."
    assert join_captions((), "") == ""


def test_braces_in_descriptions_are_kept():
    assert "{second}" in merge_prompt(("A sign says {second}.",), (0.0,), "{frames}", 1.0)
