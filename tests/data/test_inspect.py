"""`goku-mega data stats | show`: the numbers are those of the samples, the pictures those of the latents."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faulty_store import upload
from PIL import Image

from goku_mega.config.data import DataShowConfig, DataStatsConfig
from goku_mega.data.inspect import show, stats
from goku_mega.data.shards import DATASET, INDEX, NULL_TEXT, EncodedSample, load_index, write_index, write_shard
from goku_mega.encoders.vae import content_key, load_vae
from goku_mega.errors import DataError, MediaError
from goku_mega.media.write import GAP_PX, LABEL_WIDTH_PX
from goku_mega.model.sizes import model_shape

SIZES = {"image-a": (1, 32, 32), "image-b": (1, 32, 48), "video-c": (9, 32, 32), "video-d": (5, 64, 32)}
"""Frames, height and width of the samples."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A disc on a ground in every clip, encoded by the VAE that ships."""
    folder, vae = tmp_path_factory.mktemp("data"), load_vae("tiny")
    samples = []
    for number, (key, (frames, height, width)) in enumerate(SIZES.items()):
        y, x = np.mgrid[:height, :width]
        clip = np.full((frames, height, width, 3), 60 + 30 * number, dtype=np.uint8)
        clip[:, (y - 16) ** 2 + (x - 16) ** 2 < 64] = (220, 40, 40)
        text = np.zeros((3 + number, 64), dtype=np.float32)
        samples.append(
            EncodedSample(key, vae.encode([clip])[0].numpy(), text, {"caption": "a red disc" + "!" * number})
        )
    rows = write_shard(folder / "shards" / "0.tar", samples[:3]) + write_shard(folder / "shards" / "1.tar", samples[3:])
    write_index(folder / INDEX, rows)
    np.save(folder / NULL_TEXT, np.zeros((1, 64), dtype=np.float32))
    about = {"latent_channels": rows[0].channels, "text_width": 64, "vae": "tiny", "vae_key": content_key("tiny")}
    (folder / DATASET).write_text(json.dumps(about))
    return folder


def of(found: dict, name: str) -> dict:
    """The row of the quantiles."""
    return next(row for row in found["of_a_sample"] if row["number"] == name)


def test_the_numbers_are_those_of_the_samples(dataset):
    found, index = stats(DataStatsConfig(path=str(dataset), fps=7)), load_index(dataset)
    shape = model_shape("tiny", latent_channels=index.latent_channels, text_width=64)
    assert (found["samples"], found["images"], found["videos"], found["shards"]) == (4, 2, 2, 2)
    assert found["hours"] == round((9 + 5) / 7 / 3600, 3)
    assert (
        found["tokens"]
        == sum(index.tokens(shape))
        == sum(((frames - 1) // 4 + 1) * height * width // 256 for frames, height, width in SIZES.values())
    )
    assert (of(found, "text_tokens")["least"], of(found, "text_tokens")["most"]) == (3, 6)
    assert of(found, "caption_characters")["mean"] == np.mean([10, 11, 12, 13])
    assert of(found, "training_tflops")["most"] == pytest.approx(max(index.flops(shape)) / 1e12, rel=1e-4)
    assert {(row["frames"], row["height"], row["width"]) for row in found["shapes"]} == set(SIZES.values())
    for name, total in (("samples", 4), ("of_samples", 1), ("of_tokens", 1)):
        assert sum(row[name] for row in found["shapes"]) == pytest.approx(total, abs=1e-3)


def test_shapes_beyond_the_rows_are_one_row(dataset):
    found = stats(DataStatsConfig(path=str(dataset), shapes=1))
    assert [row["samples"] for row in found["shapes"]] == [1, 3]
    assert found["hours"] is None


def test_numbers_need_no_shard_and_no_local_folder(dataset, tmp_path):
    lists = tmp_path / "lists"
    shutil.copytree(dataset, lists, ignore=shutil.ignore_patterns("shards"))
    place = upload(lists, "faulty://inspect/lists")
    assert {**stats(DataStatsConfig(path=place)), "path": ""} == {
        **stats(DataStatsConfig(path=str(dataset))),
        "path": "",
    }


def test_the_sheet_shows_the_named_samples_as_their_vae_decodes_them(dataset, tmp_path):
    place, output = upload(dataset, "faulty://inspect/data"), tmp_path / "sheet.png"
    found = show(DataShowConfig(path=place, output=str(output), keys="video-c,image-b", frames=3, threads=1))
    assert [(row["key"], row["frames"], row["height"], row["width"]) for row in found["samples"]] == [
        ("video-c", 9, 32, 32), ("image-b", 1, 32, 48),
    ]  # fmt: skip
    sheet = np.asarray(Image.open(output))
    left, second = LABEL_WIDTH_PX + GAP_PX, 32 + 2 * GAP_PX
    assert sheet[:, :left].min() < 100  # the captions
    for frame, start in enumerate(range(left, left + 3 * (32 + GAP_PX), 32 + GAP_PX)):
        assert is_a_disc(sheet[GAP_PX : GAP_PX + 32, start : start + 32], ground=60 + 30 * 2), frame
    assert is_a_disc(sheet[second : second + 32, left : left + 48], ground=60 + 30)


def is_a_disc(picture: np.ndarray, *, ground: int) -> bool:
    """Whether it is near what was drawn: the codec is small."""
    middle, corner = picture[12:20, 12:20].mean((0, 1)), picture[:4, :4].mean((0, 1))
    return bool(np.abs(middle - (220, 40, 40)).max() < 50 and np.abs(corner - ground).max() < 30)


def test_a_seed_draws_the_same_samples_and_large_pictures_are_made_smaller(dataset, tmp_path):
    sheets = [tmp_path / f"{name}.png" for name in "ab"]
    drawn = [
        [row["key"] for row in show(DataShowConfig(
            path=str(dataset), output=str(sheet), samples=3, seed=2, frames=1, height=16, threads=1))["samples"]]
        for sheet in sheets
    ]  # fmt: skip
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
    assert Image.open(sheets[0]).height == 3 * 16 + 4 * GAP_PX


def test_what_cannot_be_shown_is_said_in_a_line(dataset, tmp_path):
    output = str(tmp_path / "sheet.png")
    with pytest.raises(DataError, match="has no sample 'video-x'; did you mean 'video-"):
        show(DataShowConfig(path=str(dataset), output=output, keys="image-a,video-x"))
    with pytest.raises(MediaError, match="a sheet is a PNG"):
        show(DataShowConfig(path=str(dataset), output=str(tmp_path / "sheet.jpg")))
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    about = json.loads((other / DATASET).read_text())
    (other / DATASET).write_text(json.dumps({**about, "vae_key": "of other weights"}))
    with pytest.raises(DataError, match="VAE 'tiny', whose weights are gone or have changed"):
        show(DataShowConfig(path=str(other), output=output))
    assert not Path(output).exists()


def test_the_command_takes_the_place_and_answers_in_json(dataset):
    words = [sys.executable, "-m", "goku_mega.cli", "data", "stats", str(dataset), "--json"]
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == stats(DataStatsConfig(path=str(dataset)))
