"""What a text costs under the sampler that would write it.

Every token of a text is sampled given the clean tokens before it, from N starts of pure noise over
M levels, all places at once. The probability of the token that stands there is the mean of the last
answers' over the starts, with half a count of block 0's first answer:

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
from dbkernels.ops.philox import Draw
from dbkernels.training.text_bits import Reading, SamplerBits
from dbkernels.training.together import Together

SAMPLER = 0  # names the draws of a sampler among those of an evaluation
PRIOR_COUNT = 0.5  # of block 0's answer


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
    across, table = bridge(name), blocks.model.unit_table()
    last = first = 0.0
    for batch, draw in text.batches(blocks.device):
        total = torch.zeros(2, *batch["token"].shape, dtype=torch.float64, device=blocks.device)
        for start in range(starts):
            named = replace(draw.nth(SAMPLER), step=start)
            total += _of_start(blocks, batch, table, levels, across, named)
        once = total[0] / starts
        smoothed = (total[1] + PRIOR_COUNT * once) / (starts + PRIOR_COUNT)
        first -= float(once.log().sum())
        last -= float(smoothed.log().sum())
    each = text.unit / text.tokens
    return SamplerBits(last * each, first * each, tuple(levels), starts, name, len(text))


def _of_start(
    blocks: Together,
    batch: Batch,
    table: Tensor,
    levels: Sequence[float],
    across: Bridge,
    draw: Draw,
) -> Tensor:
    """Probabilities of the tokens in the first answer and in the last, (2, B, S) float64."""
    z, found = blocks.start(batch, levels[0], draw), []
    for place, level in enumerate(levels):
        logarithms = blocks.predict(batch, z, level).float().log_softmax(-1)
        # float64 has a number for what is no more than 0 in float32
        found.append(logarithms.gather(-1, batch["token"][..., None])[..., 0].double().exp())
        if place + 1 < len(levels):
            following = levels[place + 1]
            z = across(logarithms.exp(), table, z, level, following, draw.nth(place))
    return torch.stack([found[0], found[-1]])
