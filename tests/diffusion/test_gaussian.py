import math
from itertools import pairwise

import pytest
import torch
from scipy import integrate, stats

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.prediction import EDM
from dbkernels.diffusion.process import Interval

PRIOR = LogNormal()
HALF = torch.tensor([0.5], dtype=torch.float64)


def boundaries(intervals):
    return [intervals[0].high, *(interval.low for interval in intervals)]


def test_the_range_cuts_off_the_published_mass_and_quantiles_invert_it():
    assert PRIOR.cdf(PRIOR.sigma_min) == pytest.approx(1.464998e-5, rel=1e-6)
    assert PRIOR.cdf(PRIOR.sigma_max) == pytest.approx(0.99999835, abs=5e-9)
    for sigma in (0.01, 0.3, 5.0):
        assert PRIOR.quantile(PRIOR.cdf(sigma)) == pytest.approx(sigma, rel=1e-12)


# arXiv:2506.14202, section 3.3, with the constants of its appendix E
@pytest.mark.parametrize(
    ("scheme", "inner"),
    [
        ("equal_probability", [0.301200]),
        ("equal_probability", [0.505041, 0.179632]),
        ("equal_probability", [0.676649, 0.301200, 0.134076]),
        ("equal_probability", [0.961665, 0.505041, 0.301200, 0.179632, 0.094340]),
        ("log_uniform", [2.339214, 0.068399]),
        ("linear", [53.334, 26.668]),
    ],
)
def test_intervals_are_the_published_ones_and_tile_the_range(scheme, inner):
    intervals = PRIOR.intervals(len(inner) + 1, scheme)
    assert boundaries(intervals) == pytest.approx([80, *inner, 0.002], rel=1e-6, abs=5e-7)
    assert (intervals[-1].low, intervals[0].high) == (PRIOR.sigma_min, PRIOR.sigma_max)
    assert all(upper.low == lower.high for upper, lower in pairwise(intervals))


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 12])
def test_equal_probability_intervals_hold_equal_mass(num_blocks):
    for interval in PRIOR.intervals(num_blocks):
        assert PRIOR.mass(interval) == pytest.approx(1 / num_blocks, rel=1e-9)


@pytest.mark.parametrize(
    ("gamma", "expected", "masses"),
    [
        (0.05, [(0.39205, 80), (0.17058, 0.53183), (0.002, 0.22493)], [0.413, 0.364, 0.404]),
        (
            0.1,
            [(0.41985, 80), (0.27778, 0.73369), (0.12365, 0.32659), (0.002, 0.20417)],
            [0.391, 0.298, 0.298, 0.373],
        ),
    ],
)
def test_overlap_is_the_published_one_and_none_changes_nothing(gamma, expected, masses):
    intervals = PRIOR.intervals(len(expected))
    for interval, ends, mass in zip(intervals, expected, masses, strict=True):
        wide = PRIOR.widen(interval, gamma)
        assert (wide.low, wide.high) == pytest.approx(ends, abs=5e-6)
        assert PRIOR.mass(wide) == pytest.approx(mass, abs=5e-4)
        assert PRIOR.widen(interval, 0.0) == interval


def test_levels_at_uniform_numbers_are_those_of_a_truncated_log_normal():
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    for prior in (PRIOR, LogNormal(mean=0.4, std=0.7, sigma_min=0.1, sigma_max=20)):
        for interval in (*prior.intervals(3), prior.range, Interval(0.3, 0.3000001)):
            ends = [(math.log(s) - prior.mean) / prior.std for s in (interval.low, interval.high)]
            expected = prior.mean + prior.std * stats.truncnorm.ppf(u.numpy(), *ends)
            sigma = prior.level_at(interval, u)
            assert sigma.dtype == torch.float32
            assert sigma.log().tolist() == pytest.approx(expected.tolist(), abs=3e-7)
            low, high = torch.tensor([interval.low, interval.high])
            assert low <= sigma.min() and sigma.max() <= high


def test_levels_at_the_ends_are_above_low_and_up_to_high():
    u = torch.tensor([0.0, 2.0**-54, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    # of the lows and of the highs, float32 has one exactly, rounds one up and one down
    for low in (0.25, 0.3, 0.7):
        for high in (1.5, 1.1, 1.2):
            sigma = PRIOR.level_at(Interval(low, high), u).double()
            assert low < sigma[0] <= sigma[1] < low * (1 + 2.0**-22)
            assert high * (1 - 2.0**-22) < sigma[2] <= sigma[3] <= high


SETTINGS = [
    {"mean": mean, "std": 10.0**power, "sigma_min": least, "sigma_max": most}
    for mean in (-1.2, 0.0, 3.0, -9.0)
    for power in (-7, -5, -3, -1, 0, 1, 3, 5)
    for least, most in ((0.002, 80.0), (1e-9, 1e9), (0.3, 0.31))
]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 12])
def test_a_prior_draws_inside_its_blocks_intervals_or_names_what_is_wrong(num_blocks):
    u, drawn = torch.rand(256, dtype=torch.float64), 0
    for setting in SETTINGS:
        try:
            prior = LogNormal(**setting)
            intervals = prior.intervals(num_blocks)
        except ValueError as error:
            assert "std" in str(error), setting
            continue
        drawn += 1
        for interval in intervals:
            for gamma in (0.0, 0.05, 1e3, 1e300):
                wide = prior.widen(interval, gamma)
                assert wide.low <= interval.low and interval.high <= wide.high
            sigma, ends = prior.level_at(interval, u), torch.tensor([interval.low, interval.high])
            assert ends[0] <= sigma.min() and sigma.max() <= ends[1], (setting, interval)
            assert 0 < prior.mean_weight(interval, EDM(0.5)) < math.inf
    assert drawn > len(SETTINGS) // 3


@pytest.mark.parametrize("std", [0.3, 1.2, 2.5, 4.0, 5.0, 50.0, 1e5])
def test_the_mean_weight_is_the_integral_also_where_the_prior_is_wide(std):
    prior = LogNormal(std=std)
    for interval in prior.intervals(3):
        ends = [math.log(interval.low), math.log(interval.high)]

        def density(x):
            return math.exp(-(((x - prior.mean) / prior.std) ** 2) / 2)

        def weighted(x):
            return density(x) * float(prior.weight(torch.tensor(math.exp(x)).double(), EDM(0.5)))

        (mass, _), (total, _) = (integrate.quad(f, *ends, limit=200) for f in (density, weighted))
        assert prior.mean_weight(interval, EDM(0.5)) == pytest.approx(total / mass, rel=1e-5)


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_the_cdf_grid_has_equal_mass_between_levels_and_meets_boundaries_exactly(count):
    expected = boundaries(PRIOR.intervals(count - 1))
    assert PRIOR.grid(count) == pytest.approx(expected, abs=5e-6)
    assert PRIOR.grid(7)[2:-1:2] == boundaries(PRIOR.intervals(3))[1:-1]


def test_karras_grid_is_the_published_one():
    grid = PRIOR.grid(18, "karras")
    assert (grid[0], grid[-1]) == (80.0, 0.002)
    # Karras et al. 2022, equation 5, at i = 1 of 18
    root = 80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17
    assert grid[1] == pytest.approx(root**7, rel=1e-12)
    assert grid[1] == pytest.approx(57.586, abs=1e-3)


def test_a_range_that_holds_little_of_the_prior_is_one_until_quantiles_cannot_be_told():
    far = LogNormal(mean=math.log(80) + 5.5, std=1.0)  # 2e-8 of it lies below sigma_max
    assert far.mass(far.range) == 1 and len(far.intervals(2)) == 2
    with pytest.raises(ValueError, match="mean and std must put levels between"):
        LogNormal(mean=math.log(80) + 6.2, std=1.0)  # 3e-10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LogNormal(sigma_min=2, sigma_max=1),
            "sigma_max <= .*, got sigma_min 2",
        ),
        (lambda: LogNormal(sigma_min=1, sigma_max=1), "<= sigma_min < sigma_max <="),
        (lambda: LogNormal(sigma_min=0), "1e-09 <= sigma_min"),
        (lambda: LogNormal(sigma_max=math.inf), "<= 1000000000.0, got .* sigma_max inf"),
        (lambda: LogNormal(std=0), "std positive and finite, got mean -1.2 and std 0"),
        (lambda: LogNormal(mean=10, std=0.1), r"mean and std must put levels between .* std 0.1$"),
        (lambda: LogNormal(std=1e300), r"mean and std must put levels between .* std 1e\+300$"),
        (
            lambda: LogNormal(std=1e-9).intervals(3),
            "std and the range must be large enough for 3 blocks",
        ),
        (lambda: LogNormal(mean=math.nan), "mean must be finite"),
        (lambda: PRIOR.intervals(0), "num_blocks must be at least 1, got 0"),
        (lambda: PRIOR.intervals(2, "cubic"), "scheme must be one of .*, got cubic"),
        (lambda: PRIOR.widen(PRIOR.range, -0.1), "gamma must be finite and at least 0, got -0.1"),
        (lambda: PRIOR.widen(PRIOR.range, math.nan), "gamma must be finite"),
        (lambda: PRIOR.level_at(Interval(0.001, 1), HALF), r"must lie in \[0.002, 80.0\]"),
        (lambda: PRIOR.level_at(Interval(1, 81), HALF), r"must lie in .*1, 81"),
        (lambda: PRIOR.level_at(PRIOR.range, HALF.float()), "u must be torch.float64, got torch"),
        (lambda: PRIOR.grid(5, "even"), "spacing must be cdf or karras, got even"),
        (lambda: PRIOR.grid(1), "levels must be at least 2, got 1"),
        (lambda: PRIOR.grid(10_001), "levels must be at most 10000, got 10001"),
        (lambda: PRIOR.grid(5, "karras", rho=0), "rho must be positive, got 0"),
        (lambda: Interval(1.0, 1.0), "needs low < high, got low"),
        (lambda: Interval(2.0, 1.0), "needs low < high, got low"),
        (lambda: Interval(math.nan, 1.0), "needs low < high, got low"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
