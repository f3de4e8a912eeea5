"""What a text costs under the sampler that would write it.

Every token of a text is sampled given the clean tokens before it, from N starts of pure noise over
M levels, all places at once. Where a token reads the noisy ones before it, as `writes` of a family
says with "whole", these are the text's own with new noise at each level, as when it is written, and
a window is read for one place at a time: PLACES of it. The probability of the token that stands
there is the mean of the last answers' over the starts, with half a count of block 0's first answer:

    p = (sum of p_n + q / 2) / (N + 1 / 2),    q = mean of the first answers

The mean alone would be unbiased for p, but bits are -ln p: where p is spread over paths that end
with a sure answer each, few starts leave too little of it for likely tokens and none for others. So
the bits are too high with few starts, the more so the surer the last answers are (0.6 to 0.8 bits
in a test with 32 starts, point masses, and a uniform q). Compare them with those of another sampler
with as many starts, and never with an exact figure.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dbkernels.data.images import Batch
from dbkernels.diffusion.bridges import Bridge, BridgeName, bridge
from dbkernels.models.registry import family_of
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.philox import Draw
from dbkernels.training.text_bits import Reading, SamplerBits
from dbkernels.training.together import Together

SAMPLER = 0  # names the draws of a sampler among those of an evaluation
PRIOR_COUNT = 0.5  # of block 0's answer
PLACES = 8  # of a window that are sampled where each needs a window of its own


def sampler_bits(
    blocks: Together,
    text: Reading,
    levels: Sequence[float],
    *,
    starts: int,
    name: BridgeName,
) -> SamplerBits:
    """Bits per character of the sampler with some levels.

    Args:
        blocks:  that denoise embeddings
        text:    as it is read
        levels:  descending, inside the blocks' range
        starts:  N
        name:    of the bridge from one level to the next
    """
    across, last, first = bridge(name), 0.0, 0.0
    places = _places(blocks, text.data.length)
    for batch, draw in text.batches(blocks.device):
        total = torch.zeros(
            2, len(batch["token"]), len(places), dtype=torch.float64, device=blocks.device
        )
        for start in range(starts):
            named = replace(draw.nth(SAMPLER), step=start)
            total += _of_start(blocks, batch, places, levels, across, named)
            text.passes.made(len(batch["token"]) * passes_of_start(blocks, text, levels))
        once = total[0] / starts
        smoothed = (total[1] + PRIOR_COUNT * once) / (starts + PRIOR_COUNT)
        first -= float(once.log().sum())
        last -= float(smoothed.log().sum())
    tokens = len(text) * len(places)
    each = text.unit / tokens
    return SamplerBits(last * each, first * each, tuple(levels), starts, name, len(text), tokens)


def passes_of_start(blocks: Together, text: Reading, levels: Sequence[float]) -> int:
    """How often a window is read from one start."""
    windows = len(_places(blocks, text.data.length)) if _reads_noise(blocks) else 1
    return windows * len(levels)


def _reads_noise(blocks: Together) -> bool:
    entry = family_of(blocks.model)
    return entry is not None and entry.writes == "whole"


def _places(blocks: Together, length: int) -> Tensor:
    """Places of a window that are sampled: all, or the middles of so many equal parts."""
    if not _reads_noise(blocks) or length <= PLACES:
        return torch.arange(length, device=blocks.device)
    return torch.arange(1, 2 * PLACES, 2, device=blocks.device) * length // (2 * PLACES)


def _of_start(
    blocks: Together,
    batch: Batch,
    places: Tensor,
    levels: Sequence[float],
    across: Bridge,
    draw: Draw,
) -> Tensor:
    """Probabilities of the tokens in the first answer and in the last, (2, B, places) float64."""
    z, found = blocks.start(batch, levels[0], draw)[:, places], []
    token, table = batch["token"][:, places, None], blocks.model.unit_table()
    answer = _one_by_one if _reads_noise(blocks) else _at_once
    for place, level in enumerate(levels):
        own = draw.nth(place)
        logarithms = answer(blocks, batch, z, places, level, own).float().log_softmax(-1)
        # float64 has a number for what is no more than 0 in float32
        found.append(logarithms.gather(-1, token)[..., 0].double().exp())
        if place + 1 < len(levels):
            z = across(logarithms.exp(), table, z, level, levels[place + 1], own)
    return torch.stack([found[0], found[-1]])


def _at_once(
    blocks: Together, batch: Batch, z: Tensor, places: Tensor, level: float, draw: Draw
) -> Tensor:
    return blocks.predict(batch, z, level)


def _one_by_one(
    blocks: Together, batch: Batch, z: Tensor, places: Tensor, level: float, draw: Draw
) -> Tensor:
    """Logits (B, places, V), each of a window whose other tokens are the text's, with noise."""
    target = blocks.model.target(batch)
    sigma = torch.full((len(target),), level, dtype=torch.float32, device=target.device)
    known = add_noise(target, torch.ones_like(sigma), sigma, draw)
    found = []
    for index, place in enumerate(places.tolist()):
        window = known.clone()
        window[:, place] = z[:, index]
        found.append(blocks.predict(batch, window, level)[:, place])
    return torch.stack(found, dim=1)
