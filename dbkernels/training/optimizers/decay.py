"""Which parameters weight decay is on."""

from collections.abc import Callable
from typing import Literal

from torch import nn

from dbkernels.models.low_rank import LowRank

DecayOn = Literal["matrices", "all"]
DecayRule = Callable[[str, nn.Parameter], bool]  # by a parameter's name in the blocks, and itself


def on_all(name: str, parameter: nn.Parameter) -> bool:
    """Every one, as torch has it."""
    return True


def on_matrices(blocks: nn.Module) -> DecayRule:
    """Weights that multiply, of two dimensions or more; no norm, bias or table, as the field does.

    A table is an `nn.Embedding`, or a tensor that no module of weights has, such as positions.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        owner, _, own = name.rpartition(".")
        module = blocks.get_submodule(owner)
        multiplies = "weight" in own or isinstance(module, LowRank)
        return parameter.dim() >= 2 and multiplies and not isinstance(module, nn.Embedding)

    return decays


def rule_of(on: DecayOn, blocks: nn.Module) -> DecayRule:
    """The rule that a setting names."""
    return on_all if on == "all" else on_matrices(blocks)
