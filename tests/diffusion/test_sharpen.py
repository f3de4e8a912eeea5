import pytest
import torch

from dbkernels.diffusion.sharpen import sharpened

ODDS = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1])


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.1, 0.5, 0, 0.3, 0.1]),
        (0.5, 1.0, [1 / 36, 25 / 36, 0, 9 / 36, 1 / 36]),
        (1e9, 1.0, [0.25, 0.25, 0, 0.25, 0.25]),
        (1e-300, 1.0, [0, 1, 0, 0, 0]),
        (0.0, 1.0, [0, 1, 0, 0, 0]),
        # the word that brings them there is kept, and no more
        (1.0, 0.4, [0, 1, 0, 0, 0]),
        (1.0, 0.6, [0, 0.625, 0, 0.375, 0]),
        # of two that are as likely the first
        (1.0, 0.85, [1 / 9, 5 / 9, 0, 3 / 9, 0]),
        # of what the temperature left: 25 of 36 are fewer than 0.7
        (0.5, 0.7, [0, 25 / 34, 0, 9 / 34, 0]),
    ],
)
def test_probabilities_become_sharper(temperature, top_p, expected):
    found = sharpened(7 * ODDS.expand(2, 3, 5), temperature, top_p)
    assert found.shape == (2, 3, 5) and found.dtype == torch.float64
    assert found[1, 2].tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(found[0, 0], found[1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
        ({"temperature": float("inf")}, "temperature must be finite and at least 0, got inf"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        sharpened(ODDS, **settings)
