import pytest
import torch

from dbkernels.data.images import ImageData
from dbkernels.models import FAMILIES, DiT, ViT, family_named, family_of
from dbkernels.models.registry import ModelConfig

every = pytest.mark.parametrize("name", FAMILIES)


def data_of(shape, num_classes=7):
    return ImageData(torch.zeros(2, *shape).numpy(), torch.tensor([0, 1]), num_classes)


def digits(name) -> ModelConfig:
    return FAMILIES[name].model.preset("digits")


def test_the_families_have_names():
    assert {name: entry.model for name, entry in FAMILIES.items()} == {"vit": ViT, "dit": DiT}
    assert family_of(torch.nn.Linear(1, 1)) is None
    with pytest.raises(ValueError, match="family must be one of vit, dit, got cnn"):
        family_named("cnn")


@every
def test_a_family_is_found_by_its_name_and_by_a_model(name):
    entry = FAMILIES[name]
    model = entry.model.from_preset("digits")
    assert family_named(name) is entry is family_of(model)
    assert model.config == digits(name) and isinstance(model.config, entry.config)


@every
def test_an_unknown_preset_is_told_the_known_ones(name):
    model = FAMILIES[name].model
    message = f"preset of {model.__name__} must be one of {', '.join(model.presets)}, got tiny"
    for make in (model.preset, model.from_preset):
        with pytest.raises(ValueError, match=message):
            make("tiny")


@every
def test_sizes_change_by_name_and_without_any_nothing_does(name):
    config = digits(name)
    assert config.resized({}) == config
    smaller = config.resized({"dim": config.dim // 4, "depth": 2})
    assert (smaller.dim, smaller.depth) == (config.dim // 4, 2)
    assert smaller.num_heads == config.num_heads


def test_a_vit_keeps_the_ratio_of_its_mlp():
    config = ViT.preset("cifar100")
    assert config.resized({"dim": config.dim // 4}).mlp_hidden == config.mlp_hidden // 4


@every
def test_the_data_decides_image_channels_and_classes(name):
    config = digits(name).fitted(data_of((3, 12, 12)))
    assert (config.image_size, config.channels, config.num_classes) == (12, 3, 7)
    fields = config.fields()
    assert (fields["image"].shape, fields["label"].bound) == ((3, 12, 12), 7)


@every
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 6), "images must be square, got 8 x 6"),
        ((1, 7, 7), "the patch must divide the image size, got 2 and 7"),
    ],
)
def test_images_that_no_model_of_the_family_reads_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        digits(name).fitted(data_of(shape))


def test_what_samples_asks_for_so_many_of_each_class_and_has_a_label_for_none():
    entry, config = FAMILIES["dit"], digits("dit")
    labels = entry.prompts(config, 2, torch.device("cpu"))["label"]
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert entry.null_label(config) == 10
    assert FAMILIES["vit"].prompts is None and FAMILIES["vit"].null_label is None
