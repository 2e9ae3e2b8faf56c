"""The one FLOP formula: the batch planner, the utilisation figure and the memory plan use it. No torch.

Model FLOPs: a multiply and an add count two; recomputation, norms and activations count nothing.
"""

from goku_mega.model.sizes import ModelShape

TRAINING_PASSES = 3
"""Forward once, backward twice its products."""

TIMESTEP_FREQUENCIES = 256
"""Width of the timestep's sinusoids."""


def forward_flops(tokens: int, text_tokens: int, shape: ModelShape) -> int:
    """FLOPs of one sample's forward pass.

    Per layer, with s tokens, l text tokens and width d:
      self-attention projections 4 x 2 s d^2, scores and values 2 x 2 s^2 d,
      cross-attention query and output 2 x 2 s d^2, key and value 2 x 2 l d^2, scores and values 2 x 2 s l d,
      feed-forward 2 x 2 s d f, modulation 2 x 6 d^2.
    With f = 4 d and no text that is 24 s d^2 + 4 s^2 d and the sample's 12 d^2. Around the layers, with
    patches of p numbers: patches in and out 2 x 2 s p d, the captions' projection 2 l w d + 2 l d^2, and once
    a sample the timestep's two layers 2 x 256 d + 2 d^2 and the final modulation 2 x 2 d^2.
    """
    d, f = shape.hidden_size, shape.ffn_hidden_size
    layer = 8 * tokens * d * d + 4 * tokens * d * f + 12 * d * d
    outside = 4 * tokens * shape.patch_dim * d + 2 * TIMESTEP_FREQUENCIES * d + 6 * d * d
    if shape.text_width is not None:
        layer += 4 * tokens * d * d + 4 * text_tokens * d * d
        outside += 2 * text_tokens * d * (shape.text_width + d)
    return shape.layers * layer + outside + attention_flops(tokens, text_tokens, shape)


def attention_flops(tokens: int, text_tokens: int, shape: ModelShape) -> int:
    """The part of `forward_flops` that is scores and values: 4 s (s + l) d a layer."""
    keys = tokens + (text_tokens if shape.text_width is not None else 0)
    return shape.layers * 4 * tokens * keys * shape.hidden_size


def training_flops(tokens: int, text_tokens: int, shape: ModelShape) -> int:
    """FLOPs of one sample's forward and backward pass."""
    return TRAINING_PASSES * forward_flops(tokens, text_tokens, shape)
