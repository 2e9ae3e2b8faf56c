"""Prompts to latents to frames, from a checkpoint; and `goku-mega sample`, which writes one file.

The noise of a sample belongs to its own seed, so what is sampled beside it changes nothing.
"""

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from goku_mega.checkpoint.load import Stored, fill, load_named
from goku_mega.checkpoint.storage import Folder, open_folder
from goku_mega.config.sampling import SampleConfig
from goku_mega.data.encode import TEXT_ENCODER
from goku_mega.data.packing import pack_prompts, patchify, token_count, unpatchify
from goku_mega.data.shard_store import fetch_folder
from goku_mega.encoders.text import TextEncoder, load_text_encoder
from goku_mega.encoders.vae import VideoVae, content_key, latent_shape, load_vae
from goku_mega.errors import CheckpointError, MediaError
from goku_mega.flow.solvers import Solver, guided, integrate
from goku_mega.flow.timesteps import shift_for, time_grid
from goku_mega.interchange.importing import Exported, is_exported
from goku_mega.media.write import check_suffix, write_media
from goku_mega.model.sizes import ModelShape
from goku_mega.model.transformer import GokuTransformer
from goku_mega.parallel.groups import single_process_groups
from goku_mega.parallel.parallelize import ParallelModel, build_model
from goku_mega.places import local_path
from goku_mega.seeding import derive_seed


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
    """Classifier-free guidance scale; 1 is none, and costs half."""
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
        """Load the newest intact checkpoint of a run folder, one checkpoint folder, or exported weights.

        Args:
            weights: ema or model; exported weights are what they were exported as.
            untrained: leave the weights as they were before the first step.

        Raises:
            CheckpointError: there is none, it is damaged, or its data set's encoders are gone or changed.
        """
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")

        def build(info: dict[str, Any], place: Folder) -> ParallelModel:
            _encoders(info["dataset"], place)
            shape = _shape(info["model"], place)
            return build_model(shape, single_process_groups(device), seed=info["run"]["seed"], fsdp=False)

        def load(stored: Stored) -> ParallelModel:
            model = build(stored.info, stored.folder)
            if not untrained:
                fill(stored, {weights: model.shards}, model=stored.info["model"])
            return model

        if is_exported(path):
            exported, place = Exported.open(path), open_folder(path)
            info, model = exported.info, build(exported.info, place)
            if not untrained:
                exported.fill(model.shards)
        else:
            stored, model = load_named(path, load)
            info, place = stored.info, stored.folder
        vae, text = _encoders(info["dataset"], place)
        return cls(
            model=model.module.eval().requires_grad_(False),
            shape=_shape(info["model"], place),
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
        """Each prompt's latent [channels, t, h, w]: all prompts in one pack, and without their text once more
        beside them where there is guidance, so that a velocity is one forward pass."""
        texts = self.text.encode([prompt.text for prompt in prompts])
        no_texts = self.text.encode([""]) * len(prompts)
        counts = torch.tensor([token_count(prompt.latent_shape, self.shape.patch) for prompt in prompts])
        first_tokens = counts.cumsum(0) - counts
        # Every sample walks its own grid of times, since the shift depends on its size.
        grids = torch.tensor([time_grid(drawing.steps, shift_for(n, self.shift_base_tokens)) for n in counts.tolist()])
        times = grids.repeat_interleave(counts, dim=0).T[..., None]  # [steps + 1, tokens, 1]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            latents, sample_times = self._unpack(x, prompts), t[first_tokens, 0].tolist()
            if drawing.guidance == 1:
                return self._velocity(latents, texts, sample_times)
            both = self._velocity(latents * 2, texts + no_texts, sample_times * 2)
            conditional, unconditional = both.chunk(2)
            return guided(conditional, unconditional, drawing.guidance)

        noise = torch.cat([patchify(self._noise(prompt), self.shape.patch) for prompt in prompts])
        return self._unpack(integrate(velocity, noise, times=list(times), solver=drawing.solver), prompts)

    def _unpack(self, tokens: Tensor, prompts: Sequence[Prompt]) -> list[Tensor]:
        shapes = [prompt.latent_shape for prompt in prompts]
        parts = tokens.split([token_count(shape, self.shape.patch) for shape in shapes])
        return [unpatchify(part, shape, self.shape.patch) for part, shape in zip(parts, shapes, strict=True)]

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
    check_place(output)
    shape = latent_shape(config.frames, config.height, config.width)
    torch.set_num_threads(config.threads)
    pipeline = Pipeline.from_checkpoint(Path(config.checkpoint), weights=config.weights)
    drawing = Drawing(config.steps, config.guidance, config.solver)
    clip = pipeline.frames([Prompt(config.prompt, config.seed, shape)], drawing)[0]
    write_media(output, clip, config.fps)
    return {
        "output": str(output),
        "prompt": config.prompt,
        "seed": config.seed,
        "frames": len(clip),
        "checkpoint_step": pipeline.step,
        "seconds": round(time.monotonic() - began, 2),
    }


def check_place(path: Path) -> None:
    """Refuse, before minutes are spent on it, a file that could not be written in the end.

    Raises:
        MediaError: it is a folder, or its folder is a file or not ours to write in.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"{folder} is no folder that can be written to"
        raise MediaError(f"{path} cannot be written: {reason}; choose another output")


def _shape(about: dict[str, Any], checkpoint: Folder) -> ModelShape:
    """The model a checkpoint holds."""
    values = {name: value for name, value in about.items() if name != "size"}
    shape = ModelShape(**{**values, "patch": tuple(values["patch"])})
    if shape.text_width is None:
        raise CheckpointError(f"{checkpoint} holds a class-conditional model; sampling needs one that takes prompts")
    return shape


def _encoders(dataset: dict[str, Any], checkpoint: Folder) -> tuple[str, str]:
    """Where the VAE and the text encoder of a checkpoint's data set are."""
    if "vae" not in dataset or "text" not in dataset:
        raise CheckpointError(
            f"{checkpoint} does not say which encoders its weights go with; name them: "
            "`goku-mega checkpoint import ... vae=... text=...`"
        )
    vae, text = dataset["vae"], dataset["text"]
    if content_key(vae) != dataset["vae_key"]:
        raise CheckpointError(
            f"{checkpoint} was trained on latents of the VAE {vae!r}, whose weights are gone or have changed; "
            "put them back, or encode and train again"
        )
    inside = _inside(dataset["path"], text)
    if text == TEXT_ENCODER and inside is None:
        gone = f"{dataset['path']}/{text}"
        raise CheckpointError(f"{checkpoint} needs its data set's text encoder, but {gone} is gone; encode again")
    return vae, text if inside is None else str(inside)


def _inside(place: str, text: str) -> Path | None:
    """A text encoder that lies in a data set."""
    local = local_path(place)
    if local is not None:
        folder = local / text
        return folder if folder.exists() else None
    return _fetched(place) if text == TEXT_ENCODER else None


@functools.cache
def _fetched(place: str) -> Path | None:
    """The text encoder of a data set behind a URL, copied for as long as the process lives."""
    copy = tempfile.mkdtemp(prefix="goku_mega_text_")
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    return fetch_folder(place, TEXT_ENCODER, Path(copy))
