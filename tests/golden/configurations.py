"""The recorded runs by key: the one place of these tests that knows the package's names.

A key never changes; what it is called in the package may. A run is tiny: 20 steps, dim 32,
depth 3, the digits of 8 x 8 pixels, the settings of its key and the defaults for the rest.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.data.images import open_data
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models import DiTConfig, ViTConfig
from dbkernels.ops import implementation, use_implementation
from dbkernels.training.run import PartitionConfig, RunConfig
from dbkernels.training.trainer_config import TrainerConfig

STEPS = 20
NUM_BLOCKS = 2  # one of two layers and one of a single layer


class Run(NamedTuple):
    """What a run left."""

    losses: list[float]  # one a step
    weights: dict[str, Tensor]  # by name, in the order of the model
    ema: dict[str, Tensor]  # of the weights, in the same order; empty without a moving average


def _config(family: str) -> RunConfig:
    """The settings of every key, where a key has no others."""
    if family == "vit":
        model = ViTConfig(
            image_size=8,
            patch=2,
            channels=1,
            num_classes=10,
            dim=32,
            depth=3,
            num_heads=2,
            mlp_hidden=64,
            cond_dim=16,
        )
    else:
        model = DiTConfig(dim=32, depth=3, num_heads=2, image_size=8, channels=1, num_classes=10)
    return RunConfig(
        family=family,
        model=model,
        data="digits",
        weighting="none" if family == "vit" else "edm",
        label_drop=0.0,
        mirror=False,
        shift=0,
        partition=PartitionConfig(num_blocks=NUM_BLOCKS),
        prior=LogNormal(),
        trainer=TrainerConfig(steps=STEPS // NUM_BLOCKS, batch_size=8, lr=1e-2, clip=0.5, seed=3),
    )


def _vit(*, recompute: str = "none", **trainer) -> RunConfig:
    return _with("vit", recompute, trainer)


def _dit(*, recompute: str = "none", **trainer) -> RunConfig:
    return _with("dit", recompute, trainer)


def _with(family: str, recompute: str, trainer: dict) -> RunConfig:
    config = _config(family)
    return replace(
        config,
        model=replace(config.model, recompute=recompute),
        trainer=replace(config.trainer, **trainer),
    )


def _one_block(config: RunConfig) -> RunConfig:
    trainer = replace(config.trainer, steps=STEPS)
    return replace(config, partition=PartitionConfig(num_blocks=1), trainer=trainer)


# key -> (directory of its own) -> settings; clip and ema are small enough to bind in so few steps
CONFIGURATIONS: dict[str, Callable[[Path], RunConfig]] = {
    "vit none": lambda directory: _vit(),
    "vit attention": lambda directory: _vit(recompute="attention"),
    "vit mlp": lambda directory: _vit(recompute="mlp"),
    "vit qkv": lambda directory: _vit(recompute="qkv"),
    "vit layer": lambda directory: _vit(recompute="layer"),
    "vit autocast": lambda directory: _vit(autocast=True),
    "vit autocast rounded": lambda directory: _vit(autocast=True, recompute="layer_narrow"),
    "vit host": lambda directory: _vit(offload="cpu", steps_per_swap=3),
    "vit ema warmup cosine": lambda directory: _vit(ema=0.4, warmup=3, decay="cosine"),
    "vit freed": lambda directory: _vit(optimizer_in_backward=True, clip=0.0),
    "dit none": lambda directory: _dit(),
    "dit attention": lambda directory: _dit(recompute="attention"),
    "dit mlp": lambda directory: _dit(recompute="mlp"),
    "dit qkv": lambda directory: _dit(recompute="qkv"),
    "dit layer": lambda directory: _dit(recompute="layer"),
    "dit autocast rounded": lambda directory: _dit(autocast=True, recompute="layer_narrow"),
    "dit disk prefetch": lambda directory: _dit(
        offload="disk", offload_dir=str(directory), prefetch=True
    ),
    "dit accumulate ema": lambda directory: _dit(accumulate=4, ema=0.4),
    "dit copies sequential": lambda directory: replace(
        _dit(order="sequential"), partition=PartitionConfig(NUM_BLOCKS, sharing="copies")
    ),
    "dit one block": lambda directory: _one_block(_dit()),
    "dit normalised augmented": lambda directory: replace(
        _dit(), weighting="normalised", label_drop=0.3, mirror=True, shift=1
    ),
}


def run(key: str, directory: Path) -> Run:
    """Train the run of a key to its end.

    Args:
        key:        of CONFIGURATIONS
        directory:  empty, for what a run puts on disk
    """
    config = CONFIGURATIONS[key](directory)
    data = open_data(config.data, "train", config.model.num_classes)
    trainer = config.trainer_on("cpu", data)
    losses = []
    while trainer.step < trainer.total_steps:
        losses.append(trainer.step_block(trainer.next_block())["loss"])
    trainer.close()
    tensors = trainer.tensors()
    average = tensors.get("ema", {})
    ema = {name: average[name] for name in tensors["model"] if name in average}
    assert len(ema) == len(average), "an average of something that is no weight"
    return Run(losses, tensors["model"], ema)


def meant(name: str, tensor: Tensor) -> Tensor:
    """Of a parameter, what means something in numbers.

    The softmax does not see a bias of the keys. Its gradient is rounding alone, which AdamW makes
    as large as any other.
    """
    if name.endswith("attention.qkv.bias"):
        query, _, value = tensor.chunk(3)
        return torch.cat([query, value])
    return tensor


def implementation_name() -> str:
    """What runs the ops on a CPU: compiled code, or plain torch."""
    return "compiled" if implementation("cpu", "adaln_norm_fwd") == "cpp" else "torch"


def plain_torch(asked: bool) -> AbstractContextManager:
    """A context in which the ops run in plain torch, where that is asked for."""
    return use_implementation("torch") if asked else nullcontext()


@contextmanager
def settled(threads: int = 1) -> Iterator[None]:
    """A context in which torch has so many threads and takes the ops that repeat their bits."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
