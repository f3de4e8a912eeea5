import pytest
import torch

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.samplers import euler, heun

GRID = LogNormal().grid(6)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_a_perfect_denoiser_lands_on_the_target_with_the_next_noise(sampler):
    y, noise = torch.randn(2, 5, dtype=torch.float64)
    seen = {}

    def perfect(z, level):
        seen.setdefault(level, z)
        return y

    result = sampler(perfect, y + GRID[0] * noise, GRID)
    assert torch.equal(result, y)
    for level, z in seen.items():
        torch.testing.assert_close(z, y + level * noise)


@pytest.mark.parametrize(("sampler", "count"), [(euler, 6), (heun, 11)])
def test_euler_evaluates_each_level_and_heun_each_inner_one_twice(sampler, count):
    levels = []
    sampler(lambda z, level: levels.append(level) or z / 2, torch.ones(1), GRID)
    assert len(levels) == count and sorted(set(levels), reverse=True) == GRID


def errors(sampler, counts):
    """Errors against the exact flow of normal data, z(sigma) ~ sqrt(sigma**2 + s**2)."""
    s, high, low = 0.5, 5.0, 0.1

    def denoiser(z, level):
        return s**2 / (s**2 + level**2) * z

    found = []
    for count in counts:
        levels = torch.linspace(high, low, count, dtype=torch.float64).tolist()
        z = torch.ones(1, dtype=torch.float64)
        exact = ((low**2 + s**2) / (high**2 + s**2)) ** 0.5 * s**2 / (s**2 + low**2)
        found.append(abs(sampler(denoiser, z, levels).item() - exact))
    return found


@pytest.mark.parametrize(("sampler", "ratio"), [(euler, 2), (heun, 4)])
def test_euler_is_of_first_order_and_heun_of_second(sampler, ratio):
    coarse, fine = errors(sampler, [401, 801])
    assert coarse / fine == pytest.approx(ratio, rel=0.1)


def test_start_has_the_spread_of_the_noisiest_marginal():
    z = LogNormal().start(torch.randn(50_000), 3.0, 4.0)
    assert z.std().item() == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("levels", [[], [1.0, 1.0], [1.0, 2.0], [1.0, 0.0]])
def test_rejects_levels_that_are_not_descending_and_positive(sampler, levels):
    with pytest.raises(ValueError, match="levels must be descending and positive, got"):
        sampler(lambda z, level: z, torch.ones(1), levels)
