"""Fuse the layers of somebody else's model in one line, and go on with its own training loop.

    python examples/adopt.py --layer dit --recompute none

The same steps run twice, on the model as it is and on the fused one: their losses, and what the
backward keeps of each layer. `--layer timm` and `--layer diffusers` take a layer of these libraries
(pip install 'dbkernels[convert]').
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from dbkernels.convert import fuse
from dbkernels.memory.measure import measure_peak
from dbkernels.ops.layer.recompute import Recompute

# a model as somebody wrote it, without this package


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, 1e-6, False) for _ in range(2))
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Model(nn.Module):
    """Layers between two projections."""

    def __init__(self, dim: int, layers: list[nn.Module], given: dict[str, Tensor]):
        super().__init__()
        self.first, self.last = nn.Linear(16, dim), nn.Linear(dim, 16)
        self.blocks, self.given = nn.ModuleList(layers), given

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, **self.given)
        return self.last(x)


def layers_of(kind: str, dim: int, heads: int, B: int) -> tuple[Callable, dict[str, Tensor]]:
    """What makes a layer of the kind, and what it is called with beside x."""
    if kind == "dit":
        return lambda: DiTBlock(dim, heads), {"c": torch.randn(B, dim)}
    if kind == "timm":
        from timm.models.vision_transformer import Block

        return lambda: Block(dim, heads, qkv_bias=True, init_values=1e-5), {}
    from diffusers.models.attention import BasicTransformerBlock

    told = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10, "attention_bias": True}
    told |= {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
    step, label = torch.randint(10, (2, B))
    given = {"timestep": step, "class_labels": label}
    return lambda: BasicTransformerBlock(dim, heads, dim // heads, **told), given


# and its training loop, with a count of what is kept


def train(model: Model, x: Tensor, steps: int) -> str:
    """Losses, kept units of a layer, and the median time of a step in words."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, times = [], []

    def step() -> None:
        torch.manual_seed(len(losses))
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    kept = measure_peak(step, model=model, optimizers=[optimizer], inputs=[x]).saved_bytes
    for _ in range(steps - 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    unit = x[..., 0].numel() * model.last.in_features * x.element_size()
    first, last = losses[0], losses[-1]
    return (
        f"loss {first:.6f} to {last:.6f}, {kept / unit / len(model.blocks):.1f} units kept per "
        f"layer, {1e3 * statistics.median(times):.0f} ms per step"
    )


def main(
    layer: Literal["dit", "timm", "diffusers"] = "dit",
    recompute: Recompute = "none",
    dim: int = 384,
    heads: int = 6,
    depth: int = 4,
    tokens: int = 256,
    batch: int = 4,
    steps: int = 6,
) -> None:
    """Train a model before and after its layers are fused.

    Args:
        layer: Whose layers.
        recompute: What the backward of a fused layer computes again.
        dim: Width of the model.
        heads: Of the attention.
        depth: Number of layers.
        tokens: Of a sample.
        batch: Samples.
        steps: Updates; at least 2.
    """
    torch.manual_seed(0)
    made, given = layers_of(layer, dim, heads, batch)
    model = Model(dim, [made() for _ in range(depth)], given)
    x = torch.randn(batch, tokens, 16)
    other = copy.deepcopy(model)
    print(f"as it is: {train(model, x, steps)}")
    print(fuse(other, recompute))
    print(f"fused:    {train(other, x, steps)}")


if __name__ == "__main__":
    tyro.cli(main)
