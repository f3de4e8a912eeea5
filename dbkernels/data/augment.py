"""Random changes of a batch, each a function of the draw of its step, sample by sample.

A sample's change does not depend on the samples beside it, so a batch may be cut anywhere.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dbkernels.data.images import Batch
from dbkernels.ops.philox import Draw, stream_seed, uniforms

DROP, MIRROR, ROWS, COLUMNS = range(4)  # what a number is for; each purpose has a stream of its own


def drop_conditions(
    batch: Batch, draw: Draw, *, share: float, unconditional: Callable[[Batch], Batch]
) -> Batch:
    """Have a share of the samples ask for nothing, so that guidance has both to subtract.

    Ho & Salimans 2022 (arXiv:2207.12598), algorithm 1.

    Args:
        batch:          of a family that has such a batch
        draw:           of the batch's samples
        share:          probability of each sample's condition to be dropped
        unconditional:  the family's: the same batch, of which no sample asks for anything
    """
    nothing = unconditional(batch)
    asked = {name: tensor for name, tensor in batch.items() if nothing[name] is not tensor}
    # a number may be 1 and is never 0
    dropped = _numbers(draw, DROP, next(iter(asked.values()))) <= share
    return batch | {
        name: torch.where(dropped.view(-1, *[1] * (tensor.dim() - 1)), nothing[name], tensor)
        for name, tensor in asked.items()
    }


def mirror(batch: Batch, draw: Draw) -> Batch:
    """Mirror each image left to right, or not, with equal probability; "image" (B, C, H, W)."""
    image = batch["image"]
    mirrored = (_numbers(draw, MIRROR, image) <= 0.5)[:, None, None, None]
    return {**batch, "image": torch.where(mirrored, image.flip(-1), image)}


def shift(batch: Batch, draw: Draw, *, pixels: int) -> Batch:
    """Move each image by up to `pixels` along both axes; its border is repeated where it leaves.

    Args:
        batch:   "image" (B, C, H, W), among others
        draw:    of the batch's samples
        pixels:  largest move, in pixels or in cells of a latent
    """
    image = batch["image"]
    B, _, H, W = image.shape
    moves = (_numbers(draw, axis, image)[:, None] for axis in (ROWS, COLUMNS))
    down, right = (((2 * pixels + 1) * move).ceil().long() - pixels - 1 for move in moves)
    rows = (torch.arange(H, device=image.device) + down).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=image.device) + right).clamp(0, W - 1)  # (B, W)
    samples = torch.arange(B, device=image.device)[:, None, None]
    moved = image.movedim(1, -1)[samples, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return {**batch, "image": moved.movedim(-1, 1).contiguous()}


def _numbers(draw: Draw, purpose: int, like: Tensor) -> Tensor:
    """(B,) uniform in (0, 1], independent of the noise and of the numbers of other purposes."""
    own = replace(draw, seed=stream_seed(draw.seed, purpose))
    return uniforms(own, len(like), device=like.device)
