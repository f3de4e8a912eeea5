"""The configuration of a dry run of a preset, or of a run on made-up samples."""

from dbkernels.data.made_up import MadeUpData
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models.registry import family_named
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
        model=family_named(family).model.preset(name),
        data="made up",
        weighting=family_named(family).weighting,
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


def made_up(config: RunConfig) -> MadeUpData:
    """As many samples as one batch of a run has, of unit variance; the same ones every time."""
    return MadeUpData(config.model.fields(), config.trainer.batch_size)
