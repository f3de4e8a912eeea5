"""Trainers of one case to compare, and their steps.

All that can share it train the same parameters, with the same state of the optimizer: so many ways
fit a device at once, and each begins where the others are.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import measure
import torch
from torch import nn
from training_case import TrainingCase, Way

from dbkernels.data.made_up import MadeUpData
from dbkernels.models.baseline import use_baseline
from dbkernels.training.diffusion_blocks import DiffusionBlocks, own_group
from dbkernels.training.partition import Block
from dbkernels.training.run import RunConfig
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
        with device:  # where the weights are drawn, which takes a host many seconds
            models = config.build(config.home(device))
    else:
        models = _without_parameters(config)
        _lend(owner.blocks.model, models.model)
    if way.baseline is not None:
        budget = 1.0 if way.budget is None else way.budget
        use_baseline(models.model, way.baseline, budget=budget)
    trainer = config.trainer_of(
        models, MadeUpData(config.model.fields(), case.batch), device=device
    )
    if owner is not None:
        _lend_state(owner, trainer)
    return trainer


def make_steps(
    case: TrainingCase, way: Way, device: torch.device, others: "Mapping[Way, Steps]"
) -> "Steps":
    """The steps of one way, beside those of others that are there already.

    Ways that move no parameters train the same ones. With offload, ways that differ by recompute
    alone are one trainer's: there is room for one, and a slot on the device too.

    Args:
        case, way, device:  as those of `make_trainer`
        others:             by their ways
    """
    for other, steps in others.items():
        if (
            shares(way)
            and shares(other)
            and way.optimizer_in_backward == other.optimizer_in_backward
        ):
            return Steps(make_trainer(case, way, device, owner=steps.trainer))
        if (
            not shares(way)
            and replace(way, recompute=other.recompute) == other
            and way.launch == "ops"
        ):
            return Steps(steps.trainer, way.recompute, beside=steps)
    return Steps(make_trainer(case, way, device), way.recompute if not shares(way) else None)


def shares(way: Way) -> bool:
    """Whether a way can train another's parameters: it does not move them."""
    return way.offload == "none"


def _without_parameters(config: RunConfig) -> DiffusionBlocks:
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
    state = {p: of for group in owner.groups.values() for p, of in group.optimizer.state.items()}
    for group in trainer.groups.values():
        for parameter in group.parameters.values():
            group.optimizer.state[parameter] = state[parameter]


class Steps:
    """A trainer's steps to be called, the blocks in turn.

    Args:
        trainer:    which may run other steps too
        recompute:  of the fused layer, in these steps; None leaves the layers as they are
        beside:   other steps of the same trainer
    """

    def __init__(
        self, trainer: Trainer, recompute: str | None = None, beside: "Steps | None" = None
    ):
        self.trainer, self.recompute = trainer, recompute
        self.visited: list[int] = []  # the block of each call
        self._last: list[int] = [] if beside is None else beside._last  # the trainer's own
        layers = trainer.blocks.model.layers
        self._configs = [
            (each, replace(each.config, recompute=recompute)) for each in layers if recompute
        ]

    def __call__(self) -> None:
        block = self._next()
        self.visited.append(block.index)
        self.step(block)

    def prepare(self) -> None:
        """Have another block on the device than the next call's, as a run in turn would."""
        block, blocks = self._next(), self.trainer.blocks
        if self._last == [block.index] and len(blocks) > 1:
            other = blocks[(block.index + 1) % len(blocks)]
            self.trainer.offloader.enter(own_group(other))
            self._last[:] = [other.index]

    def _next(self) -> Block:
        return self.trainer.blocks[len(self.visited) % len(self.trainer.blocks)]

    def step(self, block: Block) -> None:
        """A step of a block that is not counted among the calls."""
        for layer, config in self._configs:
            layer.config = config
        self.trainer.step_block(block)
        self._last[:] = [block.index]

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
