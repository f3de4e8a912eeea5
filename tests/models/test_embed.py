import math

import pytest
import torch
import torch.nn.functional as F
from models.tiny import randomise

from dbkernels.models import DiTConfig, ViTConfig
from dbkernels.models.embed import (
    FinalModulation,
    NoiseEmbedding,
    grid_positions,
    patchify,
    sinusoid,
    unpatchify,
)


def test_patches_come_in_reading_order_with_channels_last():
    image = torch.randn(2, 3, 4, 6)
    tokens = patchify(image, 2)
    assert tokens.shape == (2, 6, 12)
    for token in range(6):
        top, left = 2 * (token // 3), 2 * (token % 3)
        patch = image[:, :, top : top + 2, left : left + 2]
        pixels = [patch[:, c, y, x] for y in (0, 1) for x in (0, 1) for c in (0, 1, 2)]
        assert torch.equal(tokens[:, token], torch.stack(pixels, dim=-1))


@pytest.mark.parametrize(
    ("channels", "side", "patch"), [(1, 8, 2), (3, 6, 3), (4, 4, 1), (2, 5, 5)]
)
def test_unpatchify_undoes_patchify(channels, side, patch):
    image = torch.randn(2, channels, side, side)
    assert torch.equal(unpatchify(patchify(image, patch), patch, channels), image)


def test_a_sinusoid_holds_cosines_then_sines_at_geometric_frequencies():
    value = torch.tensor([[0.0, 1.0], [-2.5, 40.0]])
    actual = sinusoid(value, 6, max_period=1000.0)
    assert actual.shape == (2, 2, 6) and actual.dtype == torch.float32
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        angles = [float(value[place]) * f for f in (1.0, 0.1, 0.01)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(actual[place], torch.tensor(expected), rtol=0, atol=1e-5)


def test_the_longest_wavelength_of_a_sinusoid_is_ten_thousand_by_default():
    assert sinusoid(torch.tensor(10.0), 4)[3].item() == pytest.approx(math.sin(10 / 100), abs=1e-6)


def test_grid_positions_name_the_column_then_the_row_in_reading_order():
    positions = grid_positions(3, 8)
    assert positions.shape == (9, 8) and positions.dtype == torch.float32
    for place in range(9):
        row, column = torch.tensor(place // 3), torch.tensor(place % 3)
        expected = torch.cat([sinusoid(column, 4), sinusoid(row, 4)])
        torch.testing.assert_close(positions[place], expected)


def test_grid_positions_are_distinct():
    distance = torch.cdist(grid_positions(16, 16), grid_positions(16, 16)).fill_diagonal_(1)
    assert distance.min() > 0.1


def test_the_noise_embedding_is_an_mlp_of_a_sinusoid():
    embedding = randomise(NoiseEmbedding(10))
    level = torch.tensor([-1.5, 0.0, 1.1])
    hidden = sinusoid(level, 256) @ embedding.fc1.weight.T + embedding.fc1.bias
    expected = F.silu(hidden) @ embedding.fc2.weight.T + embedding.fc2.bias
    assert embedding(level).shape == (3, 10)
    torch.testing.assert_close(embedding(level), expected)


def test_a_new_noise_embedding_is_small():
    embedding = NoiseEmbedding(64)
    for linear in (embedding.fc1, embedding.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()


def test_a_new_final_modulation_returns_its_input_bitwise():
    x = torch.randn(2, 6)
    assert torch.equal(FinalModulation(6, 4)(x, torch.randn(2, 4)), x)


def test_the_final_modulation_is_shift_then_scale():
    modulation = randomise(FinalModulation(6, 4))
    x, c = torch.randn(2, 6), torch.randn(2, 4)
    m = F.silu(c) @ modulation.linear.weight.T + modulation.linear.bias
    torch.testing.assert_close(modulation(x, c), (1 + m[:, 6:]) * x + m[:, :6])
    torch.testing.assert_close(modulation.parts(c), (m[:, :6], m[:, 6:]))


def vit(**options):
    base = {"num_classes": 3, "dim": 8, "depth": 1, "num_heads": 1, "mlp_hidden": 8, "cond_dim": 4}
    return ViTConfig(channels=1, **base, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid_positions(2, 6), "a width that 4 divides, got 6"),
        (lambda: vit(image_size=8, patch=3), "must divide the image size, got 3 and 8"),
        (lambda: vit(image_size=8, patch=0), "must divide the image size, got 0 and 8"),
        (lambda: vit(image_size=0, patch=2), "must divide the image size, got 2 and 0"),
        (lambda: DiTConfig(8, 1, 1, image_size=9), "must divide the image size, got 2 and 9"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
