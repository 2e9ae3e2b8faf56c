"""Training of a small CogVideoX VAE on a corpus: the codec of the quickstart.

Three stages of cost: crops of single images, crops of clips, whole clips. Every batch is a function
of (seed, step), and the run's state is saved as it goes, so a killed run ends with the same weights.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from goku_mega.config.training import VaeRun
from goku_mega.errors import DataError
from goku_mega.media.decode import decode_media
from goku_mega.seeding import derive_seed
from goku_mega.train.metrics import cut_from

logger = logging.getLogger(__name__)

EMA_DECAY = 0.995
MAX_GRAD_NORM = 1.0
EDGE_WEIGHT = 0.5
FINAL_RATE_FRACTION = 0.02
STATISTICS_CLIPS = 256


class Stage(NamedTuple):
    """A part of the run with batches of one shape."""

    until: float
    """End of the stage as a share of all steps."""
    samples: float
    """Samples of a batch, in multiples of `batch_samples`."""
    frames: int | None
    """Frames of a sample; None: the run's."""
    crop_px: int | None
    """Side of a square crop; None: the whole picture."""


# A crop of 32 px costs a quarter of a 64 px clip and teaches the same edges; the last stage shows
# the group norms whole pictures.
STAGES = (Stage(0.25, 4, 1, 32), Stage(0.85, 1, None, 32), Stage(1.0, 0.375, None, None))


def train_vae(run: VaeRun) -> dict[str, Any]:
    """Train, then write `config.json` and fp16 safetensors to `run.output`, as diffusers loads them.

    Raises:
        DataError: the corpus is missing, or has no clip of `run.frames` frames.
    """
    torch.set_num_threads(run.threads)
    clips = load_clips(Path(run.corpus), run.frames)
    output = Path(run.output)
    output.mkdir(parents=True, exist_ok=True)
    vae = build_vae(run)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = VaeOptimizer(vae)
    start = _resume(output / "state.pt", vae, average, optimizer)
    cut_from(output / "metrics.jsonl", start)
    began = time.monotonic()
    for step in range(start, run.steps):
        loss, error = train_step(vae, draw_batch(clips, run, step), run, step)
        optimizer.step(_learning_rate(run, step))
        average.update_parameters(vae)
        if (step + 1) % 25 == 0:
            row = {"step": step, "loss": loss, "error_of_255": 127.5 * error, "seconds": time.monotonic() - began}
            logger.info("vae step %(step)d loss %(loss).4f error %(error_of_255).2f/255 %(seconds).0f s", row)
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if (step + 1) % run.resume_every_steps == 0:
            _save_state(output / "state.pt", step + 1, vae, average, optimizer)
            _export(average.module, clips, output)
    return _export(average.module, clips, output)


def train_step(vae: Any, x: Tensor, run: VaeRun, step: int) -> tuple[float, float]:
    """The gradients on pixels x [samples, 3, frames, height, width] in [-1, 1]; the loss and the mean error."""
    generator = torch.Generator().manual_seed(derive_seed(run.seed, "posterior", step))
    # bf16 products are four times as fast as fp32 on CPUs that have them; norms and losses stay in fp32.
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
        # A decoder that has seen disturbed latents forgives the small errors of the ones that are sampled.
        spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        disturbance = (std.square() + (run.latent_noise * spread).square()).sqrt()
        latent = mean + disturbance * torch.randn(mean.shape, generator=generator)
        decoded = vae.decode(latent).sample.float()
    error = F.l1_loss(decoded, x)
    edges = F.l1_loss(decoded.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(decoded.diff(dim=-2), x.diff(dim=-2))
    divergence = 0.5 * (mean.square() + std.square() - 1 - logvar).mean()
    loss = error + EDGE_WEIGHT * edges + run.kl_weight * divergence
    vae.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), MAX_GRAD_NORM)
    return loss.item(), error.item()


class VaeOptimizer:
    """Muon for the kernels, flattened to matrices, and Adam for the vectors: half the steps of Adam alone here."""

    def __init__(self, vae: Any) -> None:
        self.kernels = [p for p in vae.parameters() if p.dim() > 1]
        self.matrices = [nn.Parameter(p.data.flatten(1)) for p in self.kernels]  # the same memory
        self.muon = torch.optim.Muon(self.matrices, lr=1.0, weight_decay=0.0)
        self.adam = torch.optim.Adam([p for p in vae.parameters() if p.dim() <= 1], lr=1.0, betas=(0.9, 0.99))

    def step(self, learning_rate: float) -> None:
        """Update from the gradients; `learning_rate` is Muon's, Adam's is a tenth."""
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer, rate in ((self.muon, learning_rate), (self.adam, learning_rate / 10)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def build_vae(run: VaeRun) -> Any:
    """A small CogVideoX VAE with the real strides, its weights drawn from the seed."""
    from diffusers import AutoencoderKLCogVideoX

    levels = len(run.block_channels)
    torch.manual_seed(derive_seed(run.seed, "vae"))  # diffusers draws from the global generator
    return AutoencoderKLCogVideoX(
        block_out_channels=run.block_channels,
        latent_channels=run.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        temporal_compression_ratio=4,
        sample_height=64,
        sample_width=64,
    )


def load_clips(corpus: Path, frames: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Every video of the corpus with `frames` frames or more, [frames, height, width, 3] each."""
    captions = corpus / "captions.jsonl"
    if not captions.exists():
        raise DataError(f"{captions} is missing; write a corpus with `goku-mega corpus shapes --output {corpus}`")
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    videos = [decode_media(corpus / row["file"]) for row in rows if row["kind"] == "video"]
    clips = [video for video in videos if len(video) >= frames]
    if not clips:
        raise DataError(f"{corpus} has no video of {frames} frames or more")
    return clips


def draw_batch(clips: list[np.ndarray[Any, np.dtype[np.uint8]]], run: VaeRun, step: int) -> Tensor:
    """The batch of a step: [samples, 3, frames, height, width] in [-1, 1]; mirrored at random."""
    stage = next(stage for stage in STAGES if step < stage.until * run.steps)
    rng = np.random.default_rng(derive_seed(run.seed, "vae batch", step))
    frames = stage.frames or run.frames
    pieces: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for clip in _draw(clips, rng):
        start = int(rng.integers(len(clip) - frames + 1))
        piece = clip[start : start + frames]
        if stage.crop_px is not None:
            top, left = (int(rng.integers(size - stage.crop_px + 1)) for size in piece.shape[1:3])
            piece = piece[:, top : top + stage.crop_px, left : left + stage.crop_px]
        if pieces and piece.shape != pieces[0].shape:
            continue
        if rng.random() < 0.5:
            piece = piece[:, :, ::-1]
        pieces.append(piece)
        if len(pieces) == max(1, int(stage.samples * run.batch_samples)):
            break
    x = torch.from_numpy(np.stack(pieces)).permute(0, 4, 1, 2, 3)
    return x.float() / 127.5 - 1


def _draw(clips: list[np.ndarray[Any, np.dtype[np.uint8]]], rng: np.random.Generator) -> Iterator[Any]:
    while True:
        yield clips[int(rng.integers(len(clips)))]


def _learning_rate(run: VaeRun, step: int) -> float:
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    progress = (step - run.warmup_steps) / (run.steps - run.warmup_steps)
    cosine = 0.5 * (1 + np.cos(np.pi * progress))
    return float(run.learning_rate * (FINAL_RATE_FRACTION + (1 - FINAL_RATE_FRACTION) * cosine))


def _resume(path: Path, vae: Any, average: Any, optimizer: VaeOptimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    vae.load_state_dict(state["vae"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("resumed from %s at step %d", path, state["step"])
    return int(state["step"])


def _save_state(path: Path, step: int, vae: Any, average: Any, optimizer: VaeOptimizer) -> None:
    temporary = path.with_suffix(".tmp")
    parts = {"vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"step": step, **parts}, temporary)
    temporary.replace(path)


@torch.no_grad()
def _export(vae: Any, clips: list[np.ndarray[Any, np.dtype[np.uint8]]], output: Path) -> dict[str, Any]:
    """Write the weights with the statistics that bring each latent channel to mean 0 and deviation 1."""
    from diffusers import AutoencoderKLCogVideoX

    usual = Counter(clip.shape for clip in clips).most_common(1)[0][0]
    chosen = [clip for clip in clips if clip.shape == usual][:STATISTICS_CLIPS]
    x = torch.from_numpy(np.stack(chosen)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(8)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    # Private entries name the settings that were left at their defaults, and would put them back.
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    exported = AutoencoderKLCogVideoX.from_config(
        {**settings, "latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 1.0}
    )
    exported.load_state_dict(vae.state_dict())
    exported.half().save_pretrained(output)
    return {"output": str(output), "parameters": sum(p.numel() for p in vae.parameters())}
