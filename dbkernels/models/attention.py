"""Multi-head self-attention with optional rotary positions and normalised queries and keys.

    out = softmax(q k^T / sqrt(d)) v,    d = D / H

Vaswani et al. 2017 (arXiv:1706.03762); rotary positions: Su et al. 2021 (arXiv:2104.09864);
normalised q and k: Henry et al. 2020 (arXiv:2010.04245).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention over (B, T, D); qkv is one projection, in that order."""

    def __init__(self, D: int, H: int, *, qk_norm: bool = False, bias: bool = True):
        super().__init__()
        if D % H:
            raise ValueError(f"the width must be a multiple of the heads, got {D} and {H}")
        self.H = H
        self.qkv = nn.Linear(D, 3 * D, bias=bias)
        self.out = nn.Linear(D, D, bias=bias)
        self.q_norm = nn.RMSNorm(D // H, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D // H, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """x (B, T, D), rotary (2, T, D/H) of `rotary_table` or None for no rotation."""
        B, T, D = x.shape
        heads = self.qkv(x).view(B, T, 3, self.H, D // self.H)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(h.transpose(1, 2).reshape(B, T, D))


def rotary_table(positions: Tensor, head_dim: int, *, base: float = 10000.0) -> Tensor:
    """Cosines and sines for `rotate`.

    Args:
        positions:  (T,)  any number type
        head_dim:   D / H, even
        base:       wavelengths run from 2 pi to 2 pi * base tokens
    Returns:
        (2, T, head_dim) float32: cosines, then sines, each half repeated.
    Raises:
        ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head width, got {head_dim}")
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float()[:, None] * base ** (-exponent / head_dim)
    angle = torch.cat([angle, angle], dim=-1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x (..., T, d) by the angles of a table (2, T, d)."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
