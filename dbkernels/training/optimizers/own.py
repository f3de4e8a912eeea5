"""An optimizer of the reader's own: anything of torch's interface, made by a function.

A trainer wants the state from the start: it is moved with its block, and every checkpoint has it.
Most optimizers make it in their first step. So one steps on a copy of the parameter, with a
gradient and a rate of zero, and what it made there, its counts set back to 0, is the state of
before. Whether that is right is tried on two small tensors, bit for bit, when the trainer is made.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from dbkernels.training.optimizers.kind import OptimizerFactory, State, Trained, groups_of, set_rate

TRIED = 3  # steps


class Own:
    """What a function makes of parameter groups, as torch's optimizers take them.

    Raises:
        ValueError: it makes no optimizer, or one whose state before its first step is not known.
    """

    capturable = False

    def __init__(self, factory: OptimizerFactory):
        self._factory, self.name = factory, "the optimizer"
        self.counts: tuple[str, ...] = ()
        self._try()

    def make(self, trained: Sequence[Trained], *, captured: bool) -> list[Optimizer]:
        """As `Kind.make`."""
        return [self._made(groups_of(trained), [each.tensor for each in trained])]

    @torch.no_grad()
    def state(self, optimizer: Optimizer, tensor: Tensor) -> State:
        """As `Kind.state`."""
        other = tensor.detach().clone().requires_grad_()
        alone = self._made([{"params": [other], "weight_decay": 0.0}], [other])
        set_rate(alone, 0.0)
        other.grad = torch.zeros_like(other)
        _step(alone)
        state = dict(alone.state[other])
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name} in the state of {self.name} must be a tensor, as a checkpoint keeps, "
                    f"got {value!r:.40}"
                )
            if value.dim() == 0 and value == 1:
                value.zero_()
        return state

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

    def _try(self) -> None:
        """See whether steps from the state that is made before are those from none."""
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        starts, *gradients = ([draw(64, 72), draw(9)] for _ in range(1 + TRIED))
        results = []
        for early in (False, True):
            tensors = [start.clone().requires_grad_() for start in starts]
            made = self._made([{"params": tensors, "weight_decay": 0.1}], tensors)
            set_rate(made, 1e-2)
            before = _numbers(made)
            for tensor in tensors if early else ():
                made.state[tensor].update(self.state(made, tensor))
            for grads in gradients:
                for tensor, grad in zip(tensors, grads, strict=True):
                    tensor.grad = grad.clone()
                _step(made)
            self.counts = tuple(n for n, value in _numbers(made).items() if before[n] != value)
            results.append(tensors)
        if not all(torch.equal(*pair) for pair in zip(*results, strict=True)):
            raise ValueError(
                f"{self.name} must begin from a state that is known before its first step, got one "
                "whose first steps are others from there"
            )


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:
        kind = type(optimizer).__name__
        raise ValueError(f"{kind} must step without a closure, got {error}") from error


def _numbers(optimizer: Optimizer) -> dict[str, float | bool]:
    """Numbers of the first group, but for the rate."""
    group = optimizer.param_groups[0]
    return {n: v for n, v in group.items() if isinstance(v, int | float) and n != "lr"}
