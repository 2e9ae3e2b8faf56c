"""Prompts to latents to files, from a real checkpoint of a small model with random weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from goku_mega.config.sampling import SampleConfig
from goku_mega.errors import CheckpointError, ConfigError, MediaError, UserError
from goku_mega.flow.solvers import Solver
from goku_mega.media.decode import decode_image, decode_video
from goku_mega.model.packed import PackedBatch
from goku_mega.model.sizes import model_shape
from goku_mega.sample.sampler import Drawing, Pipeline, Prompt, sample

MakeRun = Callable[..., Path]
CLIP, WIDE, IMAGE = (2, 4, 4), (2, 4, 8), (1, 4, 4)
PROMPTS = [
    Prompt("a red circle moving left", 0, CLIP),
    Prompt("a blue square", 1, IMAGE),
    Prompt("a red circle moving left", 1, CLIP),
    Prompt("a blue circle moving right", 2, WIDE),
    Prompt("", 3, CLIP),
]


@pytest.fixture(scope="module")
def run_dir(make_run: MakeRun) -> Path:
    return make_run()


@pytest.fixture(scope="module")
def pipeline(run_dir: Path) -> Pipeline:
    return Pipeline.from_checkpoint(run_dir, weights="ema")


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("shift_base_tokens", [0, 4])
def test_a_sample_does_not_depend_on_what_is_sampled_beside_it(
    pipeline: Pipeline, solver: Solver, guidance: float, shift_base_tokens: int
):
    pipeline = replace(pipeline, shift_base_tokens=shift_base_tokens)
    drawing = Drawing(3, guidance, solver)
    together = pipeline.latents(PROMPTS, drawing)
    assert [latent.shape for latent in together] == [
        (pipeline.shape.latent_channels, *prompt.latent_shape) for prompt in PROMPTS
    ]
    assert same(together, [pipeline.latents([prompt], drawing)[0] for prompt in PROMPTS])
    assert same(together[::-1], pipeline.latents(PROMPTS[::-1], drawing))


def test_seed_prompt_guidance_solver_and_shift_each_matter(pipeline: Pipeline):
    prompt, drawing = PROMPTS[0], Drawing(3, 2.5, "euler")
    (first,) = pipeline.latents([prompt], drawing)
    assert torch.equal(first, pipeline.latents([prompt], drawing)[0])
    others = [
        pipeline.latents([prompt._replace(seed=9)], drawing),
        pipeline.latents([prompt._replace(text="a blue square")], drawing),
        pipeline.latents([prompt], drawing._replace(guidance=3.5)),
        pipeline.latents([prompt], drawing._replace(solver="heun")),
        replace(pipeline, shift_base_tokens=1).latents([prompt], drawing),
    ]
    assert not any(same([first], other) for other in others)


def test_guidance_moves_along_the_line_from_the_unconditional_to_the_conditional(pipeline: Pipeline):
    one, two, four = (pipeline.latents(PROMPTS, Drawing(1, scale, "euler")) for scale in (1.0, 2.0, 4.0))
    assert same([c - a for a, c in zip(one, four, strict=True)], [3 * (b - a) for a, b in zip(one, two, strict=True)])
    # Without a text, there is nothing to be guided to.
    assert same(one[-1:], four[-1:])


@pytest.mark.parametrize(("guidance", "packed"), [(1.0, 5), (2.5, 10)])
def test_a_velocity_is_one_forward_pass_and_without_guidance_a_pack_half_as_large(
    pipeline: Pipeline, guidance: float, packed: int
):
    seen: list[int] = []

    def count(module: torch.nn.Module, arguments: tuple[PackedBatch]) -> None:
        seen.append(len(arguments[0].timesteps))

    handle = pipeline.model.register_forward_pre_hook(count)
    try:
        pipeline.latents(PROMPTS, Drawing(4, guidance, "euler"))
    finally:
        handle.remove()
    assert seen == [packed] * 4


def test_frames_come_back_in_the_order_of_the_prompts(pipeline: Pipeline):
    drawing = Drawing(2, 1.0, "euler")
    clips = pipeline.frames(PROMPTS, drawing)
    assert [clip.shape for clip in clips] == [(5, 32, 32, 3), (1, 32, 32, 3), (5, 32, 32, 3), (5, 32, 64, 3),
                                              (5, 32, 32, 3)]  # fmt: skip
    for prompt, clip in zip(PROMPTS, clips, strict=True):
        alone = pipeline.frames([prompt], drawing)[0]
        assert np.abs(alone.astype(int) - clip).max() <= 1


def test_ema_training_and_initial_weights_are_three_different_models(run_dir: Path, pipeline: Pipeline):
    drawing = Drawing(1, 1.0, "euler")
    training = Pipeline.from_checkpoint(run_dir, weights="model")
    initial = Pipeline.from_checkpoint(run_dir, weights="ema", untrained=True)
    samples = [one.latents(PROMPTS, drawing) for one in (pipeline, training, initial)]
    assert not any(same(samples[a], samples[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert (pipeline.step, training.step, initial.step) == (7, 7, 0)


def config(run_dir: Path, output: Path, **changes: object) -> SampleConfig:
    settings = {"prompt": "a red circle moving left", "steps": 2, "height": 32, "width": 48, "frames": 5, "threads": 1}
    return SampleConfig(checkpoint=str(run_dir), output=str(output), **{**settings, **changes})  # type: ignore[arg-type]


def test_a_prompt_becomes_a_video_a_gif_a_contact_sheet_or_an_image(run_dir: Path, tmp_path: Path):
    result = sample(config(run_dir, tmp_path / "new" / "clip.mp4", seed=4))
    assert decode_video(tmp_path / "new" / "clip.mp4").shape == (5, 32, 48, 3)
    assert (result["checkpoint_step"], result["seed"], result["frames"]) == (7, 4, 5)

    sample(config(run_dir, tmp_path / "clip.gif"))
    assert (tmp_path / "clip.gif").read_bytes().startswith(b"GIF89a")

    sample(config(run_dir, tmp_path / "sheet.png"))
    height, width = decode_image(tmp_path / "sheet.png").shape[1:3]
    assert height >= 32 and width >= 5 * 48

    sample(config(run_dir, tmp_path / "image.png", frames=1))
    assert decode_image(tmp_path / "image.png").shape == (1, 32, 48, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.gif", "image.png", "new", "sheet.png"]


def test_one_checkpoint_folder_will_do_and_the_same_command_writes_the_same_bytes(run_dir: Path, tmp_path: Path):
    sample(config(run_dir, tmp_path / "run.png"))
    sample(config(run_dir / "checkpoints" / "step_00000007", tmp_path / "step.png"))
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "step.png").read_bytes()


def refusal(error: type[UserError], run_dir: Path, output: Path, **changes: object) -> str:
    """What `sample` says; it must not have written anything."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(error) as caught:
        sample(config(run_dir, output, **changes))
    assert sorted(output.parent.rglob("*")) == before
    return str(caught.value)


def test_what_cannot_be_written_is_refused_before_a_checkpoint_is_looked_for(tmp_path: Path):
    missing = tmp_path / "missing"
    (tmp_path / "file").write_text("")
    assert "clip.avi" in refusal(MediaError, missing, tmp_path / "clip.avi")
    assert "file" in refusal(MediaError, missing, tmp_path / "file" / "clip.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert "folder" in refusal(MediaError, missing, tmp_path / "folder.mp4")
    assert "multiple of 16" in refusal(ConfigError, missing, tmp_path / "clip.mp4", height=40)
    assert "4n + 1" in refusal(ConfigError, missing, tmp_path / "clip.mp4", frames=8)
    assert str(missing) in refusal(CheckpointError, missing, tmp_path / "clip.mp4")


def test_a_checkpoint_that_cannot_be_sampled_from_is_refused(make_run: MakeRun, tmp_path: Path):
    output = tmp_path / "clip.mp4"
    pilot = replace(model_shape("pilot-1b"), layers=1, hidden_size=48, ffn_hidden_size=96, heads=2)
    assert "class-conditional" in refusal(CheckpointError, make_run(shape=pilot), output)
    assert "have changed" in refusal(CheckpointError, make_run(vae_key="0123456789abcdef"), output)
    assert "text encoder" in refusal(CheckpointError, make_run(path=str(tmp_path / "gone")), output)


def test_a_damaged_checkpoint_is_refused(make_run: MakeRun, tmp_path: Path):
    run_dir = make_run()
    largest = max((run_dir / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert largest.name in refusal(CheckpointError, run_dir, tmp_path / "clip.mp4")
