"""The vision transformer of the package, in parts that a baseline may train one by one.

Sizes, layers and first weights are those of `dbkernels.models.vit.ViT`. Where there is no noise,
the condition of its layers is zero, so their modulation is a constant that each learns. There its
gates begin at 1 in place of 0: such a layer is an ordinary one with norms before its branches, as
the published comparisons have it, where one that returned its input would tell a Forward-Forward
step nothing of the label.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.models.embed import Linear, patchify
from dbkernels.models.layer import AdaLNLayer
from dbkernels.models.vit import ViT, ViTConfig

SILU_IS_1 = 1.2784645427610738  # silu of it is 1


class Stem(nn.Module):
    """One more token, and the patches of an image: (B, T + 1, D), with their positions."""

    def __init__(self, vit: ViT):
        super().__init__()
        self.size, self.patch, self.positions = vit.config.patch, vit.patch, vit.positions

    def forward(self, image: Tensor, token: Tensor) -> Tensor:
        """image (B, C, H, W), token (B, D), the first one."""
        patches = self.patch(patchify(image, self.size))
        return torch.cat([token[:, None].to(patches.dtype), patches], dim=1) + self.positions


class ClassToken(Stem):
    """A `Stem` whose first token is one vector that it learns."""

    def __init__(self, vit: ViT):
        super().__init__(vit)
        self.token = nn.Parameter(torch.zeros(vit.config.dim, dtype=torch.float32))

    def forward(self, image: Tensor) -> Tensor:
        """image (B, C, H, W)."""
        return super().forward(image, self.token.expand(len(image), -1))


class LabelToken(Stem):
    """A `Stem` whose first token tells a label."""

    def __init__(self, vit: ViT):
        super().__init__(vit)
        self.labels = Linear(vit.config.num_classes, vit.config.dim)
        nn.init.xavier_uniform_(self.labels.weight)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        """image (B, C, H, W), label (B,) int64; as bright as an image's brightest pixel can be."""
        told = F.one_hot(label, self.labels.in_features).to(image.dtype)
        return super().forward(image, self.labels(told))


class Plain(nn.Module):
    """A layer without a noise level: x + attention(norm(x)), and of that x + mlp(norm(x))."""

    def __init__(self, layer: AdaLNLayer):
        super().__init__()
        self.layer = layer
        # nothing but the bias meets a condition of zero
        layer.modulation.weight.requires_grad_(False)
        gates = layer.modulation.bias.detach().unflatten(0, (2, 3, -1))[:, 2]
        gates.fill_(SILU_IS_1 if layer.config.silu_modulation else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.layer(x, x.new_zeros(1, self.layer.config.cond_dim))


class Head(nn.Sequential):
    """Layer norm and a linear map of the classes: (B, D) -> logits (B, C)."""

    def __init__(self, config: ViTConfig):
        super().__init__(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.num_classes))


class ViTNet(nn.Module):
    """A transformer that reads a noisy embedding beside the image, for NoProp.

    Args:
        config:   sizes, with the depth of this one
        width:    of the embedding
        outputs:  numbers that it gives
        timed:    whether its layers are told a time
    """

    def __init__(self, config: ViTConfig, width: int, outputs: int, *, timed: bool):
        super().__init__()
        vit = ViT(config)
        self.stem, self.noisy = Stem(vit), Linear(width, config.dim)
        self.layers = vit.layers if timed else nn.ModuleList(map(Plain, vit.layers))
        self.norm, self.out = nn.LayerNorm(config.dim), nn.Linear(config.dim, outputs)

    def forward(self, z: Tensor, image: Tensor, c: Tensor | None) -> Tensor:
        """z (B, width), image (B, C, H, W), c (B, cond_dim) of the time -> (B, outputs)."""
        x = self.stem(image, self.noisy(z))
        for layer in self.layers:
            x = layer(x) if c is None else layer(x, c)
        return self.out(self.norm(x[:, 0]))
