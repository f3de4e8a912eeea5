import math

import pytest
import torch
from scipy import optimize, stats

from dbkernels.diffusion.flow import Flow
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.path import EXPLODING, PRESERVING, STRAIGHT, at
from dbkernels.diffusion.samplers import SAMPLERS, dpmpp_2m, euler
from dbkernels.diffusion.timesteps import Timesteps

GRID = LogNormal().grid(6)
PROCESSES = [LogNormal(), Flow(), Flow(t_max=0.9), Timesteps()]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=str)
each_sampler = pytest.mark.parametrize("sampler", [each.run for each in SAMPLERS.values()])


@each_process
@each_sampler
def test_a_perfect_denoiser_lands_on_the_target_with_the_next_noise(sampler, process):
    y, noise = torch.randn(2, 5, dtype=torch.float64)
    levels, seen = process.grid(6, process.close), {}

    def perfect(z, level):
        seen.setdefault(level, z)
        return y

    def noisy(level):
        a, s = at(process.path, level)
        return a * y + s * noise

    assert torch.equal(sampler(perfect, noisy(levels[0]), levels, process.path), y)
    assert list(seen) == levels
    for level, z in seen.items():
        torch.testing.assert_close(z, noisy(level))


@pytest.mark.parametrize(("name", "count"), [("euler", 6), ("heun", 11), ("dpmpp_2m", 6)])
def test_heun_alone_evaluates_each_inner_level_twice(name, count):
    levels = []
    denoiser = lambda z, level: levels.append(level) or z / 2  # noqa: E731
    SAMPLERS[name].run(denoiser, torch.ones(1), GRID, EXPLODING)
    assert len(levels) == count and sorted(set(levels), reverse=True) == GRID


# a mixture of two normals: shares, means and standard deviations
MIXTURE = [(0.3, -0.8, 0.3), (0.7, 0.6, 0.5)]
RANGES = {EXPLODING: (5.0, 0.1), STRAIGHT: (0.95, 0.05), PRESERVING: (900.0, 100.0)}


def posterior_mean(z, a, s):
    """E[z0 | z] of the mixture, z = a z0 + s noise."""
    weights, means = [], []
    for share, mean, std in MIXTURE:
        variance = (a * std) ** 2 + s**2
        density = (-((z - a * mean) ** 2) / variance / 2).exp() / variance**0.5
        weights.append(share * density)
        means.append(mean + a * std**2 / variance * (z - a * mean))
    total = sum(weights)
    return sum(w * m for w, m in zip(weights, means, strict=True)) / total


def cdf(z, a, s):
    spreads = [(share, a * mean, math.hypot(a * std, s)) for share, mean, std in MIXTURE]
    return sum(share * stats.norm.cdf(z, mean, spread) for share, mean, spread in spreads)


def error(sampler, path, count):
    """Of the noisy sample at the last level, whose quantile is that of the first: no two cross."""
    high, low = RANGES[path]
    # evenly in what falls by no large factor at the end
    power = 1 / 7 if path == EXPLODING else 1
    even = torch.linspace(high**power, low**power, count, dtype=torch.float64)
    levels = (even ** (1 / power)).tolist()
    (a, s), (last_a, last_s) = at(path, high), at(path, low)
    q, seen = cdf(0.3, a, s), {}

    def denoiser(z, level):
        seen.setdefault(level, z)
        return posterior_mean(z, *at(path, level))

    sampler(denoiser, torch.full((1,), 0.3, dtype=torch.float64), levels, path)
    exact = optimize.brentq(lambda z: cdf(z, last_a, last_s) - q, -5, 5, xtol=1e-13)
    return abs(seen[levels[-1]].item() - exact)


@pytest.mark.parametrize("path", RANGES, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_error_at_the_end_falls_with_the_order_of_the_sampler(name, order, path):
    coarse, fine = (error(SAMPLERS[name].run, path, count) for count in (301, 601))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_euler_on_a_straight_path_follows_the_velocity():
    levels, z = [1.0, 0.7, 0.2], torch.randn(4, dtype=torch.float64)
    velocity = lambda z, t: torch.sin(z) + t  # noqa: E731
    found = euler(lambda z, t: z - t * velocity(z, t), z, levels, STRAIGHT)
    for t, following in ((1.0, 0.7), (0.7, 0.2), (0.2, 0.0)):
        z = z + (following - t) * velocity(z, t)
    torch.testing.assert_close(found, z)


def test_the_multistep_solver_is_that_of_its_paper():
    levels, z = [900.0, 600.0, 350.0, 200.0], torch.randn(4, dtype=torch.float64)
    (a, s), *points = [at(PRESERVING, level) for level in levels]
    log_ratio, h_before, before = math.log(a / s), None, None
    expected = z
    for level, (next_a, next_s) in zip(levels, points, strict=False):
        # arXiv:2211.01095, algorithm 2
        D, h = torch.tanh(expected) * level / 1000, math.log(next_a / next_s) - log_ratio
        if before is not None:
            r = h_before / h
            line = (1 + 1 / (2 * r)) * D - 1 / (2 * r) * before
        else:
            line = D
        expected = next_s / s * expected - next_a * math.expm1(-h) * line
        log_ratio, h_before, before, s = log_ratio + h, h, D, next_s
    expected = torch.tanh(expected) * levels[-1] / 1000
    found = dpmpp_2m(lambda z, t: torch.tanh(z) * t / 1000, z, levels, PRESERVING)
    torch.testing.assert_close(found, expected)


@each_process
def test_start_has_the_spread_of_the_noisiest_marginal(process):
    level = process.range.high
    a, s = at(process.path, level)
    z = process.start(torch.randn(50_000), level, 4.0)
    assert z.std().item() == pytest.approx(math.hypot(4 * a, s), rel=0.02)


@each_sampler
@pytest.mark.parametrize(
    ("path", "levels"),
    [
        (EXPLODING, []),
        (EXPLODING, [1.0, 1.0]),
        (EXPLODING, [1.0, 2.0]),
        (EXPLODING, [1.0, 0.0]),
        (EXPLODING, [math.inf, 1.0]),
        (STRAIGHT, [1.1, 0.5]),
        (STRAIGHT, [1.0, 0.0]),
        (PRESERVING, [999.0, -2.0]),
    ],
)
def test_rejects_levels_that_are_not_descending_and_on_the_path(sampler, path, levels):
    with pytest.raises(ValueError, match="levels must be descending and on the path, got"):
        sampler(lambda z, level: z, torch.ones(1), levels, path)
