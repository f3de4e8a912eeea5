"""Probabilities of words made sharper: by a temperature, and by leaving the least likely out."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sharpened(probability: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Probabilities to the power of 1 / temperature, of which the likeliest words are kept.

    Nucleus sampling: Holtzman et al. 2020 (arXiv:1904.09751).

    Args:
        probability:  (..., V)  need not add up to 1
        temperature:  at least 0; at 0 the likeliest word alone is left
        top_p:        in (0, 1]; words are kept, the likeliest first, until they have so much of the
                      probability, with the word that brings them there; 1 keeps all
    Returns:
        (..., V) float64, which adds up to 1.
    Raises:
        ValueError: temperature or top_p is not as above.
    """
    check_sharpening(temperature, top_p)
    p = probability.double()
    if temperature == 0:
        return F.one_hot(p.argmax(-1), p.shape[-1]).double()
    logarithm = p.log()
    # from the likeliest on, so that no small temperature leaves them all at minus infinity
    p = ((logarithm - logarithm.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ordered, words = p.sort(dim=-1, descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(likelier >= top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, words, kept)
    return p / p.sum(-1, keepdim=True)


def check_sharpening(temperature: float, top_p: float) -> None:
    """Refuse what `sharpened` cannot do.

    Raises:
        ValueError: temperature is negative or not finite, or top_p is not in (0, 1].
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
