"""What the blocks share, and the copies that make them independent.

The published code of arXiv:2506.14202 trains one stem, table and head with every block's steps; its
text lets no parameter be shared. Both are here: one setting, read once, when the groups are made.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dbkernels.training.partition import Block

Sharing = Literal["joint", "copies"]
Parameters = dict[str, nn.Parameter]
SHARED = "shared"  # name of the group that the steps of several blocks update


def own_group(block: Block) -> str:
    """Name of the group that the steps of one block alone update."""
    return f"block{block.index}"


class BlockModels(nn.Module):
    """One model per block: the very same one, or one with the block's own copy of what is shared.

    Layers exist once in either case, and so do the parts that make the clean target. With copies
    those are frozen: blocks that pass z from one to the next must agree on what z means, and no
    block may move it under the others.

    Args:
        model:    a family; it serves block 0 itself, and every block where sharing is joint
        blocks:   of one partition
        sharing:  joint, or copies
    Raises:
        ValueError: sharing is unknown, a block names a layer that the model lacks, or a layer with
                    copies would be trained by two blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], sharing: Sharing):
        super().__init__()
        if sharing not in ("joint", "copies"):
            raise ValueError(f"sharing must be joint or copies, got {sharing}")
        _check_layers(len(model.layers), blocks, sharing)
        self.blocks = tuple(blocks)
        self.model = model
        self.copies = nn.ModuleList()
        if sharing == "copies" and len(blocks) > 1:
            target_parts = [getattr(model, name) for name in model.target_parts]
            for part in target_parts:
                part.requires_grad_(False)
            once = {id(part): part for part in (model.layers, *target_parts)}
            self.copies.extend(copy.deepcopy(model, dict(once)) for _ in blocks[1:])

    def of(self, block: Block) -> nn.Module:
        """The model that a block trains and serves with."""
        return self.copies[block.index - 1] if self.copies and block.index else self.model

    def groups(self) -> dict[str, Parameters]:
        """Trainable parameters by the steps that update them: each block's own, and the shared.

        Every parameter is in one group, under its name in `named_parameters`. A layer that several
        blocks run is shared.
        """
        reached = {own_group(block): self._reached(block) for block in self.blocks}
        times = Counter(name for parameters in reached.values() for name in parameters)
        groups: dict[str, Parameters] = {group: {} for group in reached}
        shared: Parameters = {}
        for group, parameters in reached.items():
            for name, parameter in parameters.items():
                (groups[group] if times[name] == 1 else shared)[name] = parameter
        return {**groups, SHARED: shared} if shared else groups

    def frozen(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that no step updates, of the layers that one block alone runs, by its group.

        One that several blocks read is in none.
        """
        found = {
            own_group(block): {
                id(p): p
                for index in block.layers
                for p in self.model.layers[index].parameters()
                if not p.requires_grad
            }
            for block in self.blocks
        }
        times = Counter(key for parameters in found.values() for key in parameters)
        return {
            group: [p for key, p in parameters.items() if times[key] == 1]
            for group, parameters in found.items()
        }

    def _reached(self, block: Block) -> Parameters:
        """The trainable parameters that a step on a block can move."""
        model = self.of(block)
        idle = (layer for i, layer in enumerate(model.layers) if i not in block.layers)
        untouched = {id(parameter) for layer in idle for parameter in layer.parameters()}
        moved = {id(p) for p in model.parameters() if p.requires_grad} - untouched
        return {name: p for name, p in self.named_parameters() if id(p) in moved}


def _check_layers(depth: int, blocks: Sequence[Block], sharing: Sharing) -> None:
    owners = Counter(index for block in blocks for index in set(block.layers))
    if not set(owners) <= set(range(depth)):
        raise ValueError(f"the blocks' layers must be below {depth}, got {max(owners)}")
    if sharing == "copies" and max(owners.values()) > 1:
        index = owners.most_common(1)[0][0]
        raise ValueError(f"with copies a layer must be in one block, got layer {index} in several")


@torch.no_grad()
def load_weights(models: BlockModels, weights: dict[str, Tensor]) -> None:
    """Copy weights into models made with the same configuration.

    Names that `weights` lacks keep their values: a moving average has none of what is frozen.

    Raises:
        ValueError: a name is unknown or a shape differs.
    """
    parameters = dict(models.named_parameters())
    for name, tensor in weights.items():
        shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
        if shape != tuple(tensor.shape):
            raise ValueError(f"weight {name} must be {shape}, got {tuple(tensor.shape)}")
        parameters[name].copy_(tensor)
