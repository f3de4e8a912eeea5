"""A diffusion transformer that denoises an image or a latent, given its class.

    c = noise(ln(sigma) / 4) + table[label]
    F = unpatchify(W ((1 + scale) * norm(layers(patches(input) + positions, c)) + shift) + b)

Peebles & Xie 2023 (arXiv:2212.09748). Input and estimate are those of its prediction, and with
another process than the Gaussian one what noise() reads: `diffusion.path` has it. With EDM:
arXiv:2506.14202, section 5.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.path import PathName
from dbkernels.diffusion.prediction import PredictionName, prediction_named
from dbkernels.models import embed
from dbkernels.models.branches import initialise_linear
from dbkernels.models.denoiser import ImageDenoiser
from dbkernels.models.image_config import LabelledConfig
from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.settings import check_choice

if TYPE_CHECKING:  # a Python of 3.10 has none
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class DiTConfig(LabelledConfig):
    """A diffusion transformer; the condition is as wide as the residual stream."""

    patch: int = 2
    channels: int = 4
    num_classes: int = 1000
    """Labels are 0 to num_classes - 1; num_classes itself means "no label"."""
    mlp_ratio: int = 4
    """Width of the MLP's hidden layer over dim."""
    positions: embed.PositionOrder = "sin_cos"
    """Of the sines and cosines of each axis: sin_cos as in the published weights; cos_sin in runs
    of this package whose config.json has a version below 3."""
    process: PathName = "gaussian"
    """gaussian: sigma is added. flow: a straight path to noise, as in SD3, Flux and SiT. vp: the
    steps of a schedule, as in the published DiT."""
    prediction: PredictionName = "edm"
    """What the network predicts, of those that `PREDICTIONS` has for the process."""
    frequencies: embed.Frequencies = "open"
    """Of the condition's sinusoid, as `embed.sinusoid`: open as published, closed in diffusers."""
    eps2: float | None = None
    """Of the norm before each MLP, in units of x**2; None is 1e-6, as of every other norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        prediction_named(self.process, self.prediction, self.sigma_data)
        check_choice("frequencies", self.frequencies, get_args(embed.Frequencies))
        # a width or an order that there is not is refused here
        embed.grid_positions(1, self.dim, self.positions)

    @classmethod
    def stored(cls, fields: dict[str, Any], version: int) -> "Self":
        return cls(**({"positions": "cos_sin"} if version < 3 else {}) | fields)

    def as_in(self, stored: "Self") -> "Self":
        return replace(self, positions=stored.positions) if isinstance(stored, DiTConfig) else self


PRESETS = {
    "S/2": DiTConfig(dim=384, depth=12, num_heads=6),
    "B/2": DiTConfig(dim=768, depth=12, num_heads=12),
    "L/2": DiTConfig(dim=1024, depth=24, num_heads=16),
    "XL/2": DiTConfig(dim=1152, depth=28, num_heads=16),
    "digits": DiTConfig(dim=64, depth=12, num_heads=4, image_size=8, channels=1, num_classes=10),
}


class DiT(ImageDenoiser):
    """The image family: z is (B, C, H, W), a prediction is the denoised image itself."""

    presets, smallest = PRESETS, "digits"

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        D, pixels = config.dim, config.channels * config.patch**2
        layer = LayerConfig(
            D,
            config.num_heads,
            config.mlp_ratio * D,
            cond_dim=D,
            recompute=config.recompute,
            eps2=config.eps2,
        )
        self.patch = embed.Linear(pixels, D)
        self.condition = embed.NoiseEmbedding(D, config.frequencies)
        self.label_table = nn.Embedding(config.num_classes + 1, D)
        self.layers = nn.ModuleList(AdaLNLayer(layer) for _ in range(config.depth))
        self.modulation = embed.FinalModulation(D, D)
        self.head = embed.Linear(D, pixels)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.layers:
            layer.initialise(nn.init.xavier_uniform_)
        initialise_linear(self.patch, nn.init.xavier_uniform_)
        initialise_linear(self.head, nn.init.zeros_)
        nn.init.normal_(self.label_table.weight, std=0.02)

    def z_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B, C, H, W), from batch["label"].

        Raises:
            ValueError: a label is out of range.
        """
        config, label = self.config, batch["label"]
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < config.num_classes:
            raise ValueError(
                f"labels must be 0 to {config.num_classes - 1}, "
                f"got {int(label.min())} to {int(label.max())}"
            )
        return len(label), config.channels, config.image_size, config.image_size

    def level_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B,)."""
        return (len(batch["label"]),)

    def network(self, scaled: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """F of what the prediction makes of z, (B, C, H, W)."""
        x, c = self.stem(scaled, level, self.label_table(batch["label"]))
        x = run_layers([self.layers[index] for index in layers], x, c)
        return self.tail(x, c)

    def stem(self, scaled: Tensor, level: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads, (B, T, D), and the condition, from a label's row, (B, D)."""
        c = self.condition(self.prediction.path.condition(level)) + label
        return self.patch(embed.patchify(scaled, self.config.patch)) + self._positions(), c

    def _positions(self) -> Tensor:
        """(T, D), made anew: a buffer would be lost where weights alone are loaded or moved."""
        config, weight = self.config, self.patch.weight
        side = config.image_size // config.patch
        table = embed.grid_positions(side, config.dim, config.positions, device=weight.device)
        return table.to(weight.dtype)

    def unconditional(self, batch: Batch) -> Batch:
        """The batch with every label replaced by "no label", for guidance."""
        return {**batch, "label": torch.full_like(batch["label"], self.config.num_classes)}


def prompts(
    config: DiTConfig, source: Path | None, per_class: int, device: torch.device | str
) -> Batch:
    """What asks for so many images of every class, in the order of the classes.

    Raises:
        ValueError: there is a source: no prompt has anything but a class.
    """
    if source is not None:
        raise ValueError(f"prompts must not be given for a model of classes, got {source}")
    return {"label": torch.arange(config.num_classes, device=device).repeat_interleave(per_class)}
