"""Stand-ins for the block of the published DiT and its parts, as timm makes them, to be varied."""

import torch
import torch.nn.functional as F
from torch import nn

D, H, HIDDEN, COND = 12, 3, 20, 7


class Attention(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.num_heads, self.scale = H, (D // H) ** -0.5
        self.qkv = nn.Linear(D, 3 * D, bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.proj = nn.Linear(D, D, bias)

    def turned(self, q, k):
        return q, k

    def forward(self, x):
        B, T, _ = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.turned(self.q_norm(q), self.k_norm(k))
        weights = self.attn_drop((q * self.scale @ k.mT).softmax(-1))
        x = (weights @ v).transpose(1, 2).reshape(B, T, D)
        return self.proj_drop(self.proj(self.norm(x)))


class Mlp(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(D, HIDDEN, bias)
        self.act = nn.GELU(approximate="tanh")
        self.drop1, self.norm, self.drop2 = nn.Dropout(0.0), nn.Identity(), nn.Dropout(0.0)
        self.fc2 = nn.Linear(HIDDEN, D, bias)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Gated(Mlp):
    """As timm's GluMlp: one half times the activation of the other."""

    def __init__(self, gate_last=False):
        super().__init__()
        self.fc1, self.act, self.gate_last = nn.Linear(D, 2 * HIDDEN), nn.SiLU(), gate_last

    def forward(self, x):
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(a * self.act(b) if self.gate_last else self.act(a) * b)


class Block(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.norm1, self.norm2 = (
            nn.LayerNorm(D, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.attn, self.mlp = Attention(bias), Mlp(bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(COND, 6 * D))

    def forward(self, x, c):
        parts = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        return x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])


class Functional(Block):
    """Whose norms and activation are functions of its forward."""

    eps, approximate = 1e-6, "tanh"

    def __init__(self):
        super().__init__()
        del self.norm1, self.norm2, self.mlp.act

    def forward(self, x, c):
        parts = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        for branch, (shift, scale, gate) in zip(
            (self.attn, self.feed_forward), (parts[:3], parts[3:]), strict=True
        ):
            normed = F.layer_norm(x, (D,), eps=self.eps)
            x = x + gate * branch(normed * (1 + scale) + shift)
        return x

    def feed_forward(self, x):
        return self.mlp.fc2(F.gelu(self.mlp.fc1(x), approximate=self.approximate))


class Exact(Functional):
    approximate = "none"


class OtherEps(Functional):
    eps = 1e-5


class Parallel(Block):
    """Both branches read the block's input."""

    def forward(self, x, c):
        parts = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        a = self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        return x + parts[2] * a + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])


class ScaleFirst(Block):
    """Another order of the modulation."""

    def forward(self, x, c):
        parts = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[0]) + parts[1])
        return x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[3]) + parts[4])


class Tuple(Block):
    def forward(self, x, c):
        return super().forward(x, c), None


class Rotated(Attention):
    """Positions in the attention's forward, which no part shows."""

    def turned(self, q, k):
        angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None]
        return q * angle.cos() - q.roll(1, -1) * angle.sin(), k * angle.cos()


class TwoHeads(Attention):
    """Its attribute says another number of heads than it computes with."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.scale = (D // 2) ** -0.5

    def forward(self, x):
        self.num_heads = H
        try:
            return super().forward(x)
        finally:
            self.num_heads = 2


class Causal(Attention):
    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class OwnRMSNorm(nn.Module):
    """Of a package that has its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D // H))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * self.gamma


class LoRALinear(nn.Linear):
    def __init__(self):
        super().__init__(D, 3 * D)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, 3 * D, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))
