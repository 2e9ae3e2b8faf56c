"""The VAE: shapes, the same bytes in any company, and reconstructions the detector can read."""

import json
import shutil

import numpy as np
import pytest
import torch

from goku_mega.data.shape_detector import detect, score
from goku_mega.data.shapes import draw_scene, render_clip
from goku_mega.encoders import vae as vae_module
from goku_mega.encoders.vae import TINY, VideoVae, content_key, latent_shape, load_vae
from goku_mega.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def vae() -> VideoVae:
    torch.set_num_threads(1)
    return load_vae("tiny")


def clips(count: int, frames: int = 9, height: int = 64, width: int = 64, level: str = "one") -> list[np.ndarray]:
    return [clip for _, clip in scenes(count, frames, height, width, level)]


def scenes(count: int, frames: int = 9, height: int = 64, width: int = 64, level: str = "one") -> list:
    drawn = [draw_scene(level, frames > 1, np.random.default_rng(7000 + number)) for number in range(count)]
    return [
        (scene, render_clip(scene, seed=number, frames=frames, height=height, width=width))
        for number, scene in enumerate(drawn)
    ]


def test_the_shipped_weights_have_the_real_strides_and_are_small():
    config = json.loads((TINY / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKLCogVideoX"
    assert len(config["block_out_channels"]) == 4 and config["temporal_compression_ratio"] == 4
    assert (TINY / "diffusion_pytorch_model.safetensors").stat().st_size <= 5_000_000


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 21])
def test_every_length_of_4n_plus_1_comes_back_with_its_shape(vae, frames):
    [clip] = clips(1, frames, 48, 80)
    latent = vae.encode([clip])
    assert latent.shape == (1, vae.latent_channels, *latent_shape(frames, 48, 80))
    assert latent.dtype == torch.float32
    decoded = vae.decode(latent)
    assert decoded.shape == (1, *clip.shape) and decoded.dtype == np.uint8


@pytest.mark.parametrize("frames", [1, 9])
def test_a_clip_has_the_same_bytes_in_any_company(vae, frames):
    samples = clips(5, frames)
    together = vae.encode(samples)
    assert torch.equal(together, torch.cat([vae.encode([sample]) for sample in samples]))
    assert torch.equal(together[3:], vae.encode(samples[3:]))
    assert torch.equal(together.flip(0), vae.encode(samples[::-1]))
    decoded = vae.decode(together)
    assert np.array_equal(decoded, np.concatenate([vae.decode(latent[None]) for latent in together]))


def test_latents_have_about_unit_variance(vae):
    latents = vae.encode(clips(24))
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1  # a mean over few grounds
    deviations = latents.std(dim=(0, 2, 3, 4))
    assert deviations.min() > 0.6 and deviations.max() < 1.6


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_detector_reads_reconstructions(vae, frames):
    """The aim with one object is 95%, less the chance of forty draws."""
    drawn = scenes(40, frames, level="one")
    decoded = vae.decode(vae.encode([clip for _, clip in drawn]))
    right = [
        score(scene, detect(clip), is_video=frames > 1)["all"] for (scene, _), clip in zip(drawn, decoded, strict=True)
    ]
    assert sum(right) >= 38


def test_later_frames_do_not_reach_the_first_latent_much(vae):
    [clip] = clips(1)
    changed = clip.copy()
    changed[5:] = changed[5:, ::-1]
    first, other = vae.encode([clip, changed])
    # Only the group norms look ahead.
    assert (first[:, 0] - other[:, 0]).abs().mean() < 0.25 * (first[:, 2] - other[:, 2]).abs().mean()


def test_a_large_picture_goes_through_in_tiles_with_little_loss(vae, monkeypatch):
    scene = draw_scene("one", False, np.random.default_rng(3))
    picture = render_clip(scene, seed=3, frames=1, height=320, width=480)
    whole = vae.decode(vae.encode([picture]))
    monkeypatch.setattr(vae_module, "TILE_ABOVE_PIXELS", 256 * 256)
    latent = vae.encode([picture])
    tiled = vae.decode(latent)
    assert vae.vae.use_tiling and latent.shape[2:] == (1, 40, 60)
    assert tiled.shape == whole.shape
    assert np.abs(tiled.astype(float) - whole).mean() < 8
    monkeypatch.undo()
    vae.encode([picture[:, :64, :64]])
    assert not vae.vae.use_tiling


@pytest.mark.parametrize("shape", [(8, 64, 64), (9, 60, 64), (9, 64, 72)])
def test_a_shape_the_strides_do_not_divide_is_refused(vae, shape):
    with pytest.raises(DataError, match=r"4n \+ 1|multiples of 16"):
        vae.encode([np.zeros((*shape, 3), np.uint8)])


def test_a_pipeline_folder_loads_by_its_vae_subfolder(vae, tmp_path):
    shutil.copytree(TINY, tmp_path / "pipeline" / "vae")
    [clip] = clips(1)
    assert torch.equal(load_vae(str(tmp_path / "pipeline")).encode([clip]), vae.encode([clip]))
    assert content_key(str(tmp_path / "pipeline")) == content_key("tiny")


def test_published_weights_are_scaled_by_their_factor(tmp_path):
    """The published configuration has no mean or deviation, only `scaling_factor`."""
    shutil.copytree(TINY, tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "latents_mean": None, "latents_std": None, "scaling_factor": 0.7}))
    tiny, published = load_vae("tiny"), load_vae(str(tmp_path / "vae"))
    samples = clips(2)
    raw = tiny.encode(samples) * tiny.std + tiny.mean
    torch.testing.assert_close(published.encode(samples), 0.7 * raw)
    theirs, ours = published.decode(published.encode(samples)), tiny.decode(tiny.encode(samples))
    assert np.abs(theirs.astype(int) - ours).max() <= 1  # scaled and back differs in the last bits


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/no-such-model"])
def test_a_vae_that_is_not_there_is_one_line(monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=name) as raised:
        load_vae(name)
    assert "\n" not in str(raised.value)


def test_the_key_follows_the_content(tmp_path):
    shutil.copytree(TINY, tmp_path / "copy")
    assert content_key(str(tmp_path / "copy")) == content_key("tiny")
    (tmp_path / "copy" / "config.json").write_text((TINY / "config.json").read_text() + " ")
    assert content_key(str(tmp_path / "copy")) != content_key("tiny")
