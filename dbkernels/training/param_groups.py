"""The parameter groups of all blocks, and of what they share."""

import torch

from dbkernels.training.diffusion_blocks import SHARED, DiffusionBlocks, own_group
from dbkernels.training.offload.offloader import Offloader
from dbkernels.training.optimizers.decay import DecayRule
from dbkernels.training.optimizers.kind import Kind
from dbkernels.training.param_group import ParamGroup
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
