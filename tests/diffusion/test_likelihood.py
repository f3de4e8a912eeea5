import math

import numpy as np
import pytest
import torch

from dbkernels.diffusion.likelihood import Curve, gaussian_bound, masked_bound
from dbkernels.diffusion.masked import Masked

LN2 = math.log(2)
EIGHTHS = torch.arange(0.5, 8, dtype=torch.float64) / 8
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(200)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def spread(process, intervals, shares=EIGHTHS):
    return [process.level_at(interval, shares) for interval in intervals]


def test_a_uniform_model_of_masked_tokens_needs_all_bits_of_the_vocabulary():
    process, vocabulary = Masked(), 27
    intervals = process.intervals(3)
    levels = spread(process, intervals)
    losses = [level.double() * math.log(vocabulary) for level in levels]
    bound = masked_bound(process, intervals, levels, losses, vocabulary)
    each = [nats / LN2 / (1 - 2 * process.eps) for nats in bound.blocks]
    assert each == pytest.approx([1.584963] * 3, abs=1e-6)
    assert bound.nats / LN2 / (1 - process.eps) == pytest.approx(4.754888, abs=1e-6)
    assert bound.reconstruction == pytest.approx(1e-4 * math.log(27))


def test_the_bound_of_masked_tokens_does_not_depend_on_the_schedule_of_times():
    """Of a model whose cross-entropy depends on how many tokens are masked alone."""
    shares = torch.arange(0.5, 4000, dtype=torch.float64) / 4000
    found = []
    for process in (Masked(), Masked("cosine")):
        intervals = process.intervals(2)
        levels = spread(process, intervals, shares)
        losses = [level.double() * (1 + level.double() ** 2) for level in levels]
        bound = masked_bound(process, intervals, levels, losses, 5)
        found.append(bound.blocks)
    # the integrals of 1 + m**2 over [1/2, 1] and [0, 1/2]
    assert found[0] == pytest.approx([19 / 24, 13 / 24], abs=3e-4)
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def two_rows(sigma):
    """Error and cross-entropy of the exact posterior of two rows, +1 and -1, at equal odds."""
    z = 1 + sigma * NODES
    error = WEIGHTS @ (1 - np.tanh(z / sigma**2)) ** 2
    return error, WEIGHTS @ np.log1p(np.exp(-2 * z / sigma**2))


def five_rows(sigma):
    """As two_rows, of five orthogonal rows of length 1 with unequal odds; a Monte Carlo mean."""
    random = np.random.default_rng(0)
    odds = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    row = np.repeat(np.arange(5), 4000)
    noise = random.standard_normal((4000, 5))
    noise = np.tile(np.concatenate([noise[:2000], -noise[:2000]]), (5, 1))
    z = np.eye(5)[row] + sigma * noise
    logits = np.log(odds) + z / sigma**2
    logits -= logits.max(1, keepdims=True)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    each = odds[row] / 4000
    error = ((np.eye(5)[row] - probability) ** 2).sum(1)
    return each @ error, -each @ np.log(probability[np.arange(len(row)), row] + 1e-300)


def curve(posterior, levels):
    errors, cross_entropy = zip(*map(posterior, levels), strict=True)
    return Curve(list(levels), list(errors), list(cross_entropy))


def down(high, low, count):
    levels = np.geomspace(high, low, count).tolist()
    return [high, *levels[1:-1], low]


def test_the_bound_of_two_rows_is_the_published_one_wherever_it_stops():
    ends = (1e3, 2.0, 60), (2.0, 1.0, 21), (1.0, 0.5, 21)
    bound = gaussian_bound([curve(two_rows, down(*each)) for each in ends])
    assert bound.nats == pytest.approx([LN2] * 102, abs=2e-6)
    expected = {2.0: (0.795946, 0.111421, 0.581726), 1.0: (0.449600, 0.336831, 0.356316)}
    expected[0.5] = (0.068597, 0.632720, 0.060427)
    integrals = dict(zip(bound.levels, np.array(bound.nats) - bound.cross_entropy, strict=True))
    for sigma, (error, integral, cross_entropy) in expected.items():
        at = min(bound.levels, key=lambda level: abs(level - sigma))
        assert two_rows(sigma) == pytest.approx((error, cross_entropy), abs=1e-6)
        assert integrals[at] == pytest.approx(integral, abs=2e-6)
    assert bound.blocks == pytest.approx([0.111421, 0.225410, 0.295889], abs=2e-6)
    assert bound.at_most_noise == bound.cross_entropy[0] == pytest.approx(LN2, abs=1e-5)
    assert bound.down_to_least == bound.nats[-1]


def test_the_bound_of_five_rows_is_flat_at_the_entropy():
    curves = [curve(five_rows, down(50.0, 0.6, 15)), curve(five_rows, down(0.6, 0.15, 8))]
    odds = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    entropy = -(odds @ np.log(odds))
    nats = gaussian_bound(curves).nats
    assert nats == pytest.approx([entropy] * 23, abs=6e-3)


def test_a_worse_block_is_left_out_by_the_best_stop():
    good, bad = curve(two_rows, down(100.0, 1.0, 30)), curve(two_rows, down(1.0, 0.2, 20))
    worse = Curve(bad.levels, [2 * x for x in bad.errors], bad.cross_entropy)
    bound = gaussian_bound([good, worse])
    level, nats = bound.best
    assert level >= 1.0 and nats == pytest.approx(LN2, abs=1e-4)
    assert bound.down_to_least > LN2 + 0.3
    assert bound.blocks[1] == pytest.approx(2 * gaussian_bound([good, bad]).blocks[1])


def test_what_lies_beyond_the_greatest_level_counts_too():
    near = gaussian_bound([curve(two_rows, down(4.0, 1.0, 9))])
    assert near.nats[0] - near.cross_entropy[0] == pytest.approx(1 / 32)
    longer = gaussian_bound([curve(two_rows, down(4.0, 1.0, 9))], squared_norm=3.0)
    assert longer.nats[0] - near.nats[0] == pytest.approx(2 / 32)


HALVES = Masked().intervals(2)
SOME = torch.tensor([0.2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: masked_bound(Masked(), HALVES, [SOME] * 2, [SOME] * 2, 0),
            "vocabulary must be at least 1, got 0",
        ),
        (
            lambda: masked_bound(Masked(), HALVES[::-1], [SOME] * 2, [SOME] * 2, 3),
            r"blocks must tile the levels from the most noise down, got \[\(0.5, 0.0001\)",
        ),
        (lambda: masked_bound(Masked(), HALVES[:1], [SOME], [SOME], 3), "blocks must tile"),
        (
            lambda: masked_bound(Masked(), [Masked().range], [SOME], [SOME.expand(2)], 3),
            r"at least one level and a loss for each, got \(1,\) levels and \(2,\) losses",
        ),
        (
            lambda: masked_bound(Masked(), [Masked().range], [SOME[:0]], [SOME[:0]], 3),
            "at least one level",
        ),
        (lambda: Curve([1.0], [1.0], [1.0]), "at least 2 levels, .* got 1, 1 and 1"),
        (lambda: Curve([2.0, 1.0], [1.0], [1.0, 1.0]), "at each, got 2, 1 and 2"),
        (lambda: Curve([1.0, 1.0], [1.0] * 2, [1.0] * 2), "descending and positive, got"),
        (lambda: Curve([1.0, 0.0], [1.0] * 2, [1.0] * 2), "descending and positive, got"),
        (lambda: gaussian_bound([]), "blocks must tile"),
        (
            lambda: gaussian_bound([curve(two_rows, (4.0, 2.0)), curve(two_rows, (1.0, 0.5))]),
            r"blocks must tile .*, got \[\(4.0, 2.0\), \(1.0, 0.5\)\]",
        ),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
