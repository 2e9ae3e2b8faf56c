"""Training of the small VAE: what it writes, and that a killed run ends with the same weights."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from goku_mega.config.data import CorpusConfig
from goku_mega.config.training import VaeRun
from goku_mega.data.shapes import write_corpus
from goku_mega.encoders.vae import TINY, load_vae
from goku_mega.errors import DataError
from goku_mega.train.vae import build_vae, draw_batch, load_clips, train_vae

RECIPE = Path(__file__).parents[2] / "launch/recipes/vae_tiny.yaml"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LIMIT_S = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "shapes"
    write_corpus(CorpusConfig(output=str(folder), videos=8, images=2, height=48, width=48, workers=1))
    return folder


def run_of(corpus: Path, output: Path, **changes: object) -> VaeRun:
    run = VaeRun(
        corpus=str(corpus), output=str(output), steps=12, batch_samples=2, warmup_steps=2,
        block_channels=(8, 8, 8, 16), latent_channels=4, resume_every_steps=3,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def test_a_run_writes_a_vae_whose_latents_are_normalised(corpus, tmp_path):
    run = run_of(corpus, tmp_path / "out")
    train_vae(run)
    vae = load_vae(run.output)
    chosen = [clip for clip in load_clips(corpus, run.frames) if clip.shape[:3] == (9, 48, 48)]
    latents = vae.encode(chosen)
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 0.3
    assert latents.std(dim=(0, 2, 3, 4)).sub(1).abs().max() < 0.3
    assert vae.decode(latents).shape == (len(chosen), 9, 48, 48, 3)


def test_training_lowers_the_error(corpus, tmp_path):
    run = run_of(corpus, tmp_path / "out", steps=50, resume_every_steps=50)
    train_vae(run)
    rows = [yaml.safe_load(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["error_of_255"] < 0.75 * rows[0]["error_of_255"]


def test_a_batch_is_a_function_of_the_seed_and_the_step(corpus):
    run = run_of(corpus, Path("unused"))
    clips = load_clips(corpus, run.frames)
    for step in range(run.steps):
        batch = draw_batch(clips, run, step)
        assert torch.equal(batch, draw_batch(clips, run, step))
        assert batch.abs().max() <= 1 and batch.shape[2] in (1, run.frames)
    assert not torch.equal(draw_batch(clips, run, 0), draw_batch(clips, run, 1))
    assert not torch.equal(draw_batch(clips, run, 0), draw_batch(clips, dataclasses.replace(run, seed=1), 0))


def test_a_killed_run_ends_with_the_same_weights(corpus, tmp_path):
    whole = run_of(corpus, tmp_path / "whole")
    train_vae(whole)
    killed = dataclasses.replace(whole, output=str(tmp_path / "killed"))
    imports = "from goku_mega.config.training import VaeRun\nfrom goku_mega.train.vae import train_vae\n"
    code = f"{imports}train_vae({killed!r})\n"
    process = subprocess.Popen([sys.executable, "-c", code])
    state = tmp_path / "killed" / "state.pt"
    deadline = time.monotonic() + LIMIT_S
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(state, weights_only=True)["step"] < whole.steps
    train_vae(killed)
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_resumed_run_reports_a_step_once(corpus, tmp_path):
    run = run_of(corpus, tmp_path / "out", steps=3)
    train_vae(run)
    metrics = tmp_path / "out" / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    train_vae(run)  # its state has taken three steps
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_corpus_that_is_not_there_names_the_command(tmp_path):
    with pytest.raises(DataError, match="goku-mega corpus shapes"):
        train_vae(run_of(tmp_path / "none", tmp_path / "out"))


def test_the_recipe_makes_the_weights_that_ship():
    settings = yaml.safe_load(RECIPE.read_text())
    vae = build_vae(VaeRun(**{**settings, "block_channels": tuple(settings["block_channels"])}))
    shipped = load_vae("tiny").vae
    assert {name: p.shape for name, p in vae.state_dict().items()} == {
        name: p.shape for name, p in shipped.state_dict().items()
    }
    assert (TINY / WEIGHTS).stat().st_size == pytest.approx(2 * sum(p.numel() for p in vae.parameters()), rel=0.02)
    assert np.all(np.isfinite([float(p.float().abs().max()) for p in shipped.parameters()]))
