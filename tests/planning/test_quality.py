from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dbkernels.diffusion.flow import Flow
from dbkernels.diffusion.masked import Masked
from dbkernels.models import FAMILIES
from dbkernels.planning.quality import (
    DEPTH,
    KEPT,
    LEVELS,
    MOST_TIMES,
    RATIO,
    Curve,
    Law,
    law_of,
    longest,
    mean_loss,
    predict,
    read_curves,
    share_below,
)
from dbkernels.planning.recipe import of_preset
from dbkernels.planning.ways import content, equal_loss, uneven, ways_of

SHARES = (np.arange(LEVELS) + 0.5) / LEVELS


def curve(losses=1 + SHARES, most=3.0, *, family="vit", depth=12, steps=300, prior=None):
    """Of a run in one block whose losses are made up."""
    smallest = FAMILIES[family].model.smallest
    config = of_preset(family, smallest).config()
    model = replace(config.model, depth=depth)
    config = replace(config, model=model, trainer=replace(config.trainer, steps=steps))
    config = config if prior is None else replace(config, prior=prior)
    return Curve(config, np.broadcast_to(np.asarray(losses, float), LEVELS).copy(), most)


def cut(config, count, **how):
    how = {"gamma": 0.0, **how}
    return replace(config, partition=replace(config.partition, num_blocks=count, **how))


def made_up(*sizes, a=0.7, c=0.9):
    return [curve(5 * depth**-a * steps**-c, depth=depth, steps=steps) for depth, steps in sizes]


@pytest.mark.parametrize(
    ("sizes", "depth", "samples"),
    [
        ([(12, 300)], DEPTH, DEPTH * RATIO),
        ([(12, 300), (12, 300)], DEPTH, DEPTH * RATIO),
        ([(12, 300), (4, 300)], 0.7, 0.7 * RATIO),
        ([(12, 300), (12, 100)], 0.9 * KEPT / RATIO, 0.9 * KEPT),
        ([(4, 100), (12, 300), (4, 300), (12, 100), (6, 200)], 0.7, 0.9 * KEPT),
    ],
)
def test_the_exponents_of_a_made_up_power_law_come_back(sizes, depth, samples):
    law = law_of(made_up(*sizes))
    assert (law.depth, law.samples) == pytest.approx((depth, samples))
    depths, steps = map(set, zip(*sizes, strict=True))
    assert (law.depth_measured, law.samples_measured) == (len(depths) > 1, len(steps) > 1)


def test_runs_whose_depth_and_steps_change_together_tell_neither():
    with pytest.raises(
        ValueError, match=r"same steps, or in .*, got depth and steps 12 and 300, 4 "
    ):
        law_of(made_up((12, 300), (4, 100)))


def test_runs_that_differ_by_their_seed_are_averaged_and_the_deepest_is_the_base():
    curves = [curve(9, 9, depth=4, steps=900), curve(1, 2), curve(3, 4), curve(8, 8, steps=100)]
    found = longest(curves)
    assert (found.mean, found.at_most_noise) == (2, 3)
    assert (found.config.model.depth, found.config.trainer.steps) == (12, 300)


def test_one_block_has_the_loss_of_its_run():
    found = predict(base := curve(), Law(0.7, 0.3), base.config)
    assert found.loss == pytest.approx(base.mean, rel=0.01) and found.to_learn == (1.0,)
    assert found.at_most_noise == base.at_most_noise
    assert found.block_losses == (found.loss,)


@pytest.mark.parametrize("scheme", ["equal_probability", "log_uniform", "linear"])
def test_a_block_loses_by_its_layers_and_wins_by_the_samples_of_its_levels(scheme):
    base, law = curve(1, 1), Law(depth=0.7, samples=0.3)
    way = cut(base.config, 3, scheme=scheme, split="6,4,2")
    found, prior = predict(base, law, way), base.config.prior
    masses = [prior.mass(block.noise) for block in way.partition.cut(12, prior)]
    times = [min((3 / mass) ** 0.5, MOST_TIMES) for mass in masses]
    worth = [(n / 12) ** -0.7 * d**-0.3 for n, d in zip((6, 4, 2), times, strict=True)]
    # where a share of the prior is far below what it is read at, it is coarse
    read = [place for place, mass in enumerate(masses) if mass > 1e-3]
    for place in read:
        assert found.block_losses[place] == pytest.approx(worth[place], rel=0.01)
    assert found.at_most_noise == pytest.approx(worth[0], rel=1e-3)
    assert found.loss == pytest.approx(np.dot(masses, worth), rel=0.01)
    assert sum(found.to_learn) == pytest.approx(1)
    assert mean_loss(prior, way, found.block_losses) == pytest.approx(found.loss)


def test_an_overlap_changes_no_prediction():
    base = curve()
    without, wide = (predict(base, Law(), cut(base.config, 3, gamma=g)) for g in (0.0, 0.2))
    assert without.loss == wide.loss


def test_what_there_is_to_learn_lies_where_the_loss_is():
    half = curve(np.where(SHARES > 0.5, 1.0, 0.0), 1)
    found = predict(half, Law(), cut(half.config, 2))
    assert found.to_learn == pytest.approx((1, 0), abs=0.02)
    assert found.block_losses[0] > 20 * found.block_losses[1]
    rising = predict(curve(), Law(0, 0), cut(half.config, 2))
    assert rising.block_losses == pytest.approx((1.75, 1.25), rel=0.02)


def test_one_run_predicts_that_more_blocks_are_worse():
    base = curve()
    losses = [predict(base, law_of([base]), cut(base.config, n)).loss for n in (1, 2, 3, 4, 6)]
    assert all(low < high for low, high in pairwise(losses))
    known = 6**DEPTH * MOST_TIMES ** (-RATIO * DEPTH)
    assert losses[-1] == pytest.approx(losses[0] * known)


@pytest.mark.parametrize(("count", "near"), [(2, 0.005), (3, 0.015), (4, 0.03), (6, 0.05)])
@pytest.mark.parametrize("losses", [1 + 4 * SHARES, 0.05 + SHARES**4, np.exp(-3 * SHARES)])
def test_blocks_of_the_fitted_prior_have_equal_shares_of_the_loss(losses, count, near):
    base = curve(losses, losses[-1])
    prior = equal_loss(base, count)
    found = predict(base, Law(), replace(cut(base.config, count), prior=prior))
    assert found.to_learn == pytest.approx([1 / count] * count, abs=near)
    assert prior.sigma_max == base.config.prior.sigma_max
    even = predict(base, Law(), cut(base.config, count))
    assert max(found.to_learn) < max(even.to_learn)


@pytest.mark.parametrize(
    ("family", "prior"), [("mdm", Masked()), ("mmdit", Flow(density="uniform"))]
)
def test_noise_without_a_mean_and_a_deviation_has_no_fitted_prior(family, prior):
    assert equal_loss(curve(family=family, prior=prior), 3) is None


def test_of_a_text_with_gaussian_noise_the_fall_of_the_loss_is_what_there_is_to_learn():
    step = np.where(SHARES > 0.25, 4.0, 0.0)
    found = content(curve(step, 4.0, family="ar"))
    places = (np.arange(len(found)) + 0.5) / len(found)
    assert found.sum() == pytest.approx(1)
    assert found[abs(places - 0.25) < 0.05].sum() == pytest.approx(1, abs=1e-3)
    assert content(curve(step, 4.0))[places > 0.3].sum() == pytest.approx(0.93, abs=0.02)


@pytest.mark.parametrize(
    ("layers", "count", "splits"),
    [
        (12, 1, []),
        (6, 6, []),
        (12, 2, [(9, 3), (3, 9)]),
        (12, 3, [(6, 4, 2), (2, 4, 6)]),
        (12, 6, [(3, 2, 2, 2, 2, 1), (1, 2, 2, 2, 2, 3)]),
    ],
)
def test_uneven_splits_have_all_layers(layers, count, splits):
    assert list(uneven(layers, count)) == splits


@pytest.mark.parametrize("depth", [4, 12])
def test_ways_cut_the_layers_evenly_or_have_a_split_and_no_two_are_alike(depth):
    flat = ways_of(curve(1, 1, depth=depth))
    assert len(flat) == len(set(map(str, flat)))
    base = curve(depth=depth)
    ways = ways_of(base)
    assert ways[0] == base.config and len(ways) == len(set(map(str, ways)))
    counts = {way.partition.num_blocks for way in ways}
    assert counts == ({1, 2, 4} if depth == 4 else {1, 2, 3, 4, 6})
    for way in ways:
        blocks = way.partition.cut(depth, way.prior)
        assert sum(len(block.layers) for block in blocks) == depth
    schemes = {way.partition.scheme for way in ways}
    assert schemes == {"equal_probability", "log_uniform", "linear"}
    assert {way.partition.scheme for way in ways_of(curve(family="mdm"))} == {
        "equal_probability",
        "linear",
    }


def test_shares_are_those_of_levels_as_training_draws_them():
    prior = curve().config.prior
    levels = np.array([prior.at_mass(share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)])
    assert share_below(prior, levels) == pytest.approx([0, 0.2, 0.5, 0.99, 1], abs=1e-3)
    # of masked tokens levels are drawn by time
    cosine = Masked(schedule="cosine")
    assert share_below(cosine, np.array([cosine.at_time(0.3)])) == pytest.approx([0.3], abs=1e-3)


def test_no_run_and_one_run_twice_are_refused():
    with pytest.raises(ValueError, match="run_dirs must name at least one run, got none"):
        read_curves([], device="cpu")
    with pytest.raises(ValueError, match=r"must hold config.json, got none in nowhere"):
        read_curves([Path("nowhere")], device="cpu")
    with pytest.raises(ValueError, match="run_dirs must name each run once, got nowhere twice"):
        read_curves([Path("nowhere"), Path("nowhere")], device="cpu")
