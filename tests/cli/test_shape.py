import pytest
import torch

from dbkernels.cli.shape import fitted, preset, resized
from dbkernels.data.images import ImageData
from dbkernels.models import dit, vit


def data_of(shape, num_classes=7):
    return ImageData(torch.zeros(2, *shape).numpy(), torch.tensor([0, 1]), num_classes)


def test_a_preset_is_the_familys_own():
    assert preset("vit", "digits") is vit.PRESETS["digits"]
    assert preset("dit", "digits") is dit.PRESETS["digits"]


def test_an_unknown_preset_is_told_the_known_ones():
    with pytest.raises(ValueError, match="preset of vit must be one of cifar100, digits, got S/2"):
        preset("vit", "S/2")


def test_zero_keeps_the_presets_sizes():
    config = vit.PRESETS["cifar100"]
    assert resized(config, {"patch": 0, "dim": 0, "depth": 0, "num_heads": 0}) == config


def test_a_vit_keeps_the_ratio_of_its_mlp():
    config = vit.PRESETS["cifar100"]
    narrow = resized(config, {"dim": config.dim // 4, "depth": 2, "num_heads": 0})
    assert (narrow.dim, narrow.depth, narrow.num_heads) == (config.dim // 4, 2, config.num_heads)
    assert narrow.mlp_hidden == config.mlp_hidden // 4


def test_a_dit_takes_its_sizes():
    assert resized(dit.PRESETS["digits"], {"dim": 16, "num_heads": 2}).dim == 16


@pytest.mark.parametrize("name", ["patch", "dim", "depth", "num_heads"])
def test_a_negative_size_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, or 0 for the preset's, got -2"):
        resized(dit.PRESETS["digits"], {name: -2})


def test_the_data_decides_image_channels_and_classes():
    config = fitted(vit.PRESETS["cifar100"], data_of((1, 12, 12)))
    assert (config.image_size, config.channels, config.num_classes) == (12, 1, 7)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="images must be square, got 8 x 6"):
        fitted(vit.PRESETS["digits"], data_of((1, 8, 6)))


def test_images_that_the_patch_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="the patch must divide the image size, got 2 and 7"):
        fitted(vit.PRESETS["digits"], data_of((1, 7, 7)))
