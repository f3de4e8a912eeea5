"""Modules of each class that `fuse` knows, with random weights, and arguments for them."""

import importlib
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from convert import published
from convert.published import COND, Block, D, H
from convert.variations import VARIATIONS
from models.tiny import randomise
from torch import Tensor, nn

B, T = 3, 5
WIDE = 6  # of a head that is turned: the order of 4 elements would be its own inverse
EXTRA = "is not installed: pip install 'dbkernels[convert]'"


class Case(NamedTuple):
    module: nn.Module
    given: tuple[object, ...]
    """Arguments of a call; of tensors of floats a gradient is wanted."""


def rows(*shape: int) -> Tensor:
    """Whose mean is far from zero."""
    return torch.randn(shape) + 1


def real(module: str):
    """A library's module, or a skip."""
    return pytest.importorskip(module, reason=f"{module.partition('.')[0]} {EXTRA}")


def dit_block(*names: str) -> Case:
    block = Block()
    for name in names:
        VARIATIONS[name][0](block)
    return Case(randomise(block), (rows(B, T, D), rows(B, COND)))


def one_condition_for_all() -> Case:
    return Case(randomise(published.Block()), (rows(B, T, D), rows(1, COND)))


# LightningDiT's layer, by its formulas


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Rotary(nn.Module):
    """Positions of side ** 2 tokens, neighbours by one angle."""

    def __init__(self, side: int, d: int):
        super().__init__()
        frequency = 1 / 100 ** (torch.arange(0, d, 2) / d)
        angles = (torch.arange(side**2)[:, None] * frequency).repeat_interleave(2, -1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, t):
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
        return t * self.freqs_cos + turned * self.freqs_sin


class Turning(published.Attention):
    def __init__(self, qk_norm: bool):
        super().__init__()
        self.num_heads, self.scale = D // WIDE, WIDE**-0.5
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(WIDE, 1e-4), RMSNorm(WIDE, 1e-4)

    def forward(self, x, rope=None):
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, -1, WIDE).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (q, k) if rope is None else (rope(q).to(v), rope(k).to(v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class SwiGLUFFN(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(D, 2 * hidden), nn.Linear(hidden, D)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LightningDiTBlock(nn.Module):
    def __init__(self, *, rms: bool, qk_norm: bool, swiglu: bool, shift: bool):
        super().__init__()
        self.norm1, self.norm2 = (
            RMSNorm(D) if rms else nn.LayerNorm(D, 1e-6, False) for _ in range(2)
        )
        self.attn = Turning(qk_norm)
        self.mlp = SwiGLUFFN(7) if swiglu else published.Mlp()
        self.wo_shift = not shift
        width = 6 * D if shift else 4 * D
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(COND, width))

    def forward(self, x, c, feat_rope=None):
        parts = self.adaLN_modulation(c)[:, None]
        if self.wo_shift:
            scale1, gate1, scale2, gate2 = parts.chunk(4, -1)
            shift1 = shift2 = 0
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope=feat_rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def lightning(*, rms=True, qk_norm=True, swiglu=True, shift=True, turned=True) -> Case:
    block = LightningDiTBlock(rms=rms, qk_norm=qk_norm, swiglu=swiglu, shift=shift)
    rope = Rotary(2, WIDE) if turned else None
    return Case(randomise(block), (rows(B, 4, D), rows(B, COND), rope))


# timm's layer of a ViT, by its formulas and the real one


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    def __init__(self, *, scales: bool, bias: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D, 1e-6), nn.LayerNorm(D, 1e-3)
        self.attn, self.mlp = published.Attention(bias), published.Mlp()
        self.mlp.act = nn.GELU()
        self.ls1, self.ls2 = (Scale() if scales else nn.Identity() for _ in range(2))
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def vit(*, scales=True, bias=True) -> Case:
    return Case(randomise(ViTBlock(scales=scales, bias=bias)), (rows(B, T, D),))


def timm_block(*given, rms=False, **told) -> Case:
    layers = real("timm.models.vision_transformer")
    if rms:
        told["norm_layer"] = importlib.import_module("timm.layers").RmsNorm
    return Case(randomise(layers.Block(D, H, **told)), (rows(B, T, D), *given))


# diffusers' layer with self-attention alone


def basic(norm_type: str, **told) -> Case:
    kind = real("diffusers.models.attention").BasicTransformerBlock
    told = {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False, **told}
    if norm_type == "ada_norm_zero":
        told["num_embeds_ada_norm"] = 4
    block = kind(D, H, D // H, norm_type=norm_type, **told)
    if norm_type == "ada_norm_single":
        return Case(randomise(block), (rows(B, T, D), None, None, None, rows(B, 6 * D)))
    step, label = torch.tensor([3, 700, 41]), torch.tensor([2, 0, 1])
    randomise(block)
    randomise(block.norm1.emb, std=0.05)  # else 256 sines make a scale of a hundred
    return Case(block, (rows(B, T, D), None, None, None, step, None, label))


# diffusers' layers of two streams


def joint(**told) -> Case:
    kind = real("diffusers.models.attention").JointTransformerBlock
    block = randomise(kind(D, H, D // H, **told))
    return Case(block, (rows(B, T, D), rows(B, T + 2, D), rows(B, D)))


def flux(*, turned: bool) -> Case:
    kind = real("diffusers.models.transformers.transformer_flux").FluxTransformerBlock
    block, angles = randomise(kind(D, H, D // H)), torch.randn(2 * T + 2, D // H // 2)
    angles = angles.repeat_interleave(2, dim=-1)
    positions = (angles.cos(), angles.sin()) if turned else None
    return Case(block, (rows(B, T, D), rows(B, T + 2, D), rows(B, D), positions))


def cross(*, masked: bool = True, **told) -> Case:
    """PixArt's, whose text may be shorter in some samples."""
    single = basic("ada_norm_single", attention_bias=True, cross_attention_dim=10, **told)
    x, _, _, _, timestep = single.given
    mask = torch.arange(4) < torch.tensor([1, 4, 3])[:, None, None]
    return Case(single.module, (x, None, rows(B, 4, 10), mask if masked else None, timestep))


def flux_single() -> Case:
    kind = real("diffusers.models.transformers.transformer_flux").FluxSingleTransformerBlock
    block = randomise(kind(D, H, D // H, mlp_ratio=1.5))
    return Case(block, (rows(B, T, D), rows(B, 2, D), rows(B, D)))


CASES = {
    "DiTBlock": dit_block,
    "DiTBlock, one c for all": one_condition_for_all,
    "DiTBlock, affine rms, qk-norm": lambda: dit_block(
        "affine rms norms", "rms of q and k, other eps"
    ),
    "DiTBlock, affine, exact GELU": lambda: dit_block("affine norms", "exact gelu"),
    "DiTBlock, SwiGLU": lambda: dit_block("gated", "no bias of qkv", "eps of one norm"),
    "DiTBlock, wide heads": lambda: dit_block("wide heads", "no bias of fc2"),
    "DiTBlock, functions": lambda: dit_block("functions"),
    "LightningDiTBlock": lightning,
    "LightningDiTBlock, not turned": lambda: lightning(turned=False),
    "LightningDiTBlock, layer norm, GELU": lambda: lightning(
        rms=False, swiglu=False, qk_norm=False
    ),
    "LightningDiTBlock, no shift": lambda: lightning(shift=False, qk_norm=False),
    "ViT's Block": vit,
    "ViT's Block, no layer scale": lambda: vit(scales=False, bias=False),
    "timm's Block": lambda: timm_block(qkv_bias=True, init_values=0.1),
    "timm's Block, causal, rms": lambda: timm_block(None, True, qk_norm=True, rms=True),
    "BasicTransformerBlock, zero": lambda: basic("ada_norm_zero", attention_bias=True),
    "BasicTransformerBlock, zero, affine": lambda: basic(
        "ada_norm_zero", norm_elementwise_affine=True, activation_fn="gelu"
    ),
    "BasicTransformerBlock, single": lambda: basic("ada_norm_single", attention_bias=True),
    "BasicTransformerBlock, single, affine": lambda: basic(
        "ada_norm_single", norm_elementwise_affine=True, norm_eps=1e-3
    ),
    "JointTransformerBlock": joint,
    "JointTransformerBlock, dual, qk-norm": lambda: joint(
        qk_norm="rms_norm", use_dual_attention=True
    ),
    "JointTransformerBlock, pre-only, qk-norm": lambda: joint(
        qk_norm="rms_norm", context_pre_only=True
    ),
    "FluxTransformerBlock": lambda: flux(turned=True),
    "FluxTransformerBlock, not turned": lambda: flux(turned=False),
    "BasicTransformerBlock, cross": cross,
    "BasicTransformerBlock, cross, affine, no mask": lambda: cross(
        masked=False, norm_elementwise_affine=True, norm_eps=1e-3
    ),
    "FluxSingleTransformerBlock": flux_single,
}


class Network(nn.Module):
    """A model that somebody else wrote: an embedding, layers and a head."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.embed, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        self.blocks = nn.ModuleList(layers)

    def forward(self, x, *given):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, *given)
        return self.head(x)
