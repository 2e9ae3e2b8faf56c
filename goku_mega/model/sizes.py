"""The sizes of the Goku family (paper Table 1) as plain numbers. No torch here."""

from dataclasses import dataclass, replace

from goku_mega.errors import ConfigError

FLAN_T5_XL_WIDTH = 2048
IMAGENET_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that decides the names and shapes of the parameters."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    latent_channels: int = 16
    """Channels of the VAE's latent."""
    text_width: int | None = FLAN_T5_XL_WIDTH
    """Width of the text embeddings; None: conditioned on a class, without cross-attention."""
    classes: int | None = None
    """Number of classes of a class-conditional model."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent cells (t, h, w) that make one token."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one token's patch: channels x cells."""
        t, h, w = self.patch
        return self.latent_channels * t * h * w


SIZES: dict[str, ModelShape] = {
    "tiny": ModelShape(layers=4, hidden_size=128, ffn_hidden_size=512, heads=4, text_width=64),
    "pilot-1b": ModelShape(
        layers=28, hidden_size=1152, ffn_hidden_size=4608, heads=16, text_width=None, classes=IMAGENET_CLASSES
    ),
    "1b": ModelShape(layers=28, hidden_size=1152, ffn_hidden_size=4608, heads=16),
    "2b": ModelShape(layers=28, hidden_size=1792, ffn_hidden_size=7168, heads=28),
    "8b": ModelShape(layers=40, hidden_size=3072, ffn_hidden_size=12288, heads=48),
}


def model_shape(size: str, *, latent_channels: int | None = None, text_width: int | None = None) -> ModelShape:
    """The shape of `size`, fitted to a data set's latent channels and text width where given.

    Raises:
        ConfigError: no such size.
    """
    if size not in SIZES:
        raise ConfigError(f"size {size!r} is not one of {', '.join(SIZES)}")
    shape = SIZES[size]
    if latent_channels is not None:
        shape = replace(shape, latent_channels=latent_channels)
    if text_width is not None and shape.text_width is not None:
        shape = replace(shape, text_width=text_width)
    return shape
