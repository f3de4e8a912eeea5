"""What `python -m dbkernels sample` does with a run of images."""

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

from dbkernels.cli.progress import ProgressBar
from dbkernels.data.images import Batch
from dbkernels.diffusion.process import Spacing
from dbkernels.diffusion.samplers import SAMPLERS, Sampler
from dbkernels.models.registry import family_named
from dbkernels.ops.philox import Draw
from dbkernels.settings import MOST_SAMPLES, check_number
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.run_config import RunConfig
from dbkernels.whole_file import whole_file

LEVELS, PER_CLASS = 50, 8  # where nobody says other numbers
ENLARGE_TO = 64  # pixels; smaller images are drawn this large in the picture
COLOURS = (1, 3)  # channels of a picture
# samples that the network sees at once, in every case: a product of matrices rounds otherwise where
# it has another size
PIECE = 16


@dataclass(frozen=True)
class ImageFlags:
    """Of images."""

    per_class: int | None = None
    """Images of each class, or of each prompt; 8 unless told otherwise."""
    prompts: Path | None = None
    """Of a model of images and texts, an .npz of embeddings: text (N, S, E) and, where the model
    has them, pooled (N, P)."""
    sampler: Sampler | None = None
    """euler, which it is unless told otherwise, evaluates once per level. heun corrects each step
    and evaluates twice; dpmpp_2m looks back at the last level, and evaluates once. These two need
    close levels."""
    guidance: float | None = None
    """Scale of classifier-free guidance; by default 2 if training dropped labels or texts, else 1
    (none)."""

    def check(self, out: Path) -> None:
        """Refuse what no run can do."""
        if out.suffix not in (".png", ".npy"):
            raise ValueError(f"out must end in .png or .npy, got {out}")
        if self.per_class is not None:
            check_number("per_class", self.per_class, 1, MOST_SAMPLES)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")

    def guidance_of(self, label_drop: float) -> float:
        """The scale for a run that dropped a share of its labels or texts."""
        if self.guidance is None:
            return 2.0 if label_drop else 1.0
        if self.guidance != 1 and not label_drop:
            raise ValueError(
                "guidance must be 1 for a run that never dropped labels or texts (--label-drop), "
                f"got {self.guidance}"
            )
        return self.guidance


def sample_images(
    config: RunConfig,
    blocks: DiffusionBlocks,
    flags: ImageFlags,
    out: Path,
    *,
    batch: int,
    levels: int | None,
    grid: Spacing | Literal["auto"],
    seed: int,
) -> None:
    """Draw the images of each class or prompt and write them.

    Args:
        config, blocks:  of the run
        flags:           that were checked
        out:             .png or .npy
        batch:           images held in memory at a time
        levels:          how many; None is LEVELS
        grid:            their spacing; auto is that which the sampler needs
        seed:            of the starting noise
    """
    channels = config.model.fields()["image"].shape[0]
    if out.suffix == ".png" and channels not in COLOURS:
        raise ValueError(
            f"out must end in .npy where a sample has {channels} channels, which are no "
            f"picture, got {out}"
        )
    sampler, per_class = flags.sampler or "euler", flags.per_class or PER_CLASS
    guidance = flags.guidance_of(config.label_drop)
    own = config.prior.close if SAMPLERS[sampler].close else "cdf"
    count = LEVELS if levels is None else levels
    found_at = config.prior.grid(count, own if grid == "auto" else grid)
    prompts = family_named(config.family).prompts
    assert prompts is not None
    wanted = prompts(config.model, flags.prompts, per_class, blocks.device)
    how = {"batch": batch, "seed": seed}
    found = drawn(blocks, wanted, found_at, guidance=guidance, sampler=sampler, **how)
    count = len(next(iter(wanted.values())))
    write = write_numbers if out.suffix == ".npy" else write_picture
    with ProgressBar("sampling", count, "images") as shown:
        write(out, _told(found, shown), count, per_class)
    print(f"wrote {count} images: {out}")


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
    place, cells = 0, np.empty((0, 0, 0, 3), np.uint8)
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
