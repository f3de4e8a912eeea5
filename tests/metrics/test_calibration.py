"""Whether a classifier is right as often as it says."""

import math

import numpy as np
import pytest
import torch

from dbkernels.metrics import calibration_error


def by_definition(probabilities, labels, bins):
    """Equations 2 and 3 of the paper, bin by bin."""
    confidence, found = probabilities.max(1), 0.0
    right = probabilities.argmax(1) == labels
    for m in range(1, bins + 1):
        inside = ((m - 1) / bins < confidence) & (confidence <= m / bins)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            found += inside.sum() / len(labels) * gap
    return found


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_error_is_that_of_the_paper(bins, dtype):
    random = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(300, 5, generator=random)).softmax(-1).to(dtype)
    labels = torch.randint(5, (300,), generator=random)
    expected = by_definition(probabilities.double().numpy(), labels.numpy(), bins)
    assert expected > 0.1
    assert calibration_error(probabilities, labels, bins=bins) == pytest.approx(expected)


def test_bins_are_fifteen_and_closed_above():
    # 0.6 ends the ninth of 15, in which all is right; 0.61 is in the tenth, where nothing is
    confidence = torch.tensor([0.6, 0.6, 0.61], dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], dim=1)
    labels = torch.tensor([0, 0, 1])
    assert calibration_error(probabilities, labels) == pytest.approx((0.8 + 0.61) / 3)
    assert calibration_error(probabilities, labels, bins=1) == pytest.approx((0.8 - 0.61) / 3)


def test_who_knows_how_often_he_is_right_makes_no_error():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    probabilities = torch.tensor([[0.75, 0.25]] * 4 + [[0.25, 0.75]] * 4)
    assert calibration_error(probabilities, labels) == pytest.approx(0)
    # and who is sure is wrong by what is wrong
    assert calibration_error(probabilities.round(), labels) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (torch.ones(3), torch.zeros(3).long(), r"\(N, C\) floating-point .* got \(3,\) torch.flo"),
        (torch.ones(3, 1).long(), torch.zeros(3).long(), r"got \(3, 1\) torch.int64"),
        (torch.ones(0, 2), torch.zeros(0).long(), r"at least one row, got \(0, 2\)"),
        (torch.ones(3, 1), torch.zeros(2).long(), r"labels must be \(3,\) int64, got \(2,\)"),
        (torch.ones(3, 1), torch.zeros(3), r"labels must be \(3,\) int64, got .* torch.float32"),
        (torch.ones(3, 1), torch.tensor([0, 1, 0]), r"labels must be in \[0, 1\), got 0 to 1"),
        (torch.ones(3, 1), torch.tensor([0, -1, 0]), r"labels must be in \[0, 1\), got -1 to 0"),
        (torch.ones(3, 2), torch.zeros(3).long(), "rows that sum to 2 to 2"),
        (torch.tensor([[0.6, 0.37]]), torch.zeros(1).long(), "rows that sum to 0.97 to 0.97"),
        (torch.tensor([[1.5, -0.5]]), torch.zeros(1).long(), "and -0.5 at least"),
        (torch.tensor([[math.nan, 1.0]]), torch.zeros(1).long(), "sum to nan"),
    ],
)
def test_refuses_what_are_no_probabilities(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        calibration_error(probabilities, labels)


def test_refuses_no_bins():
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        calibration_error(torch.ones(3, 1), torch.zeros(3).long(), bins=0)


def test_many_bins_hold_what_is_sure_and_what_is_least_sure():
    probabilities = torch.from_numpy(np.array([[1.0, 0.0], [0.5, 0.5]]))
    labels = torch.tensor([1, 0])
    assert calibration_error(probabilities, labels, bins=1000) == pytest.approx((1 + 0.5) / 2)
