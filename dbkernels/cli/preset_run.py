"""The configuration of a dry run of a preset, or of a run on made-up samples."""

import torch

from dbkernels.cli.shape import preset
from dbkernels.cli.train import DEFAULT_WEIGHTING
from dbkernels.data.images import ImageData
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.training.run import PartitionConfig, RunConfig
from dbkernels.training.trainer_config import TrainerConfig


def preset_run(
    family: str, name: str, *, batch: int, autocast: bool, optimizer_in_backward: bool = False
) -> RunConfig:
    """A run of a preset with the settings that `train` has by default.

    Args:
        family:     of the model
        name:       of the preset
        batch:      samples of a step
        autocast:   whether it computes in bfloat16
        optimizer_in_backward:  updates parameters in the backward, without clipping
    Raises:
        ValueError: there is no such preset, or the batch is empty.
    """
    return RunConfig(
        family=family,
        model=preset(family, name),
        data="made up",
        weighting=DEFAULT_WEIGHTING[family],
        label_drop=0.0,
        mirror=False,
        shift=0,
        partition=PartitionConfig(),
        prior=LogNormal(),
        trainer=TrainerConfig(
            steps=10**6,
            batch_size=batch,
            autocast=autocast,
            optimizer_in_backward=optimizer_in_backward,
            clip=0.0 if optimizer_in_backward else 1.0,
        ),
    )


def made_up(config: RunConfig) -> ImageData:
    """As many samples as one batch of a run has, of unit variance; the same ones every time."""
    model, count = config.model, config.trainer.batch_size
    random = torch.Generator().manual_seed(0)
    shape = (count, model.channels, model.image_size, model.image_size)
    images = torch.randn(shape, generator=random).numpy()
    labels = torch.randint(model.num_classes, (count,), generator=random)
    return ImageData(images, labels, model.num_classes)
