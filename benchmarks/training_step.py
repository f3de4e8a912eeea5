"""Trainers of one case to compare, and their steps.

All that can share it train the same parameters, with the same state of the optimizer: so many ways
fit a device at once, and each begins where the others are.
"""

import statistics
from collections.abc import Sequence

import measure
import torch
from torch import nn
from training_case import TrainingCase, Way

from dbkernels.cli.rehearsed import made_up
from dbkernels.models.baseline import use_baseline
from dbkernels.training.run import RunConfig
from dbkernels.training.sharing import BlockModels
from dbkernels.training.trainer import Trainer


def make_trainer(
    case: TrainingCase, way: Way, device: torch.device, *, owner: Trainer | None = None
) -> Trainer:
    """A trainer at its first step.

    Args:
        case:    what it trains
        way:     how
        device:  to train on
        owner:   of the same case, whose parameters and optimizer's state it takes for its own
    """
    config = case.config(way)
    if owner is None:
        models = config.build("cpu" if way.resident == "block" else device)
    else:
        models = _without_parameters(config)
        _lend(owner.models.model, models.model)
    if way.baseline is not None:
        budget = 1.0 if way.budget is None else way.budget
        use_baseline(models.model, way.baseline, budget=budget)
    trainer = config.trainer_of(models, made_up(config), device=device)
    if owner is not None:
        _lend_state(owner, trainer)
    return trainer


def shares(way: Way) -> bool:
    """Whether a way can train another's parameters: it does not move them."""
    return way.resident == "all"


def _without_parameters(config: RunConfig) -> BlockModels:
    with torch.device("meta"):
        return config.build("meta")


def _lend(owner: nn.Module, model: nn.Module) -> None:
    """Put an owner's parameters and buffers in the place of a model's own."""
    for (name, module), (other, lender) in zip(
        model.named_modules(), owner.named_modules(), strict=True
    ):
        assert name == other
        tensors = [*lender.named_parameters(recurse=False), *lender.named_buffers(recurse=False)]
        for key, tensor in tensors:
            setattr(module, key, tensor)


def _lend_state(owner: Trainer, trainer: Trainer) -> None:
    state = {p: of for part in owner.parts.values() for p, of in part.optimizer.state.items()}
    for part in trainer.parts.values():
        for parameter in part.parameters.values():
            part.optimizer.state[parameter] = state[parameter]


class Steps:
    """A trainer's steps to be called, the blocks in turn."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.visited: list[int] = []  # the block of each call

    def __call__(self) -> None:
        blocks = self.trainer.blocks
        block = blocks[len(self.visited) % len(blocks)]
        self.visited.append(block.index)
        self.trainer.step_block(block)

    def sweep(self) -> None:
        """A step of every block."""
        for _ in self.trainer.blocks:
            self()


def step_times(milliseconds: Sequence[float], visited: Sequence[int]) -> dict[str, float]:
    """Median and quantiles of a step of each block, averaged over the blocks; and of a sweep.

    Args:
        milliseconds:  of some steps
        visited:       the block of each; two or more steps of every block
    """
    by_block: dict[int, list[float]] = {}
    for ms, block in zip(milliseconds, visited, strict=True):
        by_block.setdefault(block, []).append(ms)
    of_blocks = zip(*(measure.quantiles(found) for found in by_block.values()), strict=True)
    median, p20, p80 = (statistics.fmean(values) for values in of_blocks)
    return {
        "step_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "sweep_ms": median * len(by_block),
    }
