"""How blocks are trained: everything that a user sets."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal, get_args

from dbkernels.settings import MOST, MOST_SAMPLES, MOST_SEED, check_choice, check_number
from dbkernels.training.optimizers.decay import DecayOn
from dbkernels.training.optimizers.registry import OptimizerName

Decay = Literal["constant", "cosine"]
Order = Literal["shuffled", "sequential"]
Offload = Literal["none", "cpu", "disk"]
KINDS: dict[object, type] = {int: Integral, float: Real}
LEAST = {"steps": 1, "batch_size": 1, "accumulate": 1}
LEAST |= dict.fromkeys(("warmup", "weight_decay", "clip", "steps_per_swap", "seed"), 0)
GREATEST = {"batch_size": MOST_SAMPLES, "seed": MOST_SEED}


@dataclass(frozen=True)
class TrainerConfig:
    """How blocks are trained."""

    steps: int
    """Updates of every block."""
    batch_size: int = 128
    """Samples per update."""
    optimizer: OptimizerName = "adamw"
    """adamw; muon, on the matrices of layers, with adamw on the rest; adamw8bit or adamw4bit, whose
    moments torchao keeps in so many bits."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: int = 0
    """Updates over which the rate rises, in the block's own steps."""
    decay: Decay = "constant"
    """How the rate falls after the warm-up, in the block's own steps."""
    weight_decay: float = 0.01
    """How far an update draws weights to zero, in learning rates."""
    decay_on: DecayOn = "matrices"
    """What weight decay is on: matrices leaves out norms, biases and tables."""
    clip: float = 1.0
    """Largest norm of one update's gradient; 0 for no limit."""
    ema: float = 0.0
    """Decay of the moving average of the weights, in a block's own steps; 0 for none."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into; their gradients are added up."""
    optimizer_in_backward: bool = False
    """Update each parameter as soon as the backward has its gradient, and free the gradient."""
    cuda_graphs: bool = False
    """Replay the step of each block as one CUDA graph; this needs a GPU."""
    compile_stem_and_head: bool = False
    """Compile what runs before and after the layers with torch.compile; results round otherwise."""
    autocast: bool = False
    """Compute in bfloat16; parameters stay float32."""
    order: Order = "shuffled"
    """Shuffled trains every block once in each sweep; sequential finishes one after another, the
    first layers first."""
    steps_per_swap: int = 1
    """Steps of a block in a row; 0 measures how many keep swaps below 5 % of the time."""
    offload: Offload = "none"
    """Where a block waits that is not being trained: none is on the device."""
    offload_dir: str = ""
    """Directory of the blocks' files with offload disk; they are deleted when the run ends."""
    prefetch: bool = False
    """Load the next block while this one trains; this takes memory for a second block."""
    shard: bool = False
    """Where several processes train a block, each holds a share of every parameter (FSDP2)."""
    offload_activations: bool = False
    """Keep what the backward needs in host memory until it comes to it."""
    seed: int = 0
    """Seed of all that is random in the run."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), KINDS.get(field.type)
            if kind and (isinstance(value, bool) or not isinstance(value, kind)):
                number = "whole number" if kind is Integral else "number"
                raise ValueError(f"{field.name} must be a {number}, got {value!r}")
        for name, least in LEAST.items():
            check_number(name, getattr(self, name), least, GREATEST.get(name, MOST))
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide the batch size {self.batch_size}, got {self.accumulate}"
            )
        if self.optimizer_in_backward and self.clip:
            raise ValueError(
                "clip must be 0 with optimizer_in_backward: the norm is known when parameters "
                f"have moved, got {self.clip}"
            )
        if self.optimizer_in_backward and self.accumulate > 1:
            raise ValueError(
                f"accumulate must be 1 with optimizer_in_backward, got {self.accumulate}"
            )
        choices = {"optimizer": OptimizerName, "decay": Decay, "decay_on": DecayOn}
        for name, known in (choices | {"order": Order, "offload": Offload}).items():
            check_choice(name, getattr(self, name), get_args(known))
        if self.offload_activations and self.cuda_graphs:
            raise ValueError("cuda_graphs must be False with offload_activations, got True")
        if self.offload == "none" and self.prefetch:
            raise ValueError("offload must be cpu or disk for prefetch, got none")
        if (self.offload == "disk") != bool(self.offload_dir):
            got = self.offload_dir or "none"
            raise ValueError(f"offload_dir must name a directory for offload disk alone, got {got}")
