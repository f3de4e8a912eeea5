import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from models.tiny import randomise
from torch import nn
from training.tiny import PRIOR, make_data, make_models

from dbkernels.data.images import ImageData
from dbkernels.diffusion.gaussian import cdf_grid
from dbkernels.training.evaluation import (
    batches,
    block_losses,
    evaluate_classifier,
    frechet_distance,
    loss_at,
)
from dbkernels.training.partition import partition
from dbkernels.training.sharing import BlockModels


class Known(nn.Module):
    """A classifier whose answers are given; the first pixel of an image is its label."""

    target_parts = ()
    config = SimpleNamespace(dim=2, sigma_data=0.5)

    def __init__(self, logits=None, loss=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
        self.logits, self.known_loss, self.calls = logits, loss, []

    def denoise(self, z, level, layers, batch):
        self.calls.append((layers, level))
        return self.logits(batch["image"][:, 0, 0, 0].long(), level[0]) if self.logits else z

    def losses(self, draw, level, layers, batch):
        self.calls.append((layers, level))
        return self.known_loss(draw, level, batch)

    def estimate(self, prediction):
        return torch.zeros(len(prediction), 2)


def known(**answers):
    return BlockModels(Known(**answers), partition(3, 3, PRIOR), "joint")


def labelled(count=10):
    labels = torch.arange(count) % 3
    return ImageData(labels.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4).numpy(), labels, 3)


def sure(answer):
    return 50.0 * nn.functional.one_hot(answer, 3)


def test_every_sample_comes_once_in_order_and_the_last_batch_is_short():
    data = make_data(10)
    found = list(batches(data, 4, "cpu"))
    assert [len(batch["label"]) for batch in found] == [4, 4, 2]
    image = torch.cat([batch["image"] for batch in found])
    assert torch.equal(image, data.batch(torch.arange(10))["image"])


@pytest.mark.parametrize(
    ("limit", "sizes"), [(6, [4, 2]), (4, [4]), (99, [4, 4, 2]), (None, [4, 4, 2])]
)
def test_a_limit_stops_early(limit, sizes):
    found = list(batches(make_data(10), 4, "cpu", limit))
    assert [len(batch["label"]) for batch in found] == sizes


def test_a_mean_loss_counts_every_sample_once():
    data = labelled()  # labels 0, 1, 2, ..., 0: with batches of four, a mean of means is 1
    models = known(loss=lambda draw, level, batch: batch["label"].float())
    assert loss_at(models, data, 1.0, seed=0, batch_size=4) == pytest.approx(0.9)


def test_a_loss_is_read_at_its_level_through_the_serving_block():
    models = known(loss=lambda draw, level, batch: level)
    for level, index in ((80.0, 0), (0.3, 1), (0.002, 2)):
        value = loss_at(models, labelled(), level, seed=0, batch_size=4)
        assert value == pytest.approx(level)
        layers, levels = models.model.calls[-1]
        assert layers == (index,)
        torch.testing.assert_close(levels, torch.full((2,), level))


def test_a_loss_is_a_function_of_the_seed():
    models = randomise(make_models("vit"))
    first, second, other = (loss_at(models, make_data(), 0.5, seed=s) for s in (1, 1, 2))
    assert first == second != other


def test_the_noise_of_a_sample_does_not_depend_on_the_batches():
    models, data = randomise(make_models("vit")), make_data()
    values = [loss_at(models, data, 0.5, seed=1, batch_size=size) for size in (3, 4, 10)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_an_untrained_classifier_loses_the_log_of_the_classes_everywhere():
    models, data = make_models("vit"), make_data()
    assert loss_at(models, data, 80.0, seed=0, batch_size=4) == pytest.approx(math.log(3))
    losses = block_losses(models, data, PRIOR, seed=0)
    assert losses == pytest.approx([math.log(3)] * 3)


def test_a_blocks_loss_is_the_mean_over_eight_quantiles_of_what_it_serves():
    models = known(loss=lambda draw, level, batch: level)
    losses = block_losses(models, labelled(), PRIOR, seed=0)
    normal = NormalDist(-1.2, 1.2)
    for block, loss in zip(models.blocks, losses, strict=True):
        low, high = (normal.cdf(math.log(s)) for s in (block.noise.low, block.noise.high))
        shares = [low + (high - low) * (i + 0.5) / 8 for i in range(8)]
        levels = [math.exp(normal.inv_cdf(share)) for share in shares]
        assert loss == pytest.approx(sum(levels) / 8, rel=1e-5)
    assert [layers for layers, _ in models.model.calls] == [(0,)] * 8 + [(1,)] * 8 + [(2,)] * 8


def test_a_model_that_knows_the_answer_is_always_right():
    models, levels = known(logits=lambda label, level: sure(label)), cdf_grid(PRIOR, 3)
    result = evaluate_classifier(models, labelled(), levels, seed=0, batch_size=4)
    assert result.levels == tuple(levels)
    assert result.accuracy == (1.0, 1.0, 1.0)
    assert result.cross_entropy == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert len(models.model.calls) == 3 * 3


def test_answers_are_read_after_each_step():
    # at first sure of the next class, then of class 0, then of the right one
    answers = {80.0: lambda label: (label + 1) % 3, 1.0: torch.zeros_like, 0.5: lambda label: label}
    models = known(logits=lambda label, level: sure(answers[float(level)](label)))
    result = evaluate_classifier(models, labelled(), list(answers), seed=0, batch_size=4)
    assert result.accuracy == pytest.approx((0.0, 0.4, 1.0))
    assert result.cross_entropy == pytest.approx((50.0, 30.0, 0.0), abs=1e-4)


def test_an_even_guess_costs_the_log_of_the_classes():
    models = known(logits=lambda label, level: torch.zeros(len(label), 3))
    result = evaluate_classifier(models, labelled(), [80.0], seed=0, batch_size=4)
    assert result.cross_entropy == pytest.approx((math.log(3),))


def test_a_classification_is_a_function_of_the_seed():
    models, levels = randomise(make_models("vit")), cdf_grid(PRIOR, 3)
    first, second, other = (
        evaluate_classifier(models, make_data(), levels, seed=s, batch_size=4) for s in (1, 1, 2)
    )
    assert first == second != other


def features(count, mean, std):
    """Features with exactly this mean and diagonal covariance."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    unit, _ = torch.linalg.qr(x - x.mean(0))
    return unit * (count - 1) ** 0.5 * torch.tensor(std) + torch.tensor(mean)


def test_normals_with_diagonal_covariances_are_as_far_as_the_formula_says():
    first = features(40, [1.0, -2.0, 30.0], [1.0, 2.0, 0.5])
    second = features(60, [1.5, -2.0, 28.0], [3.0, 2.0, 0.1])
    expected = 0.5**2 + 2.0**2 + (3 - 1) ** 2 + 0.4**2
    assert frechet_distance(first, second) == pytest.approx(expected)
    assert frechet_distance(second, first) == pytest.approx(expected)


def test_correlated_features_are_as_far_as_a_matrix_root_says():
    first = torch.randn(50, 4).double() @ torch.randn(4, 4).double()
    second = torch.randn(70, 4).double() @ torch.randn(4, 4).double() + 1
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = float((first.mean(0) - second.mean(0)).square().sum())
    expected += np.trace(a) + np.trace(b) - 2 * np.trace(root)
    assert frechet_distance(first, second) == pytest.approx(expected)


@pytest.mark.parametrize("count", [3, 100])
def test_equal_features_are_at_no_distance_and_a_move_costs_its_square(count):
    x = torch.randn(count, 8)  # three rows of eight leave a covariance of rank two
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    move = torch.zeros(8)
    move[2] = 3
    assert frechet_distance(x, x + move) == pytest.approx(9, abs=1e-4)


def test_a_single_feature_is_enough():
    first, second = features(10, [0.0], [1.0]), features(12, [2.0], [4.0])
    assert frechet_distance(first, second) == pytest.approx(4 + 9)


@pytest.mark.parametrize(
    ("first", "second"),
    [((5, 3), (5, 4)), ((5, 3), (1, 3)), ((1, 3), (5, 3)), ((5,), (5, 3)), ((5, 3), (5, 3, 1))],
)
def test_rejects_features_that_cannot_be_compared(first, second):
    with pytest.raises(ValueError, match="matrices of equal width with at least 2 rows, got"):
        frechet_distance(torch.zeros(first), torch.zeros(second))
