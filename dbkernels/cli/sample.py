"""`python -m dbkernels sample`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tyro.conf import Positional

from dbkernels.cli.device import pick_device
from dbkernels.cli.progress import ProgressBar
from dbkernels.data.images import Batch
from dbkernels.diffusion.process import Spacing
from dbkernels.diffusion.samplers import Sampler
from dbkernels.models.registry import family_named
from dbkernels.ops.philox import Draw
from dbkernels.settings import MOST_SAMPLES, MOST_SEED, check_number
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.run import load_run
from dbkernels.whole_file import whole_file

ENLARGE_TO = 64  # pixels; smaller images are drawn this large in the picture
COLOURS = (1, 3)  # channels of a picture
# samples that the network sees at once, in every case: a product of matrices rounds otherwise where
# it has another size
PIECE = 16


@dataclass(frozen=True)
class Sample:
    """Generate images with a trained model, as one picture (.png) or as numbers (.npy)."""

    run_dir: Positional[Path]
    """Directory of a run."""
    out: Path = Path("samples.png")
    """A .png grid, one row per class, or an .npy of all (N, C, H, W); latents need .npy."""
    per_class: int = 8
    """Images of each class."""
    batch: int = 64
    """Images held in memory at a time, rounded up to 16; it changes no bit of them."""
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
        channels = config.model.fields()["image"].shape[0]
        if self.out.suffix == ".png" and channels not in COLOURS:
            raise ValueError(
                f"out must end in .npy where a sample has {channels} channels, which are no "
                f"picture, got {self.out}"
            )
        settings = {"guidance": self._guidance(config.label_drop), "sampler": self.sampler}
        levels = config.prior.grid(self.levels, self._spacing())
        wanted = prompts(config.model, self.per_class, device)
        found = drawn(blocks, wanted, levels, batch=self.batch, seed=self.seed, **settings)
        count = len(next(iter(wanted.values())))
        write = write_numbers if self.out.suffix == ".npy" else write_picture
        with ProgressBar("sampling", count, "images") as shown:
            write(self.out, _told(found, shown), count, self.per_class)
        print(f"wrote {count} images: {self.out}")

    def _check(self) -> None:
        if self.out.suffix not in (".png", ".npy"):
            raise ValueError(f"out must end in .png or .npy, got {self.out}")
        if not self.out.parent.is_dir():
            raise ValueError(f"out must lie in a directory that exists, got {self.out}")
        if self.out.is_dir():
            raise ValueError(f"out must be a file, got the directory {self.out}")
        check_number("per_class", self.per_class, 1, MOST_SAMPLES)
        check_number("batch", self.batch, 1, MOST_SAMPLES)
        check_number("seed", self.seed, 0, MOST_SEED)
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


def drawn(
    blocks: DiffusionBlocks,
    prompts: Batch,
    levels: Sequence[float],
    *,
    batch: int,
    seed: int,
    guidance: float,
    sampler: Sampler,
) -> Iterator[Tensor]:
    """Samples in batches, on the host; their bits are the same in batches of any size.

    Args:
        prompts:  conditions of all samples
        batch:    samples at a time; what it lacks to a multiple of PIECE is added
    """
    count, batch = len(next(iter(prompts.values()))), -batch // PIECE * -PIECE
    for start in range(0, count, batch):
        pieces = []
        for first in range(start, min(start + batch, count), PIECE):
            # the last piece is filled up with what is then left out
            rows = torch.arange(first, first + PIECE).clamp(max=count - 1)
            asked = {name: tensor[rows.to(tensor.device)] for name, tensor in prompts.items()}
            draw = Draw(seed, step=0, sample=first)
            found = blocks.sample(asked, levels, draw, guidance=guidance, sampler=sampler)
            pieces.append(found.cpu())
        yield torch.cat(pieces)[: count - start]


def _told(batches: Iterator[Tensor], shown: ProgressBar) -> Iterator[Tensor]:
    done = 0
    for images in batches:
        yield images
        shown.step(done := done + len(images), "written")


def write_numbers(path: Path, batches: Iterator[Tensor], count: int, per_row: int) -> None:
    """Write images (N, C, H, W) as a .npy, batch by batch, whole or not at all."""
    first = next(batches)
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, *first.shape[1:])}
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for images in chain([first], batches):
            file.write(images.numpy().astype("<f4").tobytes())


def write_picture(path: Path, batches: Iterator[Tensor], count: int, per_row: int) -> None:
    """Write images in [-1, 1], (N, C, H, W) with 1 or 3 channels, as a grid of full rows."""
    place, cells = 0, np.empty(0, np.uint8)
    for images in batches:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        if not place:
            cells = np.empty((count, *pixels.shape[1:3], 3), np.uint8)
        cells[place : (place := place + len(pixels))] = pixels.numpy()
    _, H, W, _ = cells.shape
    rows = cells.reshape(-1, per_row, H, W, 3).transpose(0, 2, 1, 3, 4)
    grid = Image.fromarray(rows.reshape(-1, per_row * W, 3))
    enlarged = max(1, ENLARGE_TO // max(H, W))
    with whole_file(path) as file:
        ImageOps.scale(grid, enlarged, Image.Resampling.NEAREST).save(file, format="PNG")
