"""How pixels, positions, noise levels and labels become tokens and conditions."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.ops.backend.register import compute_dtype
from dbkernels.settings import check_choice

PositionOrder = Literal["sin_cos", "cos_sin"]
Frequencies = Literal["open", "closed"]

FREQUENCIES = 256  # width of the sinusoid that embeds a noise level
MAX_PERIOD = 10000.0  # longest wavelength of that sinusoid, over 2 pi


def patchify(image: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, T, patch * patch * C), patches in reading order, channels last."""
    B, C, H, W = image.shape
    x = image.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """(B, T, patch * patch * C) -> (B, C, H, W), square; the inverse of `patchify`."""
    B, T, _ = tokens.shape
    side = math.isqrt(T)
    x = tokens.reshape(B, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, channels, side * patch, side * patch)


def sinusoid(
    value: Tensor, dim: int, frequencies: Frequencies = "open", *, max_period: float = MAX_PERIOD
) -> Tensor:
    """Cosines, then sines, of a number at `dim / 2` geometric frequencies from 1 downward.

    Args:
        value:        (...)  float32
        dim:          even; at least 4 where closed
        frequencies:  open ends one frequency before 1 / max_period, closed ends there
    Returns:
        (..., dim) float32.
    """
    half = dim // 2
    gaps = half if frequencies == "open" else half - 1
    exponent = torch.arange(half, device=value.device, dtype=torch.float32) / gaps
    angle = value.float()[..., None] * max_period**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_positions(
    side: int,
    D: int,
    order: PositionOrder = "sin_cos",
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Fixed sine and cosine positions of a square grid: half the width each, of column, then row.

    `get_2d_sincos_pos_embed` of He et al. 2021 (arXiv:2111.06377), which the published DiT took.

    Args:
        side:   cells in a row and in a column
        D:      a multiple of 4
        order:  of each half: sin_cos, as published, or cos_sin
        device: of the result
    Returns:
        (side * side, D) float32, in reading order.
    Raises:
        ValueError: D is not a multiple of 4, or the order is unknown.
    """
    if D % 4:
        raise ValueError(f"grid positions need a width that 4 divides, got {D}")
    check_choice("positions", order, get_args(PositionOrder))
    table = sinusoid(torch.arange(side, dtype=torch.float32, device=device), D // 2)
    if order == "sin_cos":
        table = table.roll(D // 4, dims=-1)
    columns, rows = (t.expand(side, side, D // 2) for t in (table, table[:, None]))
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class Linear(nn.Linear):
    """A linear map of numbers that may be wider or narrower than its weight, as pixels may be."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out), in the dtype of the weight or in autocast's."""
        return super().forward(x.to(compute_dtype(x, self.weight)))


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> condition (B, cond_dim): sinusoid, Linear, SiLU, Linear."""

    def __init__(self, cond_dim: int, frequencies: Frequencies = "open"):
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = Linear(FREQUENCIES, cond_dim)
        self.fc2 = nn.Linear(cond_dim, cond_dim)
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, c_noise: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(sinusoid(c_noise, FREQUENCIES, self.frequencies))))


class VectorEmbedding(nn.Module):
    """A vector (B, D_in) -> condition (B, cond_dim): Linear, SiLU, Linear."""

    def __init__(self, width: int, cond_dim: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, cond_dim), nn.Linear(cond_dim, cond_dim)
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, vector: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(vector)))


class FinalModulation(nn.Module):
    """(1 + scale) * x + shift from a condition, without a norm; starts as the identity.

    silu says whether silu follows the projection too, as `LayerConfig.silu_modulation`.
    """

    def __init__(self, D: int, cond_dim: int, *, silu: bool = False):
        super().__init__()
        self.silu = silu
        self.linear = nn.Linear(cond_dim, 2 * D)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, D), c (B, cond_dim)."""
        shift, scale = self.parts(c)
        return (1 + scale) * x + shift

    def parts(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """shift and scale, (B, D) each, for a norm that modulates in the same pass."""
        projected = self.linear(F.silu(c))
        return (F.silu(projected) if self.silu else projected).chunk(2, dim=-1)
