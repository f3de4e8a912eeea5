"""Launches of one layer on a GPU, forward and backward, on fake tensors of the case's shapes."""

from dataclasses import dataclass

import torch
from launches import Launches
from layer_case import Competitor, LayerCase, LayerStep, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.workspace import Target, target_named, target_of
from dbkernels.ops._dry_run_device import dry_run_on_gpu


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
