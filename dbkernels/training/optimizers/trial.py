"""Whether a trainer can have an optimizer of the reader's own: a few steps on two small tensors.

They must be those of torch's own loop, bit for bit, from a state that was made before; leave the
state in the tensors that it began with, which move with a block; and go on from copies of the state
and of the numbers, as a run does that is resumed.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dbkernels.training.optimizers.kind import OptimizerFactory, Trained, set_rate
from dbkernels.training.optimizers.own import Own, step
from dbkernels.training.param_group import ParamGroup
from dbkernels.training.trainer_config import TrainerConfig

SHAPES = {"matrix": (64, 72), "vector": (9,)}
STEPS = 6  # half of them before it goes on from copies
CONFIG = TrainerConfig(steps=STEPS, lr=2.0**-7, weight_decay=0.1)

Tensors = Mapping[str, Tensor]


def tried(factory: OptimizerFactory, device: torch.device) -> Own:
    """What a function makes, tried where it will step.

    Raises:
        ValueError: it makes no optimizer, or one that a trainer cannot have, with the reason.
    """
    kind, draw = Own(factory), torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=draw, dtype=torch.float32)
    starts, *gradients = (
        {name: random(shape).to(device) for name, shape in SHAPES.items()} for _ in range(1 + STEPS)
    )
    half, whole = _in_torchs_loop(kind, starts, gradients)
    before, after = gradients[: STEPS // 2], gradients[STEPS // 2 :]
    first = _group(kind, starts)
    there = _places(first)
    _take(first, before)
    if not _equal(first.parameters, half):
        raise ValueError(
            f"{kind.name} must begin from a state that is known before its first step, got one "
            "whose first steps are others from there"
        )
    if _places(first) != there:
        raise ValueError(
            f"{kind.name} must keep its state in the tensors that it began with, which move with "
            "a block, got others after some steps"
        )
    second = _group(kind, first.parameters)
    second.restore(len(before), {}, first.optimizer_tensors(), first.counts())
    _take(second, after)
    if not _equal(second.parameters, whole):
        raise ValueError(
            f"{kind.name} must go on from its state and the numbers of its groups, which are all "
            "that a checkpoint has of it, got one whose steps are others from there"
        )
    return kind


def _in_torchs_loop(kind: Own, starts: Tensors, gradients: Sequence[Tensors]) -> list[Tensors]:
    """Where half of the steps and all of them end; the kind then knows the numbers of its groups.

    The optimizer makes its state when it pleases.
    """
    tensors = {name: nn.Parameter(start.clone()) for name, start in starts.items()}
    trained = [Trained(name, tensor, CONFIG.weight_decay) for name, tensor in tensors.items()]
    (made,) = kind.make(trained, captured=False)
    set_rate(made, CONFIG.lr)
    found = []
    for grads in gradients:
        for name, tensor in tensors.items():
            tensor.grad = grads[name].clone()
        step(made)
        found.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
    # some may change later only, and some are not there before a step
    numbers = made.param_groups[0].items()
    kind.counts = tuple(n for n, value in numbers if isinstance(value, int | float) and n != "lr")
    return [found[len(found) // 2 - 1], found[-1]]


def _group(kind: Own, starts: Tensors) -> ParamGroup:
    parameters = {name: nn.Parameter(start.detach().clone()) for name, start in starts.items()}
    return ParamGroup(parameters, CONFIG, total=STEPS, kind=kind)


def _take(group: ParamGroup, gradients: Sequence[Tensors]) -> None:
    finite = torch.ones((), dtype=torch.bool, device=next(iter(group.parameters.values())).device)
    for grads in gradients:
        group.prepare(CONFIG.lr)
        for name, parameter in group.parameters.items():
            parameter.grad = grads[name].clone()
        group.update(where=finite)


def _places(group: ParamGroup) -> dict[str, int]:
    return {name: id(tensor) for name, tensor in group.optimizer_tensors().items()}


def _equal(found: Tensors, expected: Tensors) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
