"""What a trainer asks of a kind of optimizer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

OptimizerFactory = Callable[[list[dict[str, object]]], Optimizer]  # of torch's parameter groups
# of one parameter, by the names that the optimizer has for it
State = dict[str, Tensor | float | None]


class Trained(NamedTuple):
    """A tensor that an optimizer updates: a parameter, or its values in float32."""

    name: str
    """Of the parameter in `DiffusionBlocks`, such as model.layers.0.mlp.fc1.weight."""
    tensor: Tensor
    weight_decay: float
    """Of this tensor; 0 for none."""


class Kind(Protocol):
    """A kind of optimizer.

    name:        for errors
    capturable:  whether a CUDA graph can hold a step, whose rate is then a tensor
    by_element:  whether each number is updated by itself, so that a process may have some of them
    counts:      names of numbers in its parameter groups that its steps may change
    """

    name: str
    capturable: bool
    by_element: bool
    counts: tuple[str, ...]

    def make(self, trained: Sequence[Trained], *, captured: bool) -> list[Optimizer]:
        """Optimizers of some tensors, which may be none; each tensor is in one of them.

        Raises:
            ValueError: a package is missing, or they cannot be made.
        """

    def state(self, optimizer: Optimizer, tensor: Tensor) -> State:
        """What the optimizer's first step on a tensor would begin with, in new tensors.

        Numbers in it go into a checkpoint too.
        """


def groups_of(trained: Sequence[Trained]) -> list[dict[str, object]]:
    """Parameter groups for torch, one for each weight decay; one without parameters if need be."""
    decays = dict.fromkeys(each.weight_decay for each in trained) or {0.0: None}
    return [
        {
            "params": [each.tensor for each in trained if each.weight_decay == decay],
            "weight_decay": decay,
        }
        for decay in decays
    ]


def skips(optimizer: Optimizer) -> bool:
    """Whether its steps do nothing where `found_inf` says so on the device, as torch's fused ones.

    Of any other the host reads whether a step may be, before it.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def set_rate(optimizer: Optimizer, rate: float | Tensor) -> None:
    """Give all groups one rate, in place where an optimizer reads it from a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and not isinstance(rate, Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
