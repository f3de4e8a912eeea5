"""A step of a run on fake tensors: what it will need, before there is a machine to run it on.

A trainer is built as for a real run, under FakeTensorMode, which allocates and computes nothing,
and one step of it is followed.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.data.images import Data, forget_orders
from dbkernels.data.made_up import MadeUpData
from dbkernels.memory.measure import record
from dbkernels.memory.predict import Prediction, predict
from dbkernels.memory.trace import Trace
from dbkernels.memory.workspace import Target
from dbkernels.models.baseline import Baseline, use_baseline
from dbkernels.ops.backend.dry_run_device import dry_run_on_gpu
from dbkernels.ops.backend.scratch import scratch_bytes
from dbkernels.training.diffusion_blocks import SHARED, own_group
from dbkernels.training.offload.memory import flat_bytes
from dbkernels.training.partition import Block
from dbkernels.training.run import RunConfig
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import Offload


def dry_run(
    config: RunConfig, *, baseline: Baseline | None = None, budget: float = 1.0, target: Target
) -> dict[Offload, Prediction]:
    """Predict a step of a run's costliest block.

    Args:
        config:    of the run; its data is not opened, and offload is the answer's, not its own;
                   stem and head count as if they were not compiled
        baseline:  what runs the layers; None is the fused layer
        budget:    of the compiled baseline, as `use_baseline` has it
        target:    the device that is predicted
    Returns:
        By what is on the device: all blocks with their optimizers' state, or only what the step
        updates or reads and the rest of the slots, the other blocks being on the host.
    """
    slots = 1 + config.trainer.prefetch
    # host and device are one memory here, in which blocks off the device would count
    on_device = replace(config.trainer, offload="none", offload_dir="", prefetch=False)
    # a graph's steps need what they need op by op, but for a cut batch, which it holds as a whole
    on_device = replace(on_device, cuda_graphs=False)
    # a compiled stem or head keeps no more than op by op, and has no kernels here
    on_device = replace(on_device, compile_stem_and_head=False)
    config = replace(config, trainer=on_device)
    data = MadeUpData(config.model.fields(), config.trainer.batch_size)
    with _pretending(target):
        trainer = trainer_with(config, "cpu", data, baseline=baseline, budget=budget)
        blocks = _costliest(trainer)
        traces = [_follow(trainer, block, target) for block in blocks]
        beside = {
            "none": [_elsewhere(trainer, block) for block in blocks],
            "cpu": [_empty(trainer, block, slots) for block in blocks],
        }
    return {
        place: _worst([t.beside(more) for t, more in zip(traces, others, strict=True)], target)
        for place, others in beside.items()
    }


def trainer_with(
    config: RunConfig,
    device: torch.device | str,
    data: Data,
    *,
    baseline: Baseline | None = None,
    budget: float = 1.0,
) -> Trainer:
    """A trainer at its first step, whose layers a baseline may run.

    Args:
        config:    of the run
        device:    to train on
        data:      in place of the config's
        baseline:  None is the fused layer
        budget:    of the compiled baseline, as `use_baseline` has it
    """
    models = config.build(config.home(device))
    if baseline is not None:
        use_baseline(models.model, baseline, budget=budget)
    return config.trainer_of(models, data, device=device)


class _Mode(FakeTensorMode):
    """Copies of a model are of the mode of the model itself."""

    def __deepcopy__(self, memo: dict) -> "_Mode":
        return self


@contextmanager
def _pretending(target: Target) -> Iterator[None]:
    forget_orders()
    try:
        with _Mode(), dry_run_on_gpu(target.processors) if target.is_gpu else nullcontext():
            yield
    finally:
        forget_orders()


def _costliest(trainer: Trainer) -> list[Block]:
    """Blocks of which one needs the most: no block that runs some of another's ops, or the same."""
    shapes = [_shapes(trainer, block) for block in trainer.blocks]
    return [
        block
        for i, block in enumerate(trainer.blocks)
        if not any(shapes[i] < other or shapes[i] == other for other in shapes[:i])
        and not any(shapes[i] < other for other in shapes[i + 1 :])
    ]


def _shapes(trainer: Trainer, block: Block) -> Counter:
    """How often a step on a block reads a parameter of each shape."""
    return Counter(tuple(p.shape) for p in _on_device(trainer, block).parameters())


def _on_device(trainer: Trainer, block: Block) -> nn.Module:
    """What a step on a block reads: its layers, and what is no layer."""
    model, read = trainer.blocks.of(block), nn.Module()
    idle = (layer for i, layer in enumerate(model.layers) if i not in block.layers)
    left_out = {id(parameter) for layer in idle for parameter in layer.parameters()}
    read.own = nn.ParameterList(p for p in model.parameters() if id(p) not in left_out)
    for index, buffer in enumerate(model.buffers()):
        read.register_buffer(f"buffer{index}", buffer)
    return read


def _follow(trainer: Trainer, block: Block, target: Target) -> Trace:
    moved = trainer.moved(block)
    return record(
        partial(trainer.advance, block),
        model=_on_device(trainer, block),
        optimizers=[group.optimizer for group in moved],
        inputs=[tensor for group in moved for tensor in group.average.values()],
        device=torch.device("cpu"),
        workspace=partial(_workspace, target),
    )


def _workspace(target: Target, func: OpOverload, args: tuple, kwargs: dict) -> int:
    own = scratch_bytes(func, args) if target.is_gpu else 0
    return own or target.workspace(func, args, kwargs)


def _elsewhere(trainer: Trainer, block: Block) -> list[tuple[str, int]]:
    """Category and bytes of what a step on a block does not touch."""
    on_device = _on_device(trainer, block)
    read = {id(tensor) for tensor in (*on_device.parameters(), *on_device.buffers())}
    moved = trainer.moved(block)
    idle = [group for group in trainer.groups.values() if group not in moved]
    state = [t for group in idle for t in group.optimizer_tensors().values()]
    # copies of what the blocks share have buffers of their own
    every = [*trainer.blocks.parameters(), *trainer.blocks.buffers()]
    tensors = {
        "parameters": [tensor for tensor in every if id(tensor) not in read],
        "optimizer": state,
        "inputs": [t for group in idle for t in group.average.values()],
    }
    return [(name, t.nbytes) for name, several in tensors.items() for t in several]


def _empty(trainer: Trainer, block: Block, slots: int) -> list[tuple[str, int]]:
    """Category and bytes of the slots that a block does not fill."""
    frozen = trainer.blocks.frozen()
    sizes = {
        name: flat_bytes(t.nbytes for t in (*group.tensors(), *frozen[name]))
        for name, group in trainer.groups.items()
        if name != SHARED
    }
    own = sizes.get(own_group(block), 0)
    room = slots * max(sizes.values(), default=0)
    return [("parameters", room - own)] if room > own else []


def _worst(traces: list[Trace], target: Target) -> Prediction:
    return max(
        (predict(trace, target) for trace in traces),
        key=lambda prediction: prediction.peak_allocated_bytes,
    )
