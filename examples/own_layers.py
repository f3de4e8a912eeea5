"""Train a network of your own in blocks: its layers, and three functions around them.

    python examples/own_layers.py --layers torch --num-blocks 3

The network is a vision transformer as one writes it in plain torch. `--layers torch` takes torch's
own encoder layers, `--layers adaln` layers that are modulated by the noise level, `--layers timm`
those of timm (pip install timm). `--num-blocks 1` trains it end to end.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from dbkernels import DiffusionBlocks, OwnLayers, Trainer, open_data
from dbkernels.data.images import Batch

# a network as somebody wrote it, without this package


class AdaLN(nn.Module):
    """A layer whose norms and branches a condition modulates."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 4 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, gate1, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(4, dim=-1)
        y = self.norm1(x) * (1 + scale1)
        x = x + (1 + gate1) * self.attention(y, y, y, need_weights=False)[0]
        return x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2))


class Net(nn.Module):
    """Patches of an image, layers, and logits of ten classes."""

    def __init__(self, layer: Callable[[], nn.Module], dim: int, depth: int):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.positions = nn.Parameter(torch.randn(17, dim))
        self.blocks = nn.Sequential(*(layer() for _ in range(depth)))
        self.norm, self.classes = nn.LayerNorm(dim), nn.Linear(dim, 10)


def layer_of(kind: str, dim: int, num_heads: int) -> Callable[[], nn.Module]:
    """What makes a layer of the kind."""
    if kind == "adaln":
        return lambda: AdaLN(dim, num_heads)
    if kind == "timm":
        from timm.models.vision_transformer import Block

        return lambda: Block(dim, num_heads, qkv_bias=True)
    options = {"batch_first": True, "norm_first": True, "activation": "gelu"}
    return lambda: nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, **options)


# what blocks need of it


def target(net: Net, batch: Batch) -> Tensor:
    """What the network should say."""
    return batch["label"]


def stem(net: Net, z: Tensor, batch: Batch) -> Tensor:
    """Tokens that the first layer reads: the noisy answer takes the place of a class token."""
    patches = net.patch(batch["image"]).flatten(2).mT
    return torch.cat([z[:, None], patches], dim=1) + net.positions


def head(net: Net, x: Tensor, c: Tensor, batch: Batch) -> Tensor:
    """Logits, from the token that answers."""
    return net.classes(net.norm(x[:, 0]))


def main(
    layers: Literal["torch", "adaln", "timm"] = "torch",
    num_blocks: int = 3,
    steps: int = 150,
    dim: int = 64,
    depth: int = 6,
    num_heads: int = 4,
) -> None:
    """Train on digits, and say how many unseen ones are known.

    Args:
        layers: Whose.
        num_blocks: 1 trains end to end.
        steps: Updates of every block.
        dim: Width of the network.
        depth: Number of layers.
        num_heads: Of the attention.
    """
    torch.manual_seed(0)
    model = OwnLayers(
        Net(layer_of(layers, dim, num_heads), dim, depth),
        target=target,
        stem=stem,
        head=head,
        layers="blocks",
        dim=dim,
        num_classes=10,
        level_as="condition" if layers == "adaln" else "token",
    )
    blocks = DiffusionBlocks(model, num_blocks)
    settings = {"batch_size": 64, "lr": 2e-3, "warmup": 20, "decay": "cosine"}
    Trainer(blocks, open_data("digits"), steps=steps, **settings).run()
    print(blocks.evaluate(open_data("digits", "test")))


if __name__ == "__main__":
    tyro.cli(main)
