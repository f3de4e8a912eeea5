"""A vision transformer that denoises the embedding of the label, given the image.

    z0     = E[label] / |E[label]|
    tokens = [p * z ; patches(image)] + positions
    D      = of_z * z + of_F * norm(layers(tokens))[0]
    logits = W ((1 + scale) * D + shift) + b

p, of_z and of_F are those of `prediction.EDM`. arXiv:2506.14202, section 4 and its published code.
The noisy label takes the place of the class token, and every block embeds the image anew.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.path import log_level
from dbkernels.diffusion.prediction import EDM
from dbkernels.diffusion.process import Interval
from dbkernels.models.branches import initialise_linear
from dbkernels.models.embed import FinalModulation, Linear, NoiseEmbedding, patchify
from dbkernels.models.family import Presets
from dbkernels.models.image_config import LabelledConfig
from dbkernels.models.layer import AdaLNLayer, LayerConfig, make_norm, run_layers
from dbkernels.models.taught import cross_entropy as taught_entropy
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.dropout import dropout
from dbkernels.ops.philox import Draw

if TYPE_CHECKING:  # a Python of 3.10 has none
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class ViTConfig(LabelledConfig):
    """A vision transformer; the embedding of a label is as wide as the residual stream."""

    mlp_hidden: int
    """Width of the MLP's hidden layer."""
    cond_dim: int
    """Width of the noise condition."""
    patch: int = 4
    channels: int = 3
    num_classes: int = 100
    affine: bool = True
    """Whether the norms have weights of their own."""
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"
    """As that of `LayerConfig`."""
    eps: float = 1e-6
    """Of the norms, in units of x**2."""
    silu_modulation: bool = False
    """Whether silu follows the projection of each modulation too."""
    dropout: float = 0.0
    """Share of the first layer's input and of each branch's output that is left out in training."""
    attention_dropout: float = 0.0
    """Share of the attention's weights that is left out in training."""
    small_init: bool = False
    """Whether weights and positions begin with a standard deviation of 0.02."""

    def resized(self, sizes: dict[str, int]) -> "Self":
        """With other sizes by field; the MLP keeps its ratio to dim."""
        if "dim" in sizes:
            sizes = {"mlp_hidden": self.mlp_hidden * sizes["dim"] // self.dim, **sizes}
        return replace(self, **sizes)


# the code of arXiv:2506.14202: a ViT of Hugging Face with AdaLN, whose silu stands on both sides of
# the condition's projection
PUBLISHED = {
    "mlp": "gelu_exact",
    "eps": 1e-12,
    "silu_modulation": True,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "small_init": True,
}
PRESETS = {
    "cifar100": ViTConfig(dim=128, depth=12, num_heads=4, mlp_hidden=3072, cond_dim=21),
    "digits": ViTConfig(
        dim=64, depth=12, num_heads=4, mlp_hidden=256, cond_dim=32,
        image_size=8, patch=2, channels=1, num_classes=10,
    ),
    "published": ViTConfig(
        dim=128, depth=12, num_heads=4, mlp_hidden=3072, cond_dim=21, **PUBLISHED
    ),
    "tiny-imagenet": ViTConfig(
        dim=768, depth=12, num_heads=12, mlp_hidden=3072, cond_dim=128,
        image_size=64, num_classes=200, **PUBLISHED,
    ),
}  # fmt: skip


class ViT(Presets, nn.Module):
    """The classification family: z is (B, dim), a prediction is logits (B, num_classes).

    The preset "published" computes what the code of arXiv:2506.14202 computes for CIFAR-100, and
    begins with its weights' distributions. "cifar100" has its sizes, and differs from it as DiT
    does: no silu after the modulations' projections, GELU in its tanh form, eps of 1e-6, no
    dropout, and an initialisation that learns sooner. "tiny-imagenet" is as the published one, at
    the paper's sizes for Tiny-ImageNet.

    Dropout is of the training loss alone, and of a model in training mode: `loss` draws it from the
    step's draw, `losses` and `denoise` have none.
    """

    presets, smallest = PRESETS, "digits"
    target_parts = ("label_table",)
    stem_and_head = ("stem", "cross_entropy")
    independent = True

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, self.sigma_data = config, config.sigma_data
        self.prediction = EDM(config.sigma_data)
        D, tokens = config.dim, (config.image_size // config.patch) ** 2
        sizes = D, config.num_heads, config.mlp_hidden, config.cond_dim
        layer = LayerConfig(
            *sizes,
            affine=config.affine,
            mlp=config.mlp,
            eps=config.eps,
            recompute=config.recompute,
            silu_modulation=config.silu_modulation,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )
        self.label_table = nn.Embedding(config.num_classes, D)
        self.patch = Linear(config.channels * config.patch**2, D)
        self.positions = nn.Parameter(torch.empty(tokens + 1, D, dtype=torch.get_default_dtype()))
        self.condition = NoiseEmbedding(config.cond_dim)
        self.layers = nn.ModuleList(AdaLNLayer(layer) for _ in range(config.depth))
        self.norm = make_norm(layer)
        self.modulation = FinalModulation(D, config.cond_dim, silu=config.silu_modulation)
        self.head = Linear(D, config.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        # the published normal is cut at a hundred standard deviations, where none comes; what cuts
        # reads its numbers, and a dry run's tensors have none
        small = partial(nn.init.normal_, std=0.02)
        of_weights = small if self.config.small_init else nn.init.xavier_uniform_
        for layer in self.layers:
            layer.initialise(of_weights)
        initialise_linear(self.patch, of_weights)
        initialise_linear(self.head, nn.init.zeros_)
        # as large as normed tokens: smaller ones leave a bag of patches for hundreds of steps
        (small if self.config.small_init else nn.init.normal_)(self.positions)
        nn.init.normal_(self.label_table.weight, std=0.02)

    def _unit_table(self) -> Tensor:
        return F.normalize(self.label_table.weight.float(), dim=-1)

    def target(self, batch: Batch) -> Tensor:
        """The label's embedding at unit length, (B, dim); its gradient reaches the table."""
        return self._unit_table()[batch["label"]]

    def z_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B, dim), from batch["image"]."""
        return len(batch["image"]), self.config.dim

    def level_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B,)."""
        return (len(batch["image"]),)

    def denoise(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Logits (B, num_classes) from z (B, dim) at sigma (B,), given batch["image"]."""
        return self.tail(*self._answer(z, level, layers, batch), z, level)

    def loss(
        self,
        draw: Draw,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
        interval: Interval,
    ) -> Tensor:
        """Sum of scale (B,) times the cross-entropy of each sample, in nats."""
        drops = self.training and (self.config.dropout or self.config.attention_dropout)
        losses = self._losses(draw, level, layers, batch, draw if drops else None)
        return (scale.float() * losses).sum()

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Cross-entropy of each sample, (B,), in nats."""
        return self._losses(draw, level, layers, batch, None)

    def noisy(self, level: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """z (B, dim) of the labels themselves."""
        return add_noise(self.target(batch), *self.prediction.path(level), draw)

    def taught_loss(
        self,
        z: Tensor,
        taught: Tensor,
        share: float,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
    ) -> Tensor:
        """Sum of scale (B,) times the cross-entropy in nats with taught labels, and no dropout."""
        logits = self.denoise(z, level, layers, batch)
        return (scale.float() * taught_entropy(logits, taught, batch["label"], share)).sum()

    def _losses(
        self,
        draw: Draw,
        level: Tensor,
        layers: Sequence[int],
        batch: Batch,
        dropped: Draw | None,
    ) -> Tensor:
        z = self.noisy(level, batch, draw)
        answer, c = self._answer(z, level, layers, batch, dropped)
        return self.cross_entropy(answer, c, z, level, batch["label"])

    def _answer(
        self,
        z: Tensor,
        level: Tensor,
        layers: Sequence[int],
        batch: Batch,
        dropped: Draw | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The token that answers, as the last layer left it (B, D), and the condition.

        dropped names what dropout leaves out; None leaves nothing out.
        """
        x, c = self.stem(z, level, batch["image"])
        if dropped is not None and self.config.dropout:
            x = dropout(x, self.config.dropout, dropped)
        some = [self.layers[index] for index in layers]
        x = run_layers(some, x, c, num_queries=1, draw=dropped)
        return x[:, 0], c

    def stem(self, z: Tensor, level: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads, (B, T + 1, D), and the condition (B, cond_dim)."""
        c = self.condition(log_level(level))
        patches = self.patch(patchify(image, self.config.patch))
        noisy = self.prediction.scale(level[:, None]) * z
        return torch.cat([noisy[:, None].to(patches), patches], dim=1) + self.positions, c

    def tail(self, answer: Tensor, c: Tensor, z: Tensor, level: Tensor) -> Tensor:
        """Logits (B, num_classes) of what the last layer left in the place of z, (B, D)."""
        of_z, of_F = self.prediction.estimate(level[:, None])
        D = of_z * z + of_F * self.norm(answer)
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


def average(logits: Tensor) -> Tensor:
    """Logits of the mean probabilities of several answers: (N, B, num_classes) to (B, ...)."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


def metrics(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Accuracy, cross-entropy in nats and confidence of each sample, (B,) float32."""
    logits, label = logits.float(), batch["label"]
    return {
        "accuracy": (logits.argmax(-1) == label).float(),
        "cross_entropy": F.cross_entropy(logits, label, reduction="none"),
        "confidence": logits.softmax(-1).amax(-1),
    }
