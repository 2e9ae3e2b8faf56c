"""Prompts to latents to frames, from a checkpoint; and `goku-mega sample`, which writes one file.

The noise of a sample belongs to its own seed, so what is sampled beside it changes nothing.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from goku_mega.checkpoint.load import load_info, load_into, open_checkpoint
from goku_mega.config import SampleConfig
from goku_mega.data.packing import pack_prompts, patchify, token_count, unpatchify
from goku_mega.encoders.text import TextEncoder, load_text_encoder
from goku_mega.encoders.vae import VideoVae, latent_shape, load_vae
from goku_mega.errors import CheckpointError, ConfigError
from goku_mega.flow.solvers import Solver, guided, integrate
from goku_mega.flow.timesteps import shift_for, time_grid
from goku_mega.media.write import check_suffix, write_media
from goku_mega.model.sizes import ModelShape
from goku_mega.model.transformer import GokuTransformer
from goku_mega.parallel.groups import single_process_groups
from goku_mega.parallel.parallelize import build_model
from goku_mega.seeding import derive_seed

logger = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """One sample to draw."""

    text: str
    seed: int
    latent_shape: tuple[int, int, int]
    """(t, h, w) of the latent."""


class Drawing(NamedTuple):
    """How samples are drawn."""

    steps: int
    guidance: float
    solver: Solver


@dataclass(frozen=True)
class Pipeline:
    """A transformer with the encoders its data was made with."""

    model: GokuTransformer
    shape: ModelShape
    vae: VideoVae
    text: TextEncoder
    shift_base_tokens: int
    step: int
    """Training steps behind the weights."""
    device: torch.device

    @classmethod
    def from_checkpoint(cls, path: Path, *, weights: str, untrained: bool = False) -> "Pipeline":
        """Load the newest intact checkpoint of a run folder, or one checkpoint folder.

        Args:
            weights: ema or model.
            untrained: leave the weights as they were before the first step.

        Raises:
            CheckpointError: there is none, it is damaged, or its data set's encoders are gone.
        """
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        checkpoint = open_checkpoint(path)
        info = load_info(checkpoint)
        about = dict(info["model"])
        about.pop("size")
        shape = ModelShape(**{**about, "patch": tuple(about["patch"])})
        if shape.text_width is None:
            raise CheckpointError(f"{checkpoint} holds a class-conditional model; sampling takes prompts")
        model = build_model(shape, single_process_groups(device), seed=info["run"]["seed"], fsdp=False)
        if not untrained:
            load_into(checkpoint, {weights: model.shards}, model=info["model"])
        vae, text = _encoders(info["dataset"], checkpoint)
        return cls(
            model=model.module.eval().requires_grad_(False),
            shape=shape,
            vae=load_vae(vae, device),
            text=load_text_encoder(text, device),
            shift_base_tokens=info["run"]["flow"]["shift_base_tokens"],
            step=0 if untrained else info["step"],
            device=device,
        )

    def frames(self, prompts: Sequence[Prompt], drawing: Drawing) -> list[NDArray[np.uint8]]:
        """Each prompt's clip [frames, height, width, 3]; a single frame is an image."""
        latents = self.latents(prompts, drawing)
        clips: list[NDArray[np.uint8] | None] = [None] * len(prompts)
        for shape in dict.fromkeys(prompt.latent_shape for prompt in prompts):
            alike = [number for number, prompt in enumerate(prompts) if prompt.latent_shape == shape]
            decoded = self.vae.decode(torch.stack([latents[number] for number in alike]))
            for number, clip in zip(alike, decoded, strict=True):
                clips[number] = clip
        return [clip for clip in clips if clip is not None]

    @torch.no_grad()
    def latents(self, prompts: Sequence[Prompt], drawing: Drawing) -> list[Tensor]:
        """Each prompt's latent [channels, t, h, w], all prompts in one pack."""
        null_text = self.text.encode([""])[0]
        texts = self.text.encode([prompt.text for prompt in prompts])
        patch = self.shape.patch
        counts = [token_count(prompt.latent_shape, patch) for prompt in prompts]
        shifts = [shift_for(count, self.shift_base_tokens) for count in counts]
        grids = torch.tensor([time_grid(drawing.steps, shift) for shift in shifts], dtype=torch.float64)
        spans = torch.repeat_interleave(torch.tensor(counts))  # which sample each token belongs to
        with_guidance = drawing.guidance != 1.0

        def at(fraction: float) -> Tensor:
            """Each sample's own time at a fraction of the solver's way."""
            return grids[:, round(fraction * drawing.steps)]

        def velocity(x: Tensor, fraction: float) -> Tensor:
            latents = [unpatchify(t, p.latent_shape, patch) for t, p in zip(x.split(counts), prompts, strict=True)]
            times = at(fraction).tolist()
            if not with_guidance:
                return self._velocity(latents, texts, times)
            both = self._velocity(latents * 2, [*texts, *[null_text] * len(texts)], times * 2)
            conditional, unconditional = both.chunk(2)
            return guided(conditional, unconditional, drawing.guidance)

        def paced(pace: Tensor, x: Tensor, fraction: float) -> Tensor:
            return pace * velocity(x, fraction)

        noise = torch.cat([patchify(self._noise(prompt), patch) for prompt in prompts])
        # Samples of other sizes walk through other times: all share the fraction of the way, each with its pace.
        x = noise
        fractions = [number / drawing.steps for number in range(drawing.steps + 1)]
        for here, there in pairwise(fractions):
            pace = ((at(there) - at(here)) / (there - here)).float()[spans, None]  # [tokens, 1]
            x = integrate(partial(paced, pace), x, times=[here, there], solver=drawing.solver)
        return [unpatchify(t, p.latent_shape, patch) for t, p in zip(x.split(counts), prompts, strict=True)]

    def _velocity(self, latents: Sequence[Tensor], texts: Sequence[Tensor], times: Sequence[float]) -> Tensor:
        batch = pack_prompts(latents, texts, times, self.shape)
        return self.model(batch.to(self.device, torch.float32)).cpu()

    def _noise(self, prompt: Prompt) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(prompt.seed, "sample", prompt.text))
        return torch.randn((self.shape.latent_channels, *prompt.latent_shape), generator=generator)


def sample(config: SampleConfig) -> dict[str, Any]:
    """Write one prompt's image or video to `config.output`.

    Raises:
        UserError: the sizes, the file name or the checkpoint are wrong; nothing is written then.
    """
    began = time.monotonic()
    output = Path(config.output)
    check_suffix(output)
    if config.steps < 1:
        raise ConfigError(f"steps is {config.steps}; it must be 1 or more")
    shape = latent_shape(config.frames, config.height, config.width)
    torch.set_num_threads(config.threads)
    pipeline = Pipeline.from_checkpoint(Path(config.checkpoint), weights=config.weights)
    drawing = Drawing(config.steps, config.guidance, config.solver)
    clip = pipeline.frames([Prompt(config.prompt, config.seed, shape)], drawing)[0]
    write_media(output, clip, config.fps)
    return {
        "output": str(output),
        "prompt": config.prompt,
        "frames": len(clip),
        "checkpoint_step": pipeline.step,
        "seconds": round(time.monotonic() - began, 2),
    }


def _encoders(dataset: dict[str, Any], checkpoint: Path) -> tuple[str, str]:
    """Where the VAE and the text encoder of a checkpoint's data set are."""
    inside = Path(dataset["path"]) / dataset["text"]
    text = str(inside) if inside.exists() else dataset["text"]
    if dataset["text"] == "text_encoder" and not inside.exists():
        raise CheckpointError(f"{checkpoint} needs its data set's text encoder, but {inside} is gone; encode again")
    return dataset["vae"], text
