"""Random changes of a batch, made anew at every step from the step's own generator."""

import torch

from dbkernels.models.family import Batch


def drop_labels(batch: Batch, generator: torch.Generator, *, share: float, null: int) -> Batch:
    """Replace a share of the labels by "no label", so that guidance has both to subtract.

    Ho & Salimans 2022 (arXiv:2207.12598), algorithm 1.

    Args:
        batch:      "label" (B,) int64, among others
        generator:  on the batch's device
        share:      probability of each label to be dropped
        null:       what stands for "no label"
    """
    draw = torch.rand(len(batch["label"]), generator=generator, device=generator.device)
    return {**batch, "label": torch.where(draw < share, null, batch["label"])}


def mirror(batch: Batch, generator: torch.Generator) -> Batch:
    """Mirror each image left to right, or not, with equal probability; "image" (B, C, H, W)."""
    image = batch["image"]
    draw = torch.rand(len(image), 1, 1, 1, generator=generator, device=generator.device)
    return {**batch, "image": torch.where(draw < 0.5, image.flip(-1), image)}


def shift(batch: Batch, generator: torch.Generator, *, pixels: int) -> Batch:
    """Move each image by up to `pixels` along both axes; its border is repeated where it leaves.

    Args:
        batch:      "image" (B, C, H, W), among others
        generator:  on the batch's device
        pixels:     largest move, in pixels or in cells of a latent
    """
    image = batch["image"]
    B, _, H, W = image.shape
    moves = torch.randint(
        -pixels, pixels + 1, (2, B, 1), generator=generator, device=generator.device
    )
    rows = (torch.arange(H, device=image.device) + moves[0]).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=image.device) + moves[1]).clamp(0, W - 1)  # (B, W)
    samples = torch.arange(B, device=image.device)[:, None, None]
    moved = image.movedim(1, -1)[samples, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return {**batch, "image": moved.movedim(-1, 1).contiguous()}
