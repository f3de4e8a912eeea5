"""Ways to train one model: trainers of them to compare, and their steps.

All that can share it train the same parameters, with the same state of the optimizer: so many ways
fit a device at once, and each begins where the others are.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import measure
import torch
from layer_case import Competitor
from show import Row, cut_text
from torch import nn

from dbkernels.data.made_up import MadeUpData
from dbkernels.models.baseline import use_baseline
from dbkernels.planning.recipe import BASELINES, Recipe
from dbkernels.training.diffusion_blocks import own_group
from dbkernels.training.partition import Block
from dbkernels.training.trainer import Trainer

LR = 1e-6  # every way trains the same parameters, whose size it should leave alone
DTYPES = ("float32", "autocast")  # autocast: parameters of float32, compute in bfloat16
LAUNCH = ("ops", "graph")  # one by one, or the step as one CUDA graph


def described(recipe: Recipe) -> Row:
    """What a row says of a model and of the way in which it is trained."""
    names = ("method", "num_blocks", "recompute", "budget", "offload", "optimizer_in_backward")
    token = recipe.model.fields().get("token")
    return (
        {"suite": "training", "family": recipe.family, "preset": recipe.preset}
        | ({"words": token.bound} if token else {})
        | {"batch": recipe.batch_size, "dtype": DTYPES[recipe.autocast]}
        | {name: getattr(recipe, name) for name in names}
        | {"launch": LAUNCH[recipe.cuda_graphs]}
    )


def named(recipe: Recipe) -> str:
    """In words, for messages."""
    return f"{recipe.preset}, {cut_text(described(recipe))}"


def implementation_of(recipe: Recipe, device: torch.device) -> str:
    """What computes the layers."""
    impls = {"block_fused": "fused", "compiled": "compiled"}
    return Competitor(impls.get(recipe.method, "eager")).implementation(device)


# trainers


def make_trainer(recipe: Recipe, device: torch.device, *, owner: Trainer | None = None) -> Trainer:
    """A trainer at its first step.

    Args:
        recipe:  of what it trains, and how
        device:  to train on
        owner:   of the same model, whose parameters and optimizer's state it takes for its own
    """
    config = recipe.config()
    config = replace(config, trainer=replace(config.trainer, lr=LR))
    home = config.home(device) if owner is None else "meta"
    # weights are drawn where they are trained, as it takes a host many seconds
    with device if owner is None else torch.device("meta"):
        blocks = config.build(home)
    if owner is not None:
        _lend(owner.blocks.model, blocks.model)
    if BASELINES[recipe.method] is not None:
        budget = 1.0 if recipe.budget is None else recipe.budget
        use_baseline(blocks.model, BASELINES[recipe.method], budget=budget)
    data = MadeUpData(recipe.model.fields(), recipe.batch_size)
    trainer = config.trainer_of(blocks, data, device=device)
    if owner is not None:
        _lend_state(owner, trainer)
    return trainer


def make_steps(recipe: Recipe, device: torch.device, others: "Mapping[Recipe, Steps]") -> "Steps":
    """The steps of one way, beside those of others that are there already.

    Ways that move no parameters train the same ones. With offload, ways that differ by recompute
    alone are one trainer's: there is room for one, and a slot on the device too.

    Args:
        recipe, device:  as those of `make_trainer`
        others:          by their recipes
    """
    here = recipe.offload == "none"
    for other, steps in others.items():
        same_end = recipe.optimizer_in_backward == other.optimizer_in_backward
        if here and other.offload == "none" and same_end:
            return Steps(make_trainer(recipe, device, owner=steps.trainer))
        if here or recipe.cuda_graphs or other.method != recipe.method:
            continue
        if replace(recipe, recompute=other.recompute) == other:
            return Steps(steps.trainer, recipe.recompute, beside=steps)
    return Steps(make_trainer(recipe, device), None if here else recipe.recompute)


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
    state = {
        p: of for group in owner.groups.values() for p, of in group.optimizers[0].state.items()
    }
    for group in trainer.groups.values():
        for parameter in group.parameters.values():
            group.optimizers[0].state[parameter] = state[parameter]


# steps


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
    return {"step_ms": median, "p20_ms": p20, "p80_ms": p80, "sweep_ms": median * len(by_block)}
