"""Stand-ins for the block of the published DiT and its parts, as timm makes them, to be varied."""

import torch
import torch.nn.functional as F
from torch import nn

D, H, HIDDEN, COND = 12, 3, 20, 7


class Attention(nn.Module):
    def __init__(self, bias=True, width=D):
        super().__init__()
        self.num_heads, self.scale = H, (width // H) ** -0.5
        self.qkv = nn.Linear(D, 3 * width, bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.proj = nn.Linear(width, D, bias)

    def turned(self, q, k):
        return q, k

    def forward(self, x):
        B, T, _ = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.turned(self.q_norm(q), self.k_norm(k))
        weights = self.attn_drop((q * self.scale @ k.mT).softmax(-1))
        x = (weights @ v).transpose(1, 2).reshape(B, T, -1)
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
        hidden = a * self.act(b) if self.gate_last else self.act(a) * b
        return self.drop2(self.fc2(self.drop1(hidden)))


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


def block_of(config):
    """A block as somebody makes it who has read a layer's config; its sizes must be those here."""
    block = Block()
    norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[config.norm]
    eps2 = config.eps if config.eps2 is None else config.eps2
    block.norm1, block.norm2 = (norm(D, eps, config.affine) for eps in (config.eps, eps2))
    block.attn = Attention(width=config.attention_width)
    block.mlp = Gated() if config.mlp == "swiglu" else Mlp()
    if config.mlp == "gelu_exact":
        block.mlp.act = nn.GELU()
    if config.qk_norm:
        d = config.attention_width // H
        block.attn.q_norm, block.attn.k_norm = (nn.RMSNorm(d, config.qk_eps) for _ in range(2))
    theirs = {"qkv": block.attn.qkv, "out": block.attn.proj, "fc1": block.mlp.fc1}
    for name, projection in {**theirs, "fc2": block.mlp.fc2}.items():
        if not config.has_bias(name):
            projection.bias = None
    block.attn.attn_drop.p = config.attention_dropout
    block.attn.proj_drop.p = block.mlp.drop2.p = config.dropout
    return block


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


class Fused(Attention):
    """Its kernel is told the share that its module would leave out."""

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        p = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Asks(Attention):
    """Runs its dropout where that would leave out something."""

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ k.mT).softmax(-1)
        weights = self.attn_drop(weights) if self.attn_drop.p > 0 else weights
        return self.proj((weights @ v).transpose(1, 2).reshape(B, T, D))


class DropsScores(Attention):
    """Dropout before the softmax."""

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        x = self.attn_drop(q * self.scale @ k.mT).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class DropsFirst(Attention):
    """Dropout of what the projection reads."""

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        x = self.attn_drop((q * self.scale @ k.mT).softmax(-1)) @ v
        return self.proj(self.proj_drop(x.transpose(1, 2).reshape(B, T, D)))


class DropsInFunction(Block):
    def forward(self, x, c):
        return F.dropout(super().forward(x, c), 0.1, self.training)


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
