import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy import integrate

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.masked import MASK, Masked
from dbkernels.diffusion.process import Interval
from dbkernels.ops import Draw, uniforms

LINEAR, COSINE = Masked(), Masked("cosine")
HALF = torch.tensor([0.5], dtype=torch.float64)
TIMES = torch.linspace(0, 1, 21, dtype=torch.float64)
DRAW = Draw(seed=3, step=8, sample=5)
both = pytest.mark.parametrize("process", [LINEAR, COSINE])


def boundaries(intervals):
    return [intervals[0].high, *(interval.low for interval in intervals)]


def published(process, t):
    """alpha of the code of arXiv:2406.04329."""
    base = 1 - t if process.schedule == "linear" else 1 - torch.cos(math.pi / 2 * (1 - t))
    return (1 - 2e-4) * base + 1e-4


@both
def test_levels_and_weights_are_the_published_ones_at_every_time(process):
    t = TIMES.clone().requires_grad_()
    alpha = published(process, t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    level = [process.at_time(time) for time in TIMES.tolist()]
    assert level == pytest.approx((1 - alpha).tolist(), abs=1e-15)
    # at the other end of the cosine, time moves where the level does not
    assert [process.time_of(x) for x in level] == pytest.approx(TIMES.tolist(), abs=1e-7)
    weight = process.weight(torch.tensor(level, dtype=torch.float64), None)
    torch.testing.assert_close(weight, -slope / (1 - alpha).detach(), rtol=1e-6, atol=1e-6)


def test_the_linear_schedule_has_the_figures_of_its_formula():
    assert LINEAR.at_time(0.5) == pytest.approx(0.5, abs=1e-15)
    assert LINEAR.weight(HALF, None).item() == pytest.approx(1.9996, abs=1e-12)
    assert LINEAR.weight(0 * HALF + LINEAR.range.low, None).item() == pytest.approx(9998)


@both
def test_float32_loses_nothing_of_the_weight_where_few_are_masked(process):
    small = LINEAR.range.low * torch.tensor([1, 1 + 1e-6, 2, 100])
    exact = process.weight(small.double(), None)
    torch.testing.assert_close(process.weight(small, None).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("process", "scheme", "inner"),
    [
        (LINEAR, "equal_probability", [2 / 3, 1 / 3]),
        (LINEAR, "linear", [0.75, 0.5, 0.25]),
        (COSINE, "equal_probability", [1 - 2 / math.pi * math.acos(b / 3) for b in (2, 1)]),
        (COSINE, "linear", [0.5]),
    ],
)
def test_intervals_are_the_published_ones_and_tile_the_range(process, scheme, inner):
    intervals = process.intervals(len(inner) + 1, scheme)
    times = [process.time_of(level) for level in boundaries(intervals)]
    assert times == pytest.approx([1, *inner, 0], abs=1e-12)
    assert (intervals[-1].low, intervals[0].high) == (process.range.low, process.range.high)
    assert all(upper.low == lower.high for upper, lower in pairwise(intervals))


@both
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7])
def test_an_interval_widens_by_its_share_of_the_fall_of_alpha(process, num_blocks):
    for interval in process.intervals(num_blocks):
        assert process.mass(interval) == pytest.approx(1 / num_blocks, rel=1e-12)
        assert process.widen(interval, 0.0) == interval
        for gamma in (1e-17, 0.05, 0.5, 1e300):
            wide, more = process.widen(interval, gamma), gamma / num_blocks
            assert wide.low <= interval.low and interval.high <= wide.high
            low = max(process.mass_below(interval.low) - more, 0)
            high = min(process.mass_below(interval.high) + more, 1)
            assert process.mass_below(wide.low) == pytest.approx(low, abs=1e-15)
            assert process.mass_below(wide.high) == pytest.approx(high, abs=1e-15)
            assert process.range.low <= wide.low and wide.high <= process.range.high


@both
def test_levels_are_uniform_in_time_and_inside_their_interval(process):
    u = torch.tensor([0, 2.0**-60, 0.25, 1 - 2.0**-53, 1], dtype=torch.float64)
    # float32 has the first end exactly, and rounds the next up and the next down
    for interval in (process.range, *map(Interval, (0.25, 0.3, 0.7), (0.3, 0.7, 0.9))):
        level = process.level_at(interval, u)
        exact = level.double()
        assert level.dtype == torch.float32
        assert interval.low < exact.min() and exact.max() <= interval.high
        low, high = (process.time_of(x) for x in (interval.low, interval.high))
        expected = [process.at_time(x) for x in (low + u * (high - low)).tolist()]
        assert exact.tolist() == pytest.approx(expected, rel=2.0**-22)
        assert process.duration(interval) == high - low


def test_a_gaussian_step_draws_a_uniform_number_for_each_level():
    for shape in ((4,), (4, 3)):
        assert torch.equal(LogNormal().quantiles(DRAW, shape, "cpu"), uniforms(DRAW, *shape))


@pytest.mark.parametrize("step", [2, torch.tensor(2)])
@pytest.mark.parametrize("rest", [(), (3,)])
def test_the_levels_of_a_step_do_not_depend_on_how_its_batch_is_cut(step, rest):
    draw = Draw(seed=1, step=step)
    whole = LINEAR.quantiles(draw, (7, *rest), "cpu")
    cut = [
        LINEAR.quantiles(replace(draw, sample=a), (b - a, *rest), "cpu")
        for a, b in pairwise([0, 3, 4, 7])
    ]
    assert whole.shape == (7, *rest) and whole.dtype == torch.float64
    assert torch.equal(torch.cat(cut), whole)
    assert not torch.equal(LINEAR.quantiles(replace(draw, step=3), (7, *rest), "cpu"), whole)


@pytest.mark.parametrize("count", [1, 5, 64, 1000])
def test_the_levels_of_any_following_samples_are_spread_evenly(count):
    for step in range(5):
        u = LINEAR.quantiles(Draw(seed=1, step=step, sample=17 * step), (count,), "cpu").sort()[0]
        assert u[0] >= 0 and u[-1] < 1
        gaps = torch.cat([u.diff(), u[:1] + 1 - u[-1:]])
        # numbers drawn one by one leave gaps of ln(count) / count
        assert gaps.max() <= (1 + 5**0.5) / 2 / count + (count == 1)
        if count > 1:
            assert gaps.min() >= 0.38 / count


def test_a_samples_level_is_uniform_over_the_steps():
    drawn = [LINEAR.quantiles(Draw(0, step, 9), (1,), "cpu").item() for step in range(400)]
    parts = torch.histc(torch.tensor(drawn), 8, 0, 1)
    assert ((parts - 50) ** 2 / 50).sum() < 24  # chi-square of 7 degrees: 0.1 %


@both
@pytest.mark.parametrize("count", [1, 3, 10])
def test_the_cdf_grid_opens_alike_at_each_step_and_meets_boundaries_exactly(process, count):
    grid = process.grid(count)
    assert grid == boundaries(process.intervals(count))[:-1]
    falls = [process.mass_below(level) for level in [*grid, process.range.low]]
    assert [a - b for a, b in pairwise(falls)] == pytest.approx([1 / count] * count)


@both
def test_the_cosine_grid_is_the_published_one(process):
    expected = [1, math.cos(math.pi / 8), math.cos(math.pi / 4), math.cos(3 * math.pi / 8)]
    times = [process.time_of(level) for level in process.grid(4, "cosine")]
    assert times == pytest.approx(expected, abs=1e-7)


@both
def test_the_mean_weight_is_the_integral_over_an_interval(process):
    for interval in (*process.intervals(3), process.range, Interval(1e-4, 1e-3)):

        def weight(t):
            level = torch.tensor(process.at_time(t), dtype=torch.float64)
            return float(process.weight(level, None))

        ends = process.time_of(interval.low), process.time_of(interval.high)
        total, _ = integrate.quad(weight, *ends, points=[1e-4, 1e-3], limit=200, epsabs=1e-9)
        mean = total / (ends[1] - ends[0])
        assert process.mean_weight(interval, None) == pytest.approx(mean, rel=1e-6)


def test_a_sampler_starts_where_every_token_is_masked():
    start = LINEAR.start(torch.randn(2, 3), 1.0, 1.0)
    assert start.dtype == torch.int64 and start.shape == (2, 3) and (start == MASK).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Masked("cubic"), "schedule must be one of linear, cosine, got cubic"),
        (lambda: Masked(eps=0), "eps must be from 1e-09 to less than 0.5, got 0"),
        (lambda: Masked(eps=0.5), "eps must be from .*, got 0.5"),
        (lambda: Masked(eps=math.nan), "eps must be from .*, got nan"),
        (lambda: LINEAR.intervals(0), "num_blocks must be at least 1, got 0"),
        (lambda: LINEAR.intervals(10_001), "num_blocks must be at most 10000, got 10001"),
        (
            lambda: LINEAR.intervals(2, "log_uniform"),
            "scheme of masked tokens must be one of equal_probability, linear, got log_uniform",
        ),
        (lambda: LINEAR.widen(LINEAR.range, -0.1), "gamma must be finite and at least 0, got -0.1"),
        (lambda: LINEAR.widen(LINEAR.range, math.nan), "gamma must be finite"),
        (lambda: LINEAR.level_at(Interval(0, 0.5), HALF), r"in \[0.0001, 0.9999\], got \[0, 0.5"),
        (lambda: LINEAR.level_at(Interval(0.5, 1), HALF), r"must lie in .* got \[0.5, 1\]"),
        (lambda: LINEAR.level_at(LINEAR.range, HALF.float()), "u must be torch.float64, got torch"),
        (lambda: LINEAR.grid(5, "karras"), "spacing of masked tokens must be cdf or cosine, got k"),
        (lambda: LINEAR.grid(0), "levels must be at least 1, got 0"),
        (lambda: LINEAR.grid(10_001), "levels must be at most 10000, got 10001"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
