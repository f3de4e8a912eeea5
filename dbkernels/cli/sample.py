"""`python -m dbkernels sample`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from tyro.conf import Positional

from dbkernels.cli.device import pick_device
from dbkernels.diffusion.process import Spacing
from dbkernels.diffusion.samplers import Sampler
from dbkernels.models.registry import family_named
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_number
from dbkernels.training.run import load_run
from dbkernels.whole_file import whole_file

ENLARGE_TO = 64  # pixels; smaller images are drawn this large in the picture


@dataclass(frozen=True)
class Sample:
    """Generate images with a trained model, as one picture (.png) or as numbers (.npy)."""

    run_dir: Positional[Path]
    """Directory of a run."""
    out: Path = Path("samples.png")
    """A .png grid, one row per class, or an .npy of all images (N, C, H, W)."""
    per_class: int = 8
    """Images of each class."""
    levels: int = 50
    """Noise levels. Each is one evaluation of the network, or two with heun."""
    grid: Literal["auto", "cdf", "karras"] = "auto"
    """Spacing of the levels; auto is karras with heun and cdf, whose steps visit every block about
    equally often, with euler."""
    sampler: Sampler = "euler"
    """euler evaluates once per level; heun corrects each step, which needs close levels."""
    guidance: float | None = None
    """Scale of classifier-free guidance; by default 2 if training dropped labels, else 1 (none)."""
    weights: Literal["average", "last"] = "average"
    """The moving average of the weights where the run kept one, or the last weights."""
    checkpoint: str = "latest"
    """latest, or the path of a checkpoint of the run."""
    seed: int = 0
    """Seed of the starting noise."""
    device: str = "auto"
    """auto, cpu or cuda; auto is an NVIDIA GPU where there is one."""

    def run(self) -> None:
        self._check()
        device = pick_device(self.device)
        averaged = self.weights == "average"
        config, blocks = load_run(
            self.run_dir, which=self.checkpoint, averaged=averaged, device=device
        )
        prompts = family_named(config.family).prompts
        if prompts is None:
            raise ValueError(f"sample needs a run that generates, got one of {config.family}")
        images = blocks.sample(
            prompts(config.model, self.per_class, device),
            config.prior.grid(self.levels, self._spacing()),
            Draw(self.seed, step=0),
            guidance=self._guidance(config.label_drop),
            sampler=self.sampler,
        )
        write_images(images.cpu(), self.out, self.per_class)
        print(f"wrote {len(images)} images: {self.out}")

    def _check(self) -> None:
        if self.out.suffix not in (".png", ".npy"):
            raise ValueError(f"out must end in .png or .npy, got {self.out}")
        if not self.out.parent.is_dir():
            raise ValueError(f"out must lie in a directory that exists, got {self.out}")
        if self.out.is_dir():
            raise ValueError(f"out must be a file, got the directory {self.out}")
        check_number("per_class", self.per_class, 1)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")

    def _spacing(self) -> Spacing:
        if self.grid != "auto":
            return self.grid
        return "karras" if self.sampler == "heun" else "cdf"

    def _guidance(self, label_drop: float) -> float:
        if self.guidance is None:
            return 2.0 if label_drop else 1.0
        if self.guidance != 1 and not label_drop:
            raise ValueError(
                "guidance must be 1 for a run that never dropped labels (--label-drop), "
                f"got {self.guidance}"
            )
        return self.guidance


def write_images(images: Tensor, path: Path, per_row: int) -> None:
    """Write images in [-1, 1] (N, C, H, W) as a grid or as they are, whole or not at all."""
    with whole_file(path) as file:
        if path.suffix == ".npy":
            np.save(file, images.numpy(), allow_pickle=False)
        else:
            picture(images, per_row).save(file, format="PNG")


def picture(images: Tensor, per_row: int) -> Image.Image:
    """A grid of images in [-1, 1], (N, C, H, W) with 1 or at least 3 channels, in full rows."""
    N, C, H, W = images.shape
    shown = images[:, :3] if C >= 3 else images[:, :1].expand(N, 3, H, W)
    pixels = ((shown + 1) * 127.5).round().clamp(0, 255).byte().unflatten(0, (-1, per_row))
    grid = pixels.permute(0, 3, 1, 4, 2).reshape(-1, per_row * W, 3)  # (rows H, per_row W, 3)
    enlarged = max(1, ENLARGE_TO // max(H, W))
    return ImageOps.scale(Image.fromarray(grid.numpy()), enlarged, Image.Resampling.NEAREST)
