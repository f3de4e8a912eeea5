"""What the library of MAUVE is asked for."""

import sys

import numpy as np
import pytest
import torch
from metrics.libraries import mauve

from dbkernels.metrics import mauve_score


@pytest.fixture
def calls(monkeypatch):
    """What the library was asked for."""
    found = []
    monkeypatch.setitem(sys.modules, "mauve", mauve(found))
    return found


def features(count, width=4):
    return torch.arange(count * width, dtype=torch.bfloat16).view(count, width).requires_grad_()


def test_the_library_gets_the_features_in_float32_and_its_score_is_a_number(calls):
    score = mauve_score(features(50), features(40), seed=3, scaling_factor=2)
    assert type(score) is float and score == 0.25
    [(made, real, clusters, scale, seed)] = calls
    assert np.array_equal(made, features(50).detach().float()) and made.dtype == np.float32
    assert real.shape == (40, 4) and (clusters, scale, seed) == (4, 2, 3)


@pytest.mark.parametrize(
    ("made", "real", "asked", "clusters"),
    [(100, 60, None, 6), (60, 100, None, 6), (16, 50, None, 2), (5, 5, None, 2), (9, 9, 9, 9)],
)
def test_clusters_are_a_tenth_of_the_fewer_texts_unless_they_are_told(
    calls, made, real, asked, clusters
):
    mauve_score(features(made), features(real), clusters=asked)
    assert calls[0][2:] == (clusters, 5.0, 0)


@pytest.mark.parametrize(
    ("made", "real", "options", "message"),
    [
        (features(9), features(9, 3), {}, r"equal width, got \(9, 4\) and \(9, 3\)"),
        (features(9)[0], features(9), {}, r"two matrices of equal width, got \(4,\)"),
        (features(9), features(9)[None], {}, "two matrices of equal width"),
        (features(1), features(9), {}, "made and real must have 2 texts or more, got 1 and 9"),
        (features(9), features(5), {"clusters": 6}, "clusters must be at most 5, got 6"),
        (features(9), features(9), {"clusters": 1}, "clusters must be at least 2, got 1"),
        (features(9), features(9), {"scaling_factor": 0.0}, "must be above 0, got 0"),
        (features(9) / 0, features(9), {}, "made must be finite"),
        (features(9), features(9) / 0, {}, "real must be finite"),
    ],
)
def test_refuses_features_that_cannot_be_compared(calls, made, real, options, message):
    with pytest.raises(ValueError, match=message):
        mauve_score(made, real, **options)
    assert not calls


def test_says_which_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    expected = (
        r"mauve-text must be installed for MAUVE \(pip install dbkernels\[text\]\), got an en"
    )
    with pytest.raises(ValueError, match=expected):
        mauve_score(features(9), features(9))
