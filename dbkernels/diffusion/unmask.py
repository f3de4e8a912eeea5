"""Sampling of masked tokens: at each step some of them open, and an open one never changes.

From time t to s a masked token opens with probability (alpha_s - alpha_t) / (1 - alpha_t), which is
1 - s / t of the levels, and is then a draw from the answered probabilities. Shi et al. 2024
(arXiv:2406.04329), section 4.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dbkernels.diffusion.masked import MASK
from dbkernels.diffusion.samplers import Denoiser
from dbkernels.diffusion.sharpen import check_sharpening, sharpened
from dbkernels.ops.philox import Draw, uniforms


@torch.no_grad()
def unmask(
    denoiser: Denoiser,
    tokens: Tensor,
    levels: Sequence[float],
    draw: Draw,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """Open masked tokens step by step.

    Args:
        denoiser:     (tokens, level) -> probabilities (B, T, V) of each place's token, asked
                      once for each level
        tokens:       (B, T) int64; MASK where a token is wanted, others are a prompt and stay
        levels:       shares of masked tokens, descending in (0, 1], as `Masked.grid` gives them;
                      what is still masked at the last one opens there
        draw:         names the choices; a sample depends on its own place in the draw alone
        temperature:  of the answered probabilities, at every level, as for `sharpened`
        top_p:        likewise
    Returns:
        (B, T) int64, without MASK.
    Raises:
        ValueError: levels, temperature or top_p are not as above.
    """
    _check(levels)
    check_sharpening(temperature, top_p)
    B, T = tokens.shape
    opening = [1 - following / level for level, following in pairwise(levels)]
    for step, (level, share) in enumerate(zip(levels, [*opening, 1.0], strict=True)):
        probability = denoiser(tokens, level)
        u = uniforms(draw.nth(2 * step), B, T, device=tokens.device)
        opens = (tokens == MASK) & (u <= share)
        chosen = uniforms(draw.nth(2 * step + 1), B, T, device=tokens.device)[opens]
        probability = sharpened(probability[opens], temperature, top_p)
        tokens = tokens.masked_scatter(opens, choose(probability, chosen))
    return tokens


def choose(probability: Tensor, u: Tensor) -> Tensor:
    """Tokens by the inverse of their cumulative probabilities.

    Args:
        probability:  (N, V)  need not add up to 1
        u:            (N,)    float64 in (0, 1]; uniform numbers draw each token as often as its
                      probability says
    Returns:
        (N,) int64; none has probability 0.
    """
    # float64, so that the sums of a large vocabulary keep its rare tokens
    cumulative = probability.double().cumsum(-1)
    return torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None])[:, 0]


def _check(levels: Sequence[float]) -> None:
    descending = all(a > b for a, b in pairwise(levels))
    if not levels or not descending or not 0 < levels[-1] <= levels[0] <= 1:
        raise ValueError(f"levels must be descending in (0, 1], got {list(levels)}")
