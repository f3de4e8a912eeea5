import pytest

from dbkernels.cli.preset_run import made_up, preset_run
from dbkernels.models import dit
from dbkernels.training.run import read_config


def test_settings_are_those_of_train(trained, tmp_path):
    trained("dit", "out")
    config, made = (
        preset_run("dit", "S/2", batch=8, autocast=True),
        read_config(tmp_path / "out"),
    )
    assert (config.model, config.trainer.batch_size) == (dit.PRESETS["S/2"], 8)
    assert config.trainer.autocast
    for name in ("weighting", "label_drop", "mirror", "shift", "partition", "prior"):
        assert getattr(config, name) == getattr(made, name)


def test_an_optimizer_in_the_backward_does_not_clip():
    after, inside = (
        preset_run("dit", "S/2", batch=8, autocast=True, optimizer_in_backward=each).trainer
        for each in (False, True)
    )
    assert (after.optimizer_in_backward, after.clip) == (False, 1.0)
    assert (inside.optimizer_in_backward, inside.clip) == (True, 0.0)


def test_made_up_samples_fill_one_batch_and_are_the_same_every_time():
    config = preset_run("dit", "S/2", batch=3, autocast=False)
    first, again = made_up(config), made_up(config)
    assert first.images.shape == (3, 4, 32, 32) and first.num_classes == 1000
    assert (first.images == again.images).all() and (first.labels == again.labels).all()
    assert abs(first.images.std() - 1) < 0.05


def test_rejects():
    with pytest.raises(ValueError, match="preset of ViT must be one of cifar100, digits, got XL"):
        preset_run("vit", "XL", batch=8, autocast=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        preset_run("vit", "digits", batch=0, autocast=False)
