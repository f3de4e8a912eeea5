"""What the configurations of image models share."""

from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from dbkernels.data.image_folder import Convert
from dbkernels.data.images import ImageData, open_data
from dbkernels.data.made_up import Field
from dbkernels.ops.layer.recompute import Recompute

if TYPE_CHECKING:  # a Python of 3.10 has none
    from typing_extensions import Self


@dataclass(frozen=True)
class ImageConfig:
    """A model of square images or latents, whatever it is told of them."""

    dim: int
    """Width of the residual stream."""
    depth: int
    """Number of layers."""
    num_heads: int
    """Of the attention; divides dim."""
    _: KW_ONLY
    image_size: int = 32
    """Pixels, or cells of a latent; square."""
    patch: int
    """The same unit; divides image_size."""
    channels: int
    """Of the image or latent."""
    sigma_data: float = 0.5
    """Standard deviation of the clean target that the preconditioning assumes."""
    recompute: Recompute = "none"
    """What the backward computes again: a key of `dbkernels.ops.POLICIES`; moves only rounding."""
    independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        size, patch = self.image_size, self.patch
        if patch < 1 or size < 1 or size % patch:
            raise ValueError(f"the patch must divide the image size, got {patch} and {size}")

    @property
    def tokens(self) -> int:
        """Of a sample, as the layers see it, or nearly as many."""
        return (self.image_size // self.patch) ** 2

    @classmethod
    def stored(cls, fields: dict[str, Any], version: int) -> "Self":
        """The configuration in a run's config.json, of the version that the file has."""
        return cls(**fields)

    def as_in(self, stored: "Self") -> "Self":
        """With what a stored run has and nobody chooses."""
        return self

    def resized(self, sizes: dict[str, int]) -> "Self":
        """With other sizes, by field."""
        return replace(self, **sizes)

    def keep(self, source: str, directory: Path) -> None:
        """Nothing: an image is read as it is."""

    def fields(self) -> dict[str, Field]:
        """What a sample holds: an image or a latent."""
        image = self.channels, self.image_size, self.image_size
        return {"image": Field(image, torch.float32)}

    def sized(self, image_shape: tuple[int, int, int]) -> dict[str, int]:
        """The fields that images of a shape (C, H, W) ask for.

        Raises:
            ValueError: they are not square.
        """
        channels, height, width = image_shape
        if height != width:
            raise ValueError(f"images must be square, got {height} x {width}")
        return {"image_size": height, "channels": channels}

    def check_fits(self, source: str, split: str, image_shape: tuple[int, ...]) -> None:
        """ValueError where images have another shape than the model is made for."""
        expected = self.fields()["image"].shape
        if image_shape != expected:
            raise ValueError(
                f"the {split} images of {source} must be {expected}, as the model is made for, got "
                f"{image_shape}"
            )


def check_no_stride(stride: int) -> None:
    """ValueError where windows of a text are asked of images."""
    if stride:
        raise ValueError(f"stride must be 0 where data is no text, got {stride}")


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(ImageConfig):
    """A model of images that have a label."""

    num_classes: int
    """Labels are 0 to num_classes - 1."""

    def find(self, source: str, *, convert: Convert = "none") -> ImageData:
        """The training split of data that the model may not fit yet, as `open_data`."""
        return open_data(source, convert=convert)

    def fitted(self, data: ImageData, sizes: dict[str, int] | None = None) -> "Self":
        """With the image size, channels and classes of some data, and other sizes by field.

        Raises:
            ValueError: images are not square, or the patch does not divide them.
        """
        of_data = self.sized(data.image_shape) | {"num_classes": data.num_classes}
        return self.resized((sizes or {}) | of_data)

    def open(
        self,
        source: str,
        split: Literal["train", "test"],
        *,
        convert: Convert = "none",
        stride: int = 0,
    ) -> ImageData:
        """A split of the data that the model is for, as `open_data`.

        Raises:
            ValueError: images have another shape, stride is not 0, or as `open_data`.
        """
        check_no_stride(stride)
        data = open_data(source, split, self.num_classes, convert=convert)
        self.check_fits(source, split, data.image_shape)
        return data

    def fields(self) -> dict[str, Field]:
        """What a sample holds: an image or a latent, and its label."""
        return super().fields() | {"label": Field((), torch.int64, self.num_classes)}
