"""The parameter groups of all blocks, of what they share, and what updates them."""

from collections.abc import Mapping

import torch

from dbkernels.training.diffusion_blocks import SHARED, DiffusionBlocks, own_group
from dbkernels.training.offload.offloader import Offloader
from dbkernels.training.optimizers.decay import DecayRule
from dbkernels.training.optimizers.kind import Kind
from dbkernels.training.parallel.gradients import SharedGradients
from dbkernels.training.parallel.placement import Placements
from dbkernels.training.param_group import ParamGroup, Updater, UpdaterInBackward
from dbkernels.training.trainer_config import TrainerConfig


def make_groups(
    blocks: DiffusionBlocks,
    config: TrainerConfig,
    *,
    device: torch.device,
    kind: Kind,
    decays: DecayRule,
    offloader: Offloader,
) -> dict[str, ParamGroup]:
    """Each group by its name; the state of one exists beside the others' homes, not all at once.

    Raises:
        ValueError: a block has nothing to train, or as `ParamGroup`.
    """
    frozen, groups = blocks.frozen(), blocks.groups()
    for block in blocks.trained:
        if not groups[own_group(block)] and SHARED not in groups:
            raise ValueError(
                f"block {block.index} must have a parameter to train, got none: all that its steps "
                "would update is frozen"
            )
    found = {}
    for name, parameters in groups.items():
        # what all blocks share is updated in the steps of each
        total = config.steps * (len(blocks.trained) if name == SHARED else 1)
        found[name] = ParamGroup(
            parameters, config, total=total, device=device, kind=kind, decays=decays
        )
        if config.offload != "none":
            offloader.adopt(name, found[name], frozen.get(name, ()))
    return found


def make_updater(
    groups: Mapping[str, ParamGroup],
    config: TrainerConfig,
    placements: Placements,
    *,
    device: torch.device,
) -> Updater:
    """What makes of a loss the updates of groups whose parameters are placed so."""
    if config.optimizer_in_backward:
        return UpdaterInBackward(list(groups.values()), device)
    trained = [p for group in groups.values() for p in group.parameters.values()]
    return Updater(config.clip, device, SharedGradients(trained, placements))
