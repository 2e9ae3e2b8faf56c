"""The VAE: shapes, the same bytes in any company, and reconstructions the detector can read."""

import gc
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.data.shape_detector import detect, score
from goku_mega.data.shapes import draw_scene, render_clip
from goku_mega.encoders import vae as vae_module
from goku_mega.encoders import vae_stream
from goku_mega.encoders.vae import TINY, VideoVae, content_key, latent_shape, load_vae
from goku_mega.encoders.vae_stream import time_chunks
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


def library_latents(vae: VideoVae, clip: np.ndarray) -> torch.Tensor:
    """diffusers' own encoding of the whole clip."""
    vae.vae.disable_tiling()
    pixels = torch.from_numpy(clip)[None].permute(0, 4, 1, 2, 3).to(vae.vae.dtype) / 127.5 - 1
    with torch.no_grad():
        return (vae.vae.encode(pixels).latent_dist.mean - vae.mean) / vae.std


def in_double(**changes: int) -> VideoVae:
    """The shipped weights in fp64, or an encoder of other depth and width with random ones."""
    if not changes:
        return VideoVae(load_vae("tiny").vae.double(), torch.device("cpu"))
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    config = json.loads((TINY / "config.json").read_text()) | {"latents_mean": None, "latents_std": None} | changes
    vae = AutoencoderKLCogVideoX.from_config(config).double()
    return VideoVae(vae, torch.device("cpu"))


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 21, 25, 29])
def test_a_clip_that_comes_in_pieces_has_the_bytes_of_the_whole_clip_through_the_library(vae, monkeypatch, frames):
    monkeypatch.setattr(vae_module, "PAIR_BELOW_VOXELS", 0)
    [clip] = clips(1, frames, 48, 64)
    encoding = vae.begin_clip(48, 64)
    places = np.cumsum([0, *time_chunks(frames)])
    for start, end in itertools.pairwise(places):
        encoding.push(clip[None, start:end])
    assert places[-1] == frames
    assert torch.equal(encoding.latents(), vae.encode([clip]))
    assert torch.equal(encoding.latents(), library_latents(vae, clip))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 400))
def test_chunks_of_any_length_fit_into_memory_and_the_causal_strides(n):
    chunks = time_chunks(4 * n + 1)
    assert sum(chunks) == 4 * n + 1 and max(chunks) <= 13
    assert chunks[0] % 4 == 1 and all(chunk == 8 for chunk in chunks[1:])


@pytest.mark.parametrize("changes", [{}, {"layers_per_block": 2, "use_quant_conv": True, "latent_channels": 3}])
@pytest.mark.parametrize("band_pixels", [1, 500, 10**9])
def test_a_picture_in_bands_is_the_whole_picture_to_fp64_rounding(monkeypatch, changes, band_pixels):
    """Also at the edges of the bands and over chunks of time; group norms see the whole picture."""
    double = in_double(**changes)
    [clip] = clips(1, 21, 48, 80)
    whole = library_latents(double, clip)
    monkeypatch.setattr(vae_module, "TILE_ABOVE_PIXELS", 0)
    monkeypatch.setattr(vae_stream, "BAND_PIXELS", band_pixels)
    monkeypatch.setattr(vae_module, "PAIR_BELOW_VOXELS", 0)
    difference = (double.encode([clip]) - whole).abs().max() / whole.std()
    assert difference < 1e-12


def test_a_picture_in_bands_is_the_whole_picture_to_fp32_rounding(vae, monkeypatch):
    picture = clips(1, 1, 320, 480)[0]
    monkeypatch.setattr(vae_module, "TILE_ABOVE_PIXELS", 256 * 256)
    monkeypatch.setattr(vae_stream, "BAND_PIXELS", 20_000)
    banded, whole = vae.encode([picture]), library_latents(vae, picture)
    assert not torch.equal(banded, whole)  # another way, then
    assert (banded - whole).abs().max() < 2e-5  # of deviations; 3e-6 was seen


def test_what_is_held_of_a_clip_does_not_grow_with_its_length(vae):
    def held(chunks: int) -> int:
        encoding = vae.begin_clip(48, 64)
        for _ in range(chunks):
            encoding.push(np.zeros((1, 8, 48, 64, 3), np.uint8))
        kept = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        latents = {id(part) for part in encoding._parts}
        return sum(item.numel() for item in kept if id(item) not in latents)

    assert held(2) == held(12)


def test_a_large_picture_comes_back_in_tiles_with_little_loss(vae, monkeypatch):
    scene = draw_scene("one", False, np.random.default_rng(3))
    picture = render_clip(scene, seed=3, frames=1, height=320, width=480)
    latent = vae.encode([picture])
    whole = vae.decode(latent)
    monkeypatch.setattr(vae_module, "TILE_ABOVE_PIXELS", 256 * 256)
    tiled = vae.decode(latent)
    assert vae.vae.use_tiling
    assert tiled.shape == whole.shape
    assert np.abs(tiled.astype(float) - whole).mean() < 8
    monkeypatch.undo()
    vae.decode(vae.encode([picture[:, :64, :64]]))
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
