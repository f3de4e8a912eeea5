from itertools import pairwise

import pytest
import torch

from dbkernels.diffusion.masked import MASK, Masked
from dbkernels.diffusion.unmask import unmask
from dbkernels.ops import Draw

PROCESS, DRAW = Masked(), Draw(seed=4, step=1)
PROBABILITY = torch.tensor([0.3, 0.0, 0.5, 0.2])


def independent(tokens, level):
    return PROBABILITY.expand(*tokens.shape, 4)


def by_neighbour(tokens, level):
    """Probabilities that depend on the sample's own open tokens and on the time."""
    seen = torch.where(tokens == MASK, 0, tokens + 1).sum(1)
    logits = torch.arange(4) * (level + seen[:, None] % 3)
    return logits.softmax(-1)[:, None].expand(*tokens.shape, 4)


def blank(B=3, T=8):
    return torch.full((B, T), MASK)


@pytest.mark.parametrize("process", [PROCESS, Masked("cosine"), Masked(eps=0.1)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_token_is_open_at_the_end(process, count):
    for seed in range(20):
        tokens = unmask(independent, blank(), process.grid(count), Draw(seed, 0))
        assert tokens.dtype == torch.int64 and set(tokens.unique().tolist()) <= {0, 2, 3}


def test_an_open_token_never_changes_and_a_prompt_stays():
    seen, start = [], blank()
    start[:, 2:4] = torch.tensor([3, 1])

    def watched(tokens, level):
        seen.append(tokens)
        return by_neighbour(tokens, level)

    seen.append(unmask(watched, start, PROCESS.grid(6), DRAW))
    assert torch.equal(seen[0], start) and len(seen) == 7
    for before, after in pairwise(seen):
        open_before = before != MASK
        assert torch.equal(after[open_before], before[open_before])
    assert len({int((tokens != MASK).sum()) for tokens in seen}) > 4
    assert (start == MASK).sum() == 18


def test_levels_are_asked_for_once_each_from_the_first():
    levels = []
    unmask(lambda z, level: levels.append(level) or independent(z, level), blank(), [1, 0.5], DRAW)
    assert levels == [1, 0.5]


def test_as_many_tokens_stay_masked_as_the_levels_say():
    shares, levels, many = [], [0.9999, 0.7, 0.4, 0.1], blank(200, 50)

    def watched(tokens, level):
        shares.append((tokens == MASK).double().mean().item())
        return independent(tokens, level)

    unmask(watched, many, levels, DRAW)
    # all are masked at first; four standard deviations of 10,000 tokens
    assert shares == pytest.approx([1, *levels[1:]], abs=0.02)


def test_tokens_come_as_often_as_their_probabilities_say():
    tokens = unmask(independent, blank(200, 50), PROCESS.grid(3), DRAW)
    shares = torch.bincount(tokens.flatten(), minlength=4) / tokens.numel()
    torch.testing.assert_close(shares, PROBABILITY, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("sharpening", "expected"),
    [
        ({"temperature": 0.5}, [9 / 38, 0, 25 / 38, 4 / 38]),
        ({"temperature": 1e-5}, [0, 0, 1, 0]),
        ({"temperature": 0.0}, [0, 0, 1, 0]),
        ({"temperature": 1e9}, [1 / 3, 0, 1 / 3, 1 / 3]),
        ({"top_p": 0.7}, [3 / 8, 0, 5 / 8, 0]),
    ],
)
def test_what_is_answered_is_made_sharper_before_a_token_is_drawn(sharpening, expected):
    tokens = unmask(independent, blank(200, 50), [1.0], DRAW, **sharpening)
    shares = torch.bincount(tokens.flatten(), minlength=4) / tokens.numel()
    assert shares.tolist() == pytest.approx(expected, abs=0.02)


def test_a_sample_depends_on_its_own_place_in_the_draw_alone():
    grid = PROCESS.grid(5)
    whole = unmask(by_neighbour, blank(4), grid, DRAW)
    alone = [unmask(by_neighbour, blank(1), grid, Draw(4, 1, sample)) for sample in range(4)]
    assert torch.equal(torch.cat(alone), whole)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(unmask(by_neighbour, blank(4), grid, Draw(4, 2)), whole)


@pytest.mark.parametrize(
    ("levels", "sharpening", "message"),
    [
        ([], {}, r"levels must be descending in \(0, 1\], got \[\]"),
        ([1.0, 1.0], {}, "levels must be descending"),
        ([0.5, 0.0], {}, "levels must be descending"),
        ([1.5, 0.5], {}, r"levels must be .*, got \[1.5, 0.5\]"),
        ([1.0], {"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
        ([1.0], {"temperature": float("nan")}, "temperature must be finite and at least 0, got n"),
        ([1.0], {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ],
)
def test_rejects(levels, sharpening, message):
    with pytest.raises(ValueError, match=message):
        unmask(independent, blank(), levels, DRAW, **sharpening)
