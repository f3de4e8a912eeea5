"""What embeds pixels, levels and labels, and how families and their sizes are found."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models.tiny import CONFIGS, every_family, image_families, randomise

from dbkernels.data.images import ImageData
from dbkernels.models import (
    AR,
    FAMILIES,
    MDM,
    DiT,
    DiTConfig,
    Huginn,
    MMDiT,
    ViT,
    family_named,
    family_of,
)
from dbkernels.models.embed import (
    FinalModulation,
    NoiseEmbedding,
    grid_positions,
    patchify,
    sinusoid,
    unpatchify,
)
from dbkernels.models.rotary import rotary_table


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
    closed = sinusoid(torch.tensor(10.0), 6, "closed", max_period=100.0)
    expected = [math.sin(10 * f) for f in (1.0, 0.1, 0.01)]
    torch.testing.assert_close(closed[3:], torch.tensor(expected), rtol=0, atol=1e-5)
    # the longest wavelength is ten thousand by default
    assert sinusoid(torch.tensor(10.0), 4)[3].item() == pytest.approx(math.sin(10 / 100), abs=1e-6)


def published_positions(D, side):
    """`get_2d_sincos_pos_embed` of the code of MAE, which that of DiT copied, in float64."""

    def of_axis(dim, pos):
        omega = 1 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
        out = np.einsum("m,d->md", pos.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    # here w goes first
    grid = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    return np.concatenate([of_axis(D // 2, grid[0]), of_axis(D // 2, grid[1])], axis=1)


@pytest.mark.parametrize(("side", "D"), [(1, 4), (3, 8), (16, 384), (32, 1152)])
def test_grid_positions_are_those_of_the_published_checkpoints(side, D):
    positions, expected = grid_positions(side, D), torch.from_numpy(published_positions(D, side))
    assert positions.shape == (side * side, D) and positions.dtype == torch.float32
    # an angle below 32 is rounded by 2e-6
    torch.testing.assert_close(positions.double(), expected, rtol=0, atol=4e-6)
    # of older runs cosines come first; nothing else differs
    old = grid_positions(side, D, "cos_sin").unflatten(-1, (2, 2, D // 4))
    assert torch.equal(old.flip(2).flatten(1), positions)


def test_the_rotary_table_holds_cosines_then_sines_each_half_repeated():
    table = rotary_table(torch.tensor([0, 3]), 4, base=100.0)
    angles = torch.tensor([[0, 0, 0, 0], [3, 0.3, 3, 0.3]])
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, torch.stack([angles.cos(), angles.sin()]))


def test_the_noise_embedding_is_an_mlp_of_a_sinusoid_and_small_at_first():
    embedding, level = NoiseEmbedding(64), torch.tensor([-1.5, 0.0, 1.1])
    for linear in (embedding.fc1, embedding.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()
    randomise(embedding)
    hidden = sinusoid(level, 256) @ embedding.fc1.weight.T + embedding.fc1.bias
    expected = F.silu(hidden) @ embedding.fc2.weight.T + embedding.fc2.bias
    torch.testing.assert_close(embedding(level), expected, rtol=1e-4, atol=1e-4)


def test_the_final_modulation_is_shift_then_scale_and_nothing_at_first():
    modulation, x, c = FinalModulation(6, 4), torch.randn(2, 6), torch.randn(2, 4)
    assert torch.equal(modulation(x, c), x)
    randomise(modulation)
    m = F.silu(c) @ modulation.linear.weight.T + modulation.linear.bias
    torch.testing.assert_close(modulation(x, c), (1 + m[:, 6:]) * x + m[:, :6])
    torch.testing.assert_close(modulation.parts(c), (m[:, :6], m[:, 6:]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid_positions(2, 6), "a width that 4 divides, got 6"),
        (lambda: DiTConfig(6, 1, 1), "a width that 4 divides, got 6"),
        (lambda: DiTConfig(8, 1, 1, frequencies="all"), "be one of open, closed, got all"),
        (lambda: DiTConfig(8, 1, 1, positions="sin"), "be one of sin_cos, cos_sin, got sin"),
        (lambda: rotary_table(torch.arange(3), 5), "need an even head width, got 5"),
        (lambda: CONFIGS["vit"].resized({"patch": 3}), "must divide the image size, got 3 and 4"),
        (lambda: CONFIGS["vit"].resized({"patch": 0}), "must divide the image size, got 0 and 4"),
        (lambda: CONFIGS["dit"].resized({"image_size": 0}), "the image size, got 2 and 0"),
        (lambda: DiTConfig(8, 1, 1, image_size=9), "must divide the image size, got 2 and 9"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# the registry of families


def data_of(shape):
    return ImageData(torch.zeros(2, *shape).numpy(), torch.tensor([0, 1]), 7)


def test_the_families_have_names():
    models = {name: entry.model for name, entry in FAMILIES.items()}
    assert models == {
        "vit": ViT, "dit": DiT, "mmdit": MMDiT, "mdm": MDM, "ar": AR, "huginn": Huginn
    }  # fmt: skip
    assert family_of(torch.nn.Linear(1, 1)) is None
    with pytest.raises(
        ValueError, match="family must be one of vit, dit, mmdit, mdm, ar, huginn, got cnn"
    ):
        family_named("cnn")


@every_family
def test_a_family_is_found_by_its_name_and_by_a_model(family):
    entry = FAMILIES[family]
    config = entry.model.preset(entry.model.smallest)
    model = entry.model.from_preset(entry.model.smallest)
    assert family_named(family) is entry is family_of(model)
    assert model.config == config and isinstance(config, entry.config)


@every_family
def test_sizes_change_by_name_and_without_any_nothing_does(family):
    config = FAMILIES[family].model.preset(FAMILIES[family].model.smallest)
    assert config.resized({}) == config
    smaller = config.resized({"dim": 16, "depth": 2})
    assert (smaller.dim, smaller.depth, smaller.num_heads) == (16, 2, config.num_heads)


@image_families
def test_sizes_of_images_change_by_data(family):
    config = FAMILIES[family].model.preset("digits")
    fitted = config.fitted(data_of((3, 12, 12)))
    assert (fitted.image_size, fitted.channels, fitted.num_classes) == (12, 3, 7)
    assert fitted.fields()["image"].shape == (3, 12, 12) and fitted.fields()["label"].bound == 7
    # sizes that only the data allow, whose own sizes stand
    assert config.fitted(data_of((3, 9, 9)), {"patch": 3, "image_size": 6}).image_size == 9


@pytest.mark.parametrize("family", ["mdm", "ar", "huginn"])
def test_sizes_of_text_change_by_data(family):
    config = FAMILIES[family].model.preset("small")
    fitted = config.fitted(SimpleNamespace(vocabulary=9), {"dim": config.dim // 4})
    assert (fitted.vocabulary, fitted.mlp_hidden) == (9, config.mlp_hidden // 4)


def test_a_vit_keeps_the_ratio_of_its_mlp():
    config = ViT.preset("cifar100")
    assert config.resized({"dim": config.dim // 4}).mlp_hidden == config.mlp_hidden // 4


def test_the_vit_of_tiny_imagenet_is_as_the_published_one_but_for_its_sizes():
    config = ViT.preset("tiny-imagenet")
    assert config.fields()["image"].shape == (3, 64, 64) and config.fields()["label"].bound == 200
    assert (config.patch, config.mlp_hidden) == (4, 4 * config.dim)
    sizes = ("dim", "num_heads", "cond_dim", "image_size", "num_classes")
    assert replace(ViT.preset("published"), **{k: getattr(config, k) for k in sizes}) == config


@image_families
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.preset("tiny"), "preset of {} must be one of {}, got tiny"),
        (lambda model: model.from_preset("tiny"), "preset of {} must be one of {}, got tiny"),
        (lambda model: model.preset("digits").fitted(data_of((1, 8, 6))), "square, got 8 x 6"),
        (lambda model: model.preset("digits").fitted(data_of((1, 7, 7))), "divide .* 2 and 7"),
    ],
)
def test_a_family_rejects(family, ask, message):
    model = FAMILIES[family].model
    with pytest.raises(ValueError, match=message.format(model.__name__, ", ".join(model.presets))):
        ask(model)
