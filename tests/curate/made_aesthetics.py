"""A real CLIP, tiny and untrained, with a linear head that was fitted to tell bright scenes from dark ones."""

from pathlib import Path

import numpy as np
import torch
from made_corpus import BRIGHT, DARK, MIDDLE, P480, grey_scene
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from goku_mega.config.curation import AestheticConfig
from goku_mega.curate.networks.features import ClipFeatures

SCORES = {DARK: 4.0, MIDDLE: 4.4, BRIGHT: 4.8}
"""On either side of table 4's 4.3 and 4.5."""


def write_aesthetics(folder: Path) -> AestheticConfig:
    """Write model and head; their configuration. The head has seen other scenes than it will be asked about."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16,
        projection_dim=24,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "clip")
    features = ClipFeatures(str(folder / "clip"), torch.device("cpu"))
    seen = [(level, seed) for level in SCORES for seed in range(100, 140)]
    rows = features([grey_scene(level, seed).at(P480) for level, seed in seen]).double().numpy()
    wanted = np.array([SCORES[level] for level, _ in seen])
    with_bias = np.c_[rows, np.ones(len(rows))]
    ridge = with_bias.T @ with_bias + 1e-6 * np.eye(with_bias.shape[1])
    solution = np.linalg.solve(ridge, with_bias.T @ wanted)
    weights = {"weight": solution[:-1].astype(np.float32)[None], "bias": solution[-1:].astype(np.float32)}
    save_file({name: torch.from_numpy(value.copy()) for name, value in weights.items()}, folder / "head.safetensors")
    return AestheticConfig(clip=str(folder / "clip"), head=str(folder / "head.safetensors"))
