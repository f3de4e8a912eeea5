import math
from itertools import pairwise

import pytest
import torch

from dbkernels.diffusion.bridges import bridge
from dbkernels.ops import Draw

ODDS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
TABLE = torch.eye(5, dtype=torch.float64)
DRAW = Draw(seed=2, step=7)


def posterior(z, level):
    """Of five orthogonal rows of length 1: the exact probabilities of each, given z."""
    return (ODDS.log() + z @ TABLE.T / level**2).softmax(-1)


@pytest.mark.parametrize(
    ("name", "row"), [("soft", [0.25, 0.0, 0.75]), ("argmax", [0, 0, 1]), ("sample", [0, 0, 1])]
)
def test_a_step_goes_from_z_towards_the_row_as_far_as_the_level_falls(name, row):
    probabilities = torch.tensor([0.25, 0.0, 0.75]).expand(2, 4, 3)
    z = torch.randn(2, 4, 3)
    crossed = bridge(name)(probabilities, torch.eye(3), z, 2.0, 0.5, DRAW)
    assert crossed.dtype == z.dtype
    expected = 0.25 * z + 0.75 * torch.tensor(row, dtype=torch.float32)
    # a token that drew the other word is as far from it
    other = 0.25 * z + 0.75 * torch.tensor([1.0, 0.0, 0.0])
    near = [(crossed - each).abs().amax(-1) < 1e-6 for each in (expected, other)]
    assert near[0].all() if name != "sample" else (near[0] | near[1]).all()


def test_a_row_is_drawn_as_often_as_its_probability_says():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(200, 50, 4)
    rows = bridge("sample")(probabilities, torch.eye(4), torch.zeros(200, 50, 4), 1.0, 0.0, DRAW)
    assert rows.sum(-1).eq(1).all()
    # four standard deviations of 10,000 tokens
    assert rows.mean((0, 1)).tolist() == pytest.approx([0.5, 0, 0.3, 0.2], abs=0.02)


@pytest.mark.parametrize("shape", [(4, 6), (4,), (4, 2, 3)])
def test_a_token_depends_on_its_own_place_in_the_draw_alone(shape):
    probabilities, z = torch.rand(*shape, 5), torch.randn(*shape, 5)
    crossed = bridge("sample")
    whole = crossed(probabilities, TABLE.float(), z, 1.0, 0.5, DRAW)
    alone = [
        crossed(probabilities[i, None], TABLE.float(), z[i, None], 1.0, 0.5, Draw(2, 7, i))
        for i in range(4)
    ]
    assert torch.equal(torch.cat(alone), whole)
    assert not torch.equal(crossed(probabilities, TABLE.float(), z, 1.0, 0.5, Draw(2, 8)), whole)


def sampled_words(name, count=20_000):
    """Words that an exact posterior leads to in four levels, from the mixture at the first."""
    levels, across = [3.0, 0.8, 0.4, 0.15], bridge(name)
    generator = torch.Generator().manual_seed(1)
    start = torch.multinomial(ODDS, count, replacement=True, generator=generator)
    noise = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    z = (TABLE[start] + levels[0] * noise)[None]
    for step, (level, following) in enumerate(pairwise(levels)):
        z = across(posterior(z, level), TABLE, z, level, following, Draw(0, step))
    drawn = bridge("sample")(posterior(z, levels[-1]), TABLE, z, 1.0, 0.0, Draw(0, 9))
    return torch.bincount(drawn[0].argmax(-1), minlength=5)


def chi_square(counts):
    expected = ODDS * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_sample_keeps_the_law_of_an_exact_posterior_and_the_others_do_not():
    # one in a thousand of a chi-square of four degrees is above 18.5
    assert chi_square(sampled_words("sample")) < 18.5
    assert chi_square(sampled_words("argmax")) > 1000
    assert chi_square(sampled_words("soft")) > 30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bridge("hard"), "bridge must be one of soft, argmax, sample, got hard"),
        (
            lambda: bridge("soft")(ODDS[None], TABLE, TABLE[:1], 1.0, 1.0, DRAW),
            "0 <= following < level, got level 1.0 and following 1.0",
        ),
        (
            lambda: bridge("soft")(ODDS[None], TABLE, TABLE[:1], 1.0, math.nan, DRAW),
            "got level 1.0 and following nan",
        ),
        (lambda: bridge("soft")(ODDS[None], TABLE, TABLE[:1], 1.0, -0.1, DRAW), "following -0.1"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
