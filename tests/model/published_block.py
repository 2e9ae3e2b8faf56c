"""A plain torch twin of the authors' block, written from its description: the parity tests' other side.

One sample at a time, no packing, weights under the published names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class PlainRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.weight


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = PlainRMSNorm(width), PlainRMSNorm(width)

    def forward(self, x: Tensor, context: Tensor, cos: Tensor, sin: Tensor, rotate_key: bool) -> Tensor:
        """x: [samples, tokens, width], context: [samples, keys, width]; cos, sin: [tokens, head_dim / 2]."""
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(context)), self.v_proj(context)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        q = _rotate_pairs(q, cos, sin)
        k = _rotate_pairs(k, cos, sin) if rotate_key else k
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.unflatten(-1, (-1, 2)).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    turned = torch.view_as_complex(wide) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class PlainModulation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)


class PlainMLP(nn.Module):
    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ffn_width), nn.Linear(ffn_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PublishedBlock(nn.Module):
    def __init__(self, width: int, heads: int, ffn_width: int) -> None:
        super().__init__()
        self.norm1 = PlainModulation(width)
        self.attn1 = PlainAttention(width, heads)
        self.norm2 = PlainRMSNorm(width)
        self.attn2 = PlainAttention(width, heads)
        self.norm3 = PlainRMSNorm(width)
        self.mlp = PlainMLP(width, ffn_width)

    def forward(self, x: Tensor, text: Tensor, embedding: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [samples, tokens, width]; text: [samples, text_tokens, width]; embedding: [samples, width]."""
        rows = self.norm1.linear(F.silu(embedding))[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = rows
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale_attn) + shift_attn
        x = x + gate_attn * self.attn1(normed, normed, cos, sin, rotate_key=True)
        x = x + self.attn2(self.norm2(x), text, cos, sin, rotate_key=False)
        return x + gate_mlp * self.mlp(self.norm3(x) * (1 + scale_mlp) + shift_mlp)


def random_weights(block: nn.Module, seed: int) -> None:
    """Weights far from their initial zeros and ones, so that every term counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 and "norm" in name else 0.08 * noise)
