"""From a family, a preset and the data to the configuration of a model."""

from dataclasses import replace
from typing import Literal

from dbkernels.data.images import ImageData
from dbkernels.models import DiTConfig, ViTConfig, dit, vit

FamilyName = Literal["vit", "dit"]
PRESETS = {"vit": vit.PRESETS, "dit": dit.PRESETS}


def preset(family: str, name: str) -> ViTConfig | DiTConfig:
    """A literal of the family's table of presets.

    Raises:
        ValueError: the table has no such name.
    """
    if name not in PRESETS[family]:
        known = ", ".join(PRESETS[family])
        raise ValueError(f"preset of {family} must be one of {known}, got {name}")
    return PRESETS[family][name]


def resized(config: ViTConfig | DiTConfig, sizes: dict[str, int]) -> ViTConfig | DiTConfig:
    """The configuration with other sizes; a ViT's MLP keeps its ratio to dim.

    Args:
        config:  to start from
        sizes:   by field; 0 keeps the configuration's own
    Raises:
        ValueError: a size is negative.
    """
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} must be positive, or 0 for the preset's, got {size}")
    sizes = {name: size for name, size in sizes.items() if size}
    if "dim" in sizes and isinstance(config, ViTConfig):
        sizes = {**sizes, "mlp_hidden": config.mlp_hidden * sizes["dim"] // config.dim}
    return replace(config, **sizes)


def fitted(config: ViTConfig | DiTConfig, data: ImageData) -> ViTConfig | DiTConfig:
    """The configuration with the data's image size, channels and classes.

    Raises:
        ValueError: images are not square, or the patch does not divide them.
    """
    channels, height, width = data.image_shape
    if height != width:
        raise ValueError(f"images must be square, got {height} x {width}")
    return replace(config, image_size=height, channels=channels, num_classes=data.num_classes)
