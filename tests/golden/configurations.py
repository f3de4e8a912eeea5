"""The recorded runs by key: the one place of these tests that knows the package's names.

A key never changes; what it is called in the package may. A run is tiny: 20 steps, dim 32,
depth 3, the digits of 8 x 8 pixels, the settings of its key and the defaults for the rest.
"""

from collections.abc import Iterator
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
from dbkernels.training.run_config import PartitionConfig, RunConfig
from dbkernels.training.trainer_config import TrainerConfig

STEPS = 20
NUM_BLOCKS = 2  # one of two layers and one of a single layer


class Run(NamedTuple):
    """What a run left."""

    losses: list[float]  # one a step
    weights: dict[str, Tensor]  # by name, in the order of the model
    ema: dict[str, Tensor]  # of the weights, in the same order; empty without a moving average


MODELS = {
    "vit": ViTConfig(
        dim=32, depth=3, num_heads=2, mlp_hidden=64, cond_dim=16,
        image_size=8, patch=2, channels=1, num_classes=10,
    ),
    # the positions of when it was recorded, which runs of that time still have
    "dit": DiTConfig(
        dim=32, depth=3, num_heads=2, image_size=8, channels=1, num_classes=10, positions="cos_sin"
    ),
}  # fmt: skip
# key -> settings of the trainer, but for those of the model, the blocks and the run that are named
# below; clip and ema are small enough to bind in so few steps
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "vit none": {},
    "vit attention": {"recompute": "attention"},
    "vit mlp": {"recompute": "mlp"},
    "vit qkv": {"recompute": "qkv"},
    "vit layer": {"recompute": "layer"},
    "vit autocast": {"autocast": True},
    "vit autocast rounded": {"autocast": True, "recompute": "layer_narrow"},
    "vit host": {"offload": "cpu", "steps_per_swap": 3},
    "vit ema warmup cosine": {"ema": 0.4, "warmup": 3, "decay": "cosine"},
    "vit freed": {"optimizer_in_backward": True, "clip": 0.0},
    "dit none": {},
    "dit attention": {"recompute": "attention"},
    "dit mlp": {"recompute": "mlp"},
    "dit qkv": {"recompute": "qkv"},
    "dit layer": {"recompute": "layer"},
    "dit autocast rounded": {"autocast": True, "recompute": "layer_narrow"},
    "dit disk prefetch": {"offload": "disk", "prefetch": True},
    "dit accumulate ema": {"accumulate": 4, "ema": 0.4},
    "dit copies sequential": {"order": "sequential", "sharing": "copies"},
    "dit one block": {"num_blocks": 1},
    "dit normalised augmented": {
        "weighting": "normalised", "label_drop": 0.3, "mirror": True, "shift": 1
    },
}  # fmt: skip
OF_RUN = {"weighting": "process", "label_drop": 0.0, "mirror": False, "shift": 0}
OF_BLOCKS = {"num_blocks": NUM_BLOCKS, "sharing": "joint"}
# weight decay as it was when they were recorded
OF_TRAINER = {"batch_size": 8, "lr": 1e-2, "clip": 0.5, "seed": 3, "decay_on": "all"}


def configuration(key: str, directory: Path) -> RunConfig:
    """The run of a key, with a directory of its own."""
    family, own = key.split()[0], dict(CONFIGURATIONS[key])
    run, blocks = (
        {name: own.pop(name, value) for name, value in settings.items()}
        for settings in (OF_RUN, OF_BLOCKS)
    )
    if family == "vit":
        run["weighting"] = "none"
    model = replace(MODELS[family], recompute=own.pop("recompute", "none"))
    if own.get("offload") == "disk":
        own["offload_dir"] = str(directory)
    trainer = TrainerConfig(STEPS // blocks["num_blocks"], **OF_TRAINER | own)
    partition = PartitionConfig(**blocks)
    return RunConfig(
        family, model, "digits", **run, partition=partition, prior=LogNormal(), trainer=trainer
    )


def run(key: str, directory: Path) -> Run:
    """Train the run of a key to its end.

    Args:
        key:        of CONFIGURATIONS
        directory:  empty, for what a run puts on disk
    """
    config = configuration(key, directory)
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
