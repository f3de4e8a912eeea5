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


def axis_table(positions: Tensor, head_dim: int, *, base: float = 10000.0) -> Tensor:
    """`rotary_table` of places along several axes, of which each turns an equal part of the pairs.

    Args:
        positions:  (T, axes)  any number type
        head_dim:   a multiple of 2 axes
    Returns:
        (2, T, head_dim) float32, each half repeated.
    Raises:
        ValueError: the axes do not divide the pairs.
    """
    axes = positions.shape[1]
    if head_dim % (2 * axes):
        raise ValueError(f"{axes} axes need a head width that {2 * axes} divides, got {head_dim}")
    width = head_dim // axes
    each = [rotary_table(positions[:, axis], width, base=base) for axis in range(axes)]
    half = torch.cat([table[..., : width // 2] for table in each], dim=-1)
    return torch.cat([half, half], dim=-1)
