"""A vision transformer that denoises the embedding of the label, given the image.

    z0     = E[label] / |E[label]|
    tokens = [c_in * z ; patches(image)] + positions
    D      = c_skip * z + c_out * norm(layers(tokens))[0]
    logits = W ((1 + scale) * D + shift) + b

arXiv:2506.14202, section 4 and its published code. The noisy label takes the place of the class
token, and every block embeds the image anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.diffusion.precondition import c_in, c_noise, c_out, c_skip
from dbkernels.models.embed import FinalModulation, NoiseEmbedding, check_patch, patchify
from dbkernels.models.family import Batch
from dbkernels.models.layer import AdaLNLayer, LayerConfig, initialise_linear, make_norm, run_layers
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.ops.philox import Draw


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer."""

    image_size: int
    """Pixels, square."""
    patch: int
    """Pixels; divides image_size."""
    channels: int
    """Of the image."""
    num_classes: int
    """Labels are 0 to num_classes - 1."""
    dim: int
    """Of the residual stream; also of the label's embedding."""
    depth: int
    """Number of layers."""
    num_heads: int
    """Of the attention; divides dim."""
    mlp_hidden: int
    """Width of the MLP's hidden layer."""
    cond_dim: int
    """Width of the noise condition."""
    affine: bool = True
    """Whether the norms have weights of their own."""
    sigma_data: float = 0.5
    """Standard deviation of the clean target that the preconditioning assumes."""
    recompute: Recompute = "none"
    """What the backward computes again: a key of `dbkernels.ops.POLICIES`; moves only rounding."""

    def __post_init__(self):
        check_patch(self.image_size, self.patch)


class ViT(nn.Module):
    """The classification family: z is (B, dim), a prediction is logits (B, num_classes)."""

    target_parts = ("label_table",)
    stem_and_head = ("stem", "cross_entropy")

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        D, tokens = config.dim, (config.image_size // config.patch) ** 2
        layer = LayerConfig(
            D,
            config.num_heads,
            config.mlp_hidden,
            config.cond_dim,
            affine=config.affine,
            recompute=config.recompute,
        )
        self.label_table = nn.Embedding(config.num_classes, D)
        self.patch = nn.Linear(config.channels * config.patch**2, D)
        self.positions = nn.Parameter(torch.empty(tokens + 1, D))
        self.condition = NoiseEmbedding(config.cond_dim)
        self.layers = nn.ModuleList(AdaLNLayer(layer) for _ in range(config.depth))
        self.norm = make_norm(layer)
        self.modulation = FinalModulation(D, config.cond_dim)
        self.head = nn.Linear(D, config.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.layers:
            layer.initialise(nn.init.xavier_uniform_)
        initialise_linear(self.patch, nn.init.xavier_uniform_)
        initialise_linear(self.head, nn.init.zeros_)
        # as large as normed tokens: smaller ones leave a bag of patches for hundreds of steps
        nn.init.normal_(self.positions)
        nn.init.normal_(self.label_table.weight, std=0.02)

    def _unit_table(self) -> Tensor:
        return F.normalize(self.label_table.weight.float(), dim=-1)

    def target(self, batch: Batch) -> Tensor:
        """The label's embedding at unit length, (B, dim); its gradient reaches the table."""
        return self._unit_table()[batch["label"]]

    def denoise(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Logits (B, num_classes) from z (B, dim) at sigma (B,), given batch["image"]."""
        return self.tail(*self._answer(z, level, layers, batch), z, level)

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Cross-entropy of each sample, (B,), in nats."""
        z = add_noise(self.target(batch), torch.ones_like(level), level, draw)
        answer, c = self._answer(z, level, layers, batch)
        return self.cross_entropy(answer, c, z, level, batch["label"])

    def _answer(
        self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The token that answers, as the last layer left it (B, D), and the condition."""
        x, c = self.stem(z, level, batch["image"])
        x = run_layers([self.layers[index] for index in layers], x, c, num_queries=1)
        return x[:, 0], c

    def stem(self, z: Tensor, level: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads, (B, T + 1, D), and the condition (B, cond_dim)."""
        c = self.condition(c_noise(level))
        patches = self.patch(patchify(image, self.config.patch))
        noisy = c_in(level[:, None], self.config.sigma_data) * z
        return torch.cat([noisy[:, None].to(patches), patches], dim=1) + self.positions, c

    def tail(self, answer: Tensor, c: Tensor, z: Tensor, level: Tensor) -> Tensor:
        """Logits (B, num_classes) of what the last layer left in the place of z, (B, D)."""
        sigma, sigma_data = level[:, None], self.config.sigma_data
        D = c_skip(sigma, sigma_data) * z + c_out(sigma, sigma_data) * self.norm(answer)
        return self.head(self.modulation(D, c))

    def cross_entropy(
        self, answer: Tensor, c: Tensor, z: Tensor, level: Tensor, label: Tensor
    ) -> Tensor:
        """Cross-entropy (B,) of what `tail` makes of its arguments."""
        logits = self.tail(answer, c, z, level)
        return F.cross_entropy(logits.float(), label, reduction="none")

    def estimate(self, prediction: Tensor) -> Tensor:
        """The expected embedding under the logits, (B, dim); unit rows, as in training."""
        return prediction.float().softmax(-1) @ self._unit_table()


PRESETS = {
    "cifar100": ViTConfig(
        image_size=32,
        patch=4,
        channels=3,
        num_classes=100,
        dim=128,
        depth=12,
        num_heads=4,
        mlp_hidden=3072,
        cond_dim=21,
    ),
    "digits": ViTConfig(
        image_size=8,
        patch=2,
        channels=1,
        num_classes=10,
        dim=64,
        depth=12,
        num_heads=4,
        mlp_hidden=256,
        cond_dim=32,
    ),
}
