"""Launches of one layer on a GPU, forward and backward, on fake tensors of the case's shapes.

`python benchmarks/layer_launches.py` prints those of plain torch and of each policy, and no time.
"""

from dataclasses import dataclass

import torch
from command import parsed
from launches import Launches
from layer_case import Competitor, LayerCase, LayerStep, competitors, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.allocator import Target, target_named, target_of
from dbkernels.ops.backend.dry_run_device import dry_run_on_gpu

DTYPES = ("float32", "bfloat16", "float16", "autocast")


@dataclass(frozen=True)
class LayerLaunches:
    """None where a compiler makes the kernels."""

    launches_forward: int | None
    launches_backward: int | None


def target_for(device: torch.device) -> Target:
    """The GPU whose launches are counted: the device itself, or an H100 where it is a CPU."""
    return target_named("h100") if device.type == "cpu" else target_of(device)


def count(case: LayerCase, player: Competitor, target: Target) -> LayerLaunches:
    """Launches of one call of a layer, and of its backward.

    Args:
        case:    sizes and dtype
        player:  who runs it
        target:  a GPU, whose programs share sums or do not
    """
    if player.impl.startswith("compiled"):
        return LayerLaunches(None, None)
    with FakeTensorMode(), dry_run_on_gpu(target.processors):
        inputs = make_inputs(case, torch.device("cpu"))
        step = LayerStep(player.function(case.num_heads), inputs, case.autocast)
        with Launches() as forward:
            out = step.forward()
        with Launches() as backward:
            torch.autograd.grad(out, inputs.leaves, inputs.dout)
    return LayerLaunches(forward.total, backward.total)


@dataclass(frozen=True)
class Options:
    """Count the kernels that a GPU launches for one AdaLN layer, without a GPU."""

    B: int = 64  # samples
    T: int = 256  # tokens of a sample
    dim: int = 1152  # of the residual stream
    num_heads: int = 16
    dtype: str = "autocast"  # float32, bfloat16, float16, or autocast
    target: str = "h100"  # or a100, h200, b200

    def __post_init__(self):
        for name in ("B", "T", "dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim = {self.dim}, got {self.num_heads}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        target_named(self.target)


def main(options: Options) -> None:
    case = LayerCase(
        options.B, options.T, options.dim, options.num_heads, 4 * options.dim, options.dtype
    )
    for player in competitors(("eager", "checkpointed", "fused"), (), mixed=case.autocast):
        found = count(case, player, target_named(options.target))
        name = " ".join(filter(None, (player.impl, player.recompute)))
        print(f"{name:<16} {found.launches_forward:>3} + {found.launches_backward}")


if __name__ == "__main__":
    main(parsed(Options))
