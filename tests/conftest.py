"""Fixtures that tests of several packages share."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import launch  # noqa: F401 - it tells the fork server what to load, before any test starts it

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Writes run folders as training leaves them: real encoders, and a small model with random weights.

    Training starts from a model whose velocity is 0; weights drawn at random make every input count.
    Changes given by name replace parts of what the checkpoint says of itself.
    """
    import torch

    from goku_mega.checkpoint.save import save_checkpoint
    from goku_mega.data.encode import TEXT_ENCODER
    from goku_mega.encoders.text import TINY_WIDTH, build_tiny_text_encoder
    from goku_mega.encoders.vae import content_key, load_vae
    from goku_mega.model.sizes import ModelShape
    from goku_mega.parallel.groups import single_process_groups
    from goku_mega.parallel.parallelize import build_model

    data = tmp_path_factory.mktemp("data")
    captions = [f"a {color} {thing} moving {way}" for color in ("red", "blue") for thing in ("circle", "square")
                for way in ("left", "right")]  # fmt: skip
    build_tiny_text_encoder(captions, data / TEXT_ENCODER, seed=0)
    channels = load_vae("tiny").latent_channels
    shape = ModelShape(
        layers=2, hidden_size=48, ffn_hidden_size=96, heads=2, latent_channels=channels, text_width=TINY_WIDTH
    )

    def make(*, shape: ModelShape = shape, shift_base_tokens: int = 0, **dataset: str) -> Path:
        run_dir = tmp_path_factory.mktemp("run")
        state: dict[str, Any] = {}
        for number, part in enumerate(("model", "ema")):
            state[part] = build_model(shape, single_process_groups(), seed=0, fsdp=False).shards
            generator = torch.Generator().manual_seed(number)
            for shard in state[part].values():
                shard.tensor.add_(0.1 * torch.randn(shard.tensor.shape, generator=generator))
        info = {
            "run": {"seed": 0, "flow": {"shift_base_tokens": shift_base_tokens}},
            "model": {"size": "tiny", **asdict(shape)},
            "dataset": {"path": str(data), "vae": "tiny", "vae_key": content_key("tiny"), "text": TEXT_ENCODER,
                        **dataset},
        }  # fmt: skip
        save_checkpoint(run_dir / "checkpoints", 7, state, info, keep=1)
        return run_dir

    return make
