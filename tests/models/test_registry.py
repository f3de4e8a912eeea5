import pytest
import torch
from models.tiny import every_family

from dbkernels.data.images import ImageData
from dbkernels.models import FAMILIES, DiT, ViT, family_named, family_of


def data_of(shape):
    return ImageData(torch.zeros(2, *shape).numpy(), torch.tensor([0, 1]), 7)


def test_the_families_have_names():
    assert {name: entry.model for name, entry in FAMILIES.items()} == {"vit": ViT, "dit": DiT}
    assert family_of(torch.nn.Linear(1, 1)) is None
    with pytest.raises(ValueError, match="family must be one of vit, dit, got cnn"):
        family_named("cnn")


@every_family
def test_a_family_is_found_by_its_name_and_by_a_model(family):
    entry = FAMILIES[family]
    model = entry.model.from_preset("digits")
    assert family_named(family) is entry is family_of(model)
    assert model.config == entry.model.preset("digits") and isinstance(model.config, entry.config)


@every_family
def test_sizes_change_by_name_and_by_data_and_without_any_nothing_does(family):
    config = FAMILIES[family].model.preset("digits")
    assert config.resized({}) == config
    smaller = config.resized({"dim": 16, "depth": 2})
    assert (smaller.dim, smaller.depth, smaller.num_heads) == (16, 2, config.num_heads)
    fitted = config.fitted(data_of((3, 12, 12)))
    assert (fitted.image_size, fitted.channels, fitted.num_classes) == (12, 3, 7)
    assert fitted.fields()["image"].shape == (3, 12, 12) and fitted.fields()["label"].bound == 7


def test_a_vit_keeps_the_ratio_of_its_mlp():
    config = ViT.preset("cifar100")
    assert config.resized({"dim": config.dim // 4}).mlp_hidden == config.mlp_hidden // 4


@every_family
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.preset("tiny"), "preset of {} must be one of {}, got tiny"),
        (lambda model: model.from_preset("tiny"), "preset of {} must be one of {}, got tiny"),
        (lambda model: model.preset("digits").fitted(data_of((1, 8, 6))), "square, got 8 x 6"),
        (lambda model: model.preset("digits").fitted(data_of((1, 7, 7))), "divide .* 2 and 7"),
    ],
)
def test_rejects(family, ask, message):
    model = FAMILIES[family].model
    with pytest.raises(ValueError, match=message.format(model.__name__, ", ".join(model.presets))):
        ask(model)
