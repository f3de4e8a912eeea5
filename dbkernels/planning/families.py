"""All that planning asks of families of models: presets, their default weight, made-up samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbkernels.data.images import Batch, ImageData, Put
from dbkernels.models import DiTConfig, ViTConfig, dit, vit
from dbkernels.training.objective import Weighting

ModelConfig = ViTConfig | DiTConfig
PRESETS: dict[str, dict[str, ModelConfig]] = {"vit": vit.PRESETS, "dit": dit.PRESETS}
WEIGHTING: dict[str, Weighting] = {"vit": "none", "dit": "edm"}


def preset(family: str, name: str) -> ModelConfig:
    """The configuration of one preset.

    Raises:
        ValueError: there is no such family, or it has no such preset.
    """
    if family not in PRESETS:
        raise ValueError(f"family must be one of {', '.join(PRESETS)}, got {family}")
    if name not in PRESETS[family]:
        known = ", ".join(PRESETS[family])
        raise ValueError(f"preset of {family} must be one of {known}, got {name}")
    return PRESETS[family][name]


def made_up(model: ModelConfig, count: int) -> ImageData:
    """Samples of unit variance; the same ones every time."""
    random = torch.Generator().manual_seed(0)
    shape = (count, model.channels, model.image_size, model.image_size)
    images = torch.randn(shape, generator=random).numpy()
    labels = torch.randint(model.num_classes, (count,), generator=random)
    return ImageData(images, labels, model.num_classes)


@dataclass(frozen=True)
class Blank:
    """Samples of the shape that a model reads, of which nothing is filled in: for fake tensors."""

    model: ModelConfig
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, put: Put = lambda tensor: tensor) -> Batch:
        """As `ImageData.batch`."""
        size = self.model.image_size
        image = torch.empty(len(indices), self.model.channels, size, size)
        return {"image": put(image), "label": put(torch.zeros(len(indices), dtype=torch.int64))}
