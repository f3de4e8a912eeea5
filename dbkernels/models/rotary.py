"""Cosines and sines of rotary positions: Su et al. 2021 (arXiv:2104.09864)."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, *, base: float = 10000.0) -> Tensor:
    """Cosines and sines that turn the pairs (i, i + d / 2) of queries and keys.

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
