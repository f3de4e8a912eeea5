"""An optimizer of the reader's own: anything of torch's interface, made by a function.

A trainer wants the state from the start: it is moved with its block, and every checkpoint has it.
Most optimizers make it in their first step. So one steps on a copy of the parameter, with a
gradient and a rate of zero, and what it first put under each name is the state of before.
"""

from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dbkernels.memory.plain import copy_of
from dbkernels.training.optimizers.kind import OptimizerFactory, State, Trained, groups_of, set_rate


class Own:
    """What a function makes of parameter groups, as torch's optimizers take them.

    Args:
        factory:  makes an optimizer; `tried` says whether a trainer can have it
    """

    capturable = by_element = False

    def __init__(self, factory: OptimizerFactory):
        self._factory, self.name = factory, "the optimizer"
        self.counts: tuple[str, ...] = ()

    def make(self, trained: Sequence[Trained], *, captured: bool) -> list[Optimizer]:
        """As `Kind.make`."""
        made = self._made(groups_of(trained), [each.tensor for each in trained])
        for group in made.param_groups:
            for name in self.counts:
                # some are there from the first step on
                group.setdefault(name, 0.0)
        return [made]

    @torch.no_grad()
    def state(self, optimizer: Optimizer, tensor: Tensor) -> State:
        """As `Kind.state`.

        Raises:
            ValueError: the optimizer keeps something else than tensors and numbers, or does not
                step.
        """
        other = tensor.detach().clone().requires_grad_()
        alone = self._made([{"params": [other], "weight_decay": 0.0}], [other])
        set_rate(alone, 0.0)
        other.grad = torch.zeros_like(other)
        alone.state[other] = found = _First()
        step(alone)
        for name in found:
            if not isinstance(value := found.first[name], Tensor | int | float | None):
                raise ValueError(
                    f"{name} in the state of {self.name} must be a tensor or a number, as a "
                    f"checkpoint keeps, got {value!r:.40}"
                )
        return {name: found.first[name] for name in found}

    def _made(self, groups: list[dict[str, object]], tensors: Iterable[Tensor]) -> Optimizer:
        made = self._factory(groups)
        if not isinstance(made, Optimizer):
            kind = type(made).__name__
            raise ValueError(f"make_optimizer must make a torch.optim.Optimizer, got a {kind}")
        self.name = type(made).__name__
        theirs = [id(tensor) for group in made.param_groups for tensor in group["params"]]
        if sorted(theirs) != sorted(map(id, tensors)):
            raise ValueError(f"{self.name} must have every tensor of its groups, once")
        return made


class _First(dict):
    """A state, and what was first put there under each name, in copies of that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.first: State = {}

    def __setitem__(self, name: str, value: Tensor | float | None) -> None:
        if name not in self.first:
            self.first[name] = copy_of(value) if isinstance(value, Tensor) else value
        super().__setitem__(name, value)

    # a dict's own set nothing item by item
    setdefault, update = MutableMapping.setdefault, MutableMapping.update


def step(optimizer: Optimizer) -> None:
    """A step of an optimizer that somebody else has made.

    Raises:
        ValueError: it does not step by itself.
    """
    try:
        optimizer.step()
    except Exception as error:
        kind = type(optimizer).__name__
        raise ValueError(f"{kind} must step without a closure, got {error}") from error
