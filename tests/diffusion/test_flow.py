"""The processes of flow matching and of the steps of a schedule."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from dbkernels.diffusion.flow import Flow, flux_shift, sd3_shift
from dbkernels.diffusion.path import PRESERVING
from dbkernels.diffusion.prediction import X0, Epsilon, V, Velocity
from dbkernels.diffusion.process import Interval
from dbkernels.diffusion.timesteps import Timesteps
from dbkernels.ops.philox import Draw, uniforms
from dbkernels.training.partition import block_at, partition

FLOWS = [
    Flow(),
    Flow(mean=-0.4, std=0.7, time_shift=3.0, t_min=0.02),
    Flow(density="uniform"),
    Flow(density="uniform", time_shift=0.4, t_max=0.9),
]
STEPS = Timesteps()
flows = pytest.mark.parametrize("flow", FLOWS, ids=str)
HALF = torch.tensor([0.5], dtype=torch.float64)


def density(flow, t):
    """Of the uncut times, from the one before the shift."""
    s = flow.time_shift
    u = t / (s - (s - 1) * t)
    slope = s / (s - (s - 1) * t) ** 2
    if flow.density == "uniform":
        return slope
    return stats.norm.pdf(math.log(u / (1 - u)), flow.mean, flow.std) / (u * (1 - u)) * slope


def integral(flow, interval, of=lambda t: 1.0):
    # to the last time before 1, whose density is a quotient of two zeros
    ends = interval.low, min(interval.high, 1 - 1e-12)
    return integrate.quad(lambda t: density(flow, t) * of(t), *ends, limit=400)[0]


@flows
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 12])
def test_intervals_hold_equal_mass_and_tile_the_range(flow, num_blocks):
    intervals = flow.intervals(num_blocks)
    assert (intervals[-1].low, intervals[0].high) == (flow.t_min, flow.t_max)
    assert all(upper.low == lower.high for upper, lower in pairwise(intervals))
    whole = integral(flow, flow.range)
    for interval in intervals:
        assert integral(flow, interval) / whole == pytest.approx(1 / num_blocks, rel=1e-6)
        assert flow.mass(interval) == pytest.approx(1 / num_blocks, rel=1e-9)


def test_boundaries_are_quantiles_of_the_published_priors():
    # of ln(t / (1 - t)) ~ N(0, 1) a third lies below -0.430727
    third = 1 / (1 + math.exp(0.430727))
    lows = [interval.low for interval in Flow().intervals(3)]
    assert lows == pytest.approx([1 - third, third, 0.001], abs=1e-6)
    # SD3's shift of 3 moves 1/2 to 3/4
    assert Flow(time_shift=3.0).intervals(2)[0].low == pytest.approx(0.75, abs=1e-9)
    assert Flow(density="uniform").intervals(2)[0].low == pytest.approx(0.5005)
    linear, log_uniform = (Flow().intervals(3, scheme) for scheme in ("linear", "log_uniform"))
    assert [i.low for i in linear] == pytest.approx([0.667, 0.334, 0.001])
    assert [i.low for i in log_uniform] == pytest.approx([0.1, 0.01, 0.001])


@flows
def test_levels_at_uniform_numbers_are_those_of_the_cut_prior(flow):
    u = torch.tensor([0.0, 1e-3, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    for interval in (*flow.intervals(3), flow.range, Interval(0.3, 0.3000001)):
        level = flow.level_at(interval, u)
        assert level.dtype == torch.float32
        low, high = interval.low, interval.high
        assert low < level.double().min() and level.double().max() <= high
        whole = flow.cdf(high) - flow.cdf(low)
        shares = [(flow.cdf(x) - flow.cdf(low)) / whole for x in level.double().tolist()]
        if high - low > 0.01:
            assert shares == pytest.approx(u.tolist(), abs=1e-5)


@flows
def test_the_mean_weight_is_the_integral(flow):
    for prediction in (Velocity(), X0(flow.path)):
        for interval in (*flow.intervals(3), flow.range):
            weight = lambda t, p=prediction: float(flow.weight(HALF * 2 * t, p))  # noqa: E731
            expected = integral(flow, interval, weight) / integral(flow, interval)
            assert flow.mean_weight(interval, prediction) == pytest.approx(expected, rel=1e-5)


def test_a_flows_weight_is_one_over_the_square_of_the_time():
    t = torch.tensor([0.001, 0.4, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Flow().weight(t, Velocity()), t**-2)
    assert Flow().weight(t, X0(Flow.path)).tolist() == [1, 1, 1]


def test_an_interval_of_times_widens_by_a_share_of_its_width():
    interval = Interval(0.4, 0.6)
    wide = Flow().widen(interval, 0.1)
    assert (wide.low, wide.high) == pytest.approx((0.38, 0.62))
    assert Flow().widen(interval, 0.0) == interval
    assert Flow(t_max=0.9).widen(interval, 1e300) == Interval(0.001, 0.9)


@flows
@pytest.mark.parametrize("count", [2, 4, 7])
def test_grids_descend_by_equal_mass_or_as_published(flow, count):
    masses = [flow.mass(Interval(low, high)) for high, low in pairwise(flow.grid(count))]
    assert masses == pytest.approx([1 / (count - 1)] * (count - 1))
    linear, s = flow.grid(count, "linear"), flow.time_shift
    assert linear[0] == flow.t_max and len(linear) == count
    # before the shift they fall evenly, the last as far above 0 as from the one before it
    before = [t / (s - (s - 1) * t) for t in linear]
    assert before == pytest.approx([before[0] * (count - i) / count for i in range(count)])


def test_shifts_are_those_of_the_published_samplers():
    assert sd3_shift(4096, 1024) == 2
    assert (flux_shift(256), flux_shift(4096)) == pytest.approx((math.exp(0.5), math.exp(1.15)))


@pytest.mark.parametrize("num_blocks", [1, 3, 4, 7, 1000])
def test_every_block_has_as_many_steps_as_any_other(num_blocks):
    for scheme in ("equal_probability", "linear"):
        intervals = STEPS.intervals(num_blocks, scheme)
        counts = [round(STEPS.mass(interval) * 1000) for interval in intervals]
        assert sum(counts) == 1000 and max(counts) - min(counts) <= 1 and min(counts) > 0
        assert all(upper.low == lower.high for upper, lower in pairwise(intervals))


def test_log_uniform_steps_have_the_same_width_in_the_logarithm_of_noise_over_signal():
    a, s = PRESERVING(torch.arange(1000, dtype=torch.float64))
    ratio = (s / a).log()
    inner = [interval.low for interval in STEPS.intervals(3, "log_uniform")][:-1]
    found = [(ratio[int(step)] - ratio[0]) / (ratio[-1] - ratio[0]) for step in inner]
    assert [float(x) for x in found] == pytest.approx([2 / 3, 1 / 3], abs=0.01)


@pytest.mark.parametrize("interval", [Interval(-1, 332), Interval(666, 999), Interval(4, 5)])
def test_each_step_of_an_interval_is_drawn_as_often(interval):
    count = int(interval.high - interval.low)
    u = (torch.arange(1, 7 * count + 1, dtype=torch.float64) - 0.5) / (7 * count)
    level = STEPS.level_at(interval, u)
    steps, times = level.unique(return_counts=True)
    assert steps.tolist() == list(range(int(interval.low) + 1, int(interval.high) + 1))
    assert set(times.tolist()) == {7} and level.dtype == torch.float32
    ends = STEPS.level_at(interval, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [interval.low + 1, interval.high]


def test_the_mean_weight_of_steps_is_their_mean():
    product = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    signal = product / (1 - product)
    for interval, part in ((Interval(-1, 332), slice(333)), (Interval(332, 666), slice(333, 667))):
        for prediction, weight in ((Epsilon(), signal), (V(), signal + 1), (X0(), signal**0)):
            expected = weight[part].mean()
            assert STEPS.mean_weight(interval, prediction) == pytest.approx(expected, rel=1e-9)
    assert STEPS.weight(HALF * 518, V()).item() == pytest.approx(signal[259] + 1)


def test_steps_widen_by_whole_steps_and_are_spaced_as_published_or_as_karras_has_them():
    assert STEPS.widen(Interval(332, 666), 0.05) == Interval(315, 683)
    assert STEPS.widen(Interval(332, 666), 1e300) == STEPS.range
    assert STEPS.widen(Interval(-1, 332), 0.0) == Interval(-1, 332)
    # facebookresearch/DiT, space_timesteps(1000, "5")
    assert STEPS.grid(5) == [999, 749, 500, 250, 0]
    karras = STEPS.grid(18, "karras")
    a, s = PRESERVING(torch.tensor(karras, dtype=torch.float64))
    roots = (s / a) ** (1 / 7)
    assert (karras[0], karras[-1]) == (999, 0)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17), rtol=0.01, atol=0)


@pytest.mark.parametrize("process", [*FLOWS, STEPS], ids=str)
def test_the_block_that_a_level_was_drawn_for_serves_it_and_boundaries_go_below(process):
    u = uniforms(Draw(1, 0), 500)
    blocks = partition(6, 3, process, gamma=0.0)
    for block in blocks:
        levels = process.level_at(block.trained_noise, u)
        assert {block_at(blocks, level).index for level in levels.tolist()} == {block.index}
        assert block_at(blocks, block.noise.high) is block
    whole = process.range
    assert block_at(blocks, whole.high).index == 0 and block_at(blocks, whole.low).index == 2
    assert torch.equal(process.quantiles(Draw(1, 0), (500,), "cpu"), u)
    for level in (*process.grid(9), *process.grid(9, process.close)):
        block_at(blocks, level)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Flow(density="beta"), "density must be one of logit_normal, uniform, got beta"),
        (lambda: Flow(std=0.0), "std positive and finite, got mean 0.0 and std 0.0"),
        (lambda: Flow(mean=math.nan), "mean must be finite"),
        (lambda: Flow(mean=1.0, density="uniform"), "where density is uniform, .*, got mean 1.0"),
        (lambda: Flow(time_shift=0.0), "time_shift must be at least 1e-06, got 0.0"),
        (lambda: Flow(time_shift=math.inf), "time_shift must be at most .*, got inf"),
        (lambda: Flow(t_min=0.0), "1e-06 <= t_min < t_max <= 1, got t_min 0.0 and t_max 1.0"),
        (lambda: Flow(t_min=0.5, t_max=0.5), "t_min < t_max"),
        (lambda: Flow(t_max=1.5), "t_max <= 1, got t_min 0.001 and t_max 1.5"),
        (lambda: Flow(mean=-40.0), "mean, std and time_shift must put times .*, got mean -40.0"),
        (lambda: Flow(std=1e-9).intervals(3), "std and the range must be large .* std 1e-09"),
        (lambda: Flow().intervals(0), "num_blocks must be at least 1, got 0"),
        (lambda: Flow().intervals(2, "cubic"), "scheme must be one of .*, got cubic"),
        (lambda: Flow().widen(Interval(0.1, 0.2), -1), "gamma must be finite and at least 0"),
        (lambda: Flow().level_at(Interval(0, 0.5), HALF), r"must lie in \[0.001, 1.0\], got \[0"),
        (lambda: Flow().level_at(Flow().range, HALF.float()), "u must be torch.float64"),
        (lambda: Flow().grid(5, "karras"), "spacing of a flow must be cdf or linear, got karras"),
        (lambda: Flow().grid(1), "levels must be at least 2, got 1"),
        (lambda: Flow().grid(1001, "linear"), "levels must be at most 1000, got 1001"),
        (lambda: sd3_shift(0, 1), "tokens must be at least 1, got 0"),
        (lambda: flux_shift(0), "tokens must be at least 1, got 0"),
        (lambda: STEPS.intervals(1001), "num_blocks must be at most 1000, got 1001"),
        (lambda: STEPS.intervals(2, "cubic"), "scheme must be one of .*, got cubic"),
        (lambda: STEPS.intervals(500, "log_uniform"), "for 500 blocks .*, got scheme log_uniform"),
        (lambda: STEPS.widen(STEPS.range, math.nan), "gamma must be finite"),
        (
            lambda: STEPS.level_at(Interval(5, 1000), HALF),
            r"must lie in \[-1, 999\], got \[5, 1000",
        ),
        (lambda: STEPS.level_at(Interval(5.1, 5.2), HALF), r"must have a step, got \[5.1, 5.2\]"),
        (lambda: STEPS.level_at(STEPS.range, HALF.float()), "u must be torch.float64"),
        (lambda: STEPS.grid(1001), "levels must be at most 1000, got 1001"),
        (lambda: STEPS.grid(5, "linear"), "spacing of steps must be cdf or karras, got linear"),
        (lambda: STEPS.grid(5, "karras", rho=0), "rho must be positive, got 0"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
