"""What a step of a recipe will need, before there is a machine to run it on.

A trainer is built as for a real run, under FakeTensorMode, which allocates and computes nothing,
and one step of it is followed.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.data.images import forget_orders
from dbkernels.memory.allocator import Target
from dbkernels.memory.measure import Prediction, predict, record
from dbkernels.ops.backend.register import dry_run_on_gpu, scratch_bytes
from dbkernels.planning.ranks import fake_job
from dbkernels.planning.recipe import Recipe
from dbkernels.pool import results
from dbkernels.training.diffusion_blocks import SHARED, DiffusionBlocks, own_group
from dbkernels.training.offload.activations import Copies
from dbkernels.training.offload.memory import flat_bytes
from dbkernels.training.parallel.job import Job
from dbkernels.training.partition import Block
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import Offload

ALONE = 150  # layers of dry runs in the time that another process takes to start


def predicted(recipes: Sequence[Recipe]) -> Iterator[Prediction]:
    """What a step of each recipe's costliest block needs, in order, as it is found.

    The predictions are bare: what happened op after op stays in the process that followed it.
    """
    # one dry run tells of every choice of what is on the device
    keys = [replace(recipe, offload=recipe.offloads[-1]) for recipe in recipes]
    jobs = [partial(_bare, key) for key in dict.fromkeys(keys)]
    layers = sum(key.model.depth // key.num_blocks for key in dict.fromkeys(keys))
    stream = results(jobs, most=None if layers > ALONE else 1)
    found: dict[Recipe, dict[Offload, Prediction]] = {}
    for recipe, key in zip(recipes, keys, strict=True):
        if key not in found:
            found[key] = next(stream)
        yield found[key][recipe.offload]


def row_of(recipe: Recipe, prediction: Prediction) -> dict[str, object]:
    """A recipe and its prediction, for JSON."""
    peaks = ("peak_allocated_bytes", "peak_reserved_bytes", "by_category")
    names = (*peaks, "saved_bytes", "at", "flops")
    return recipe.settings() | {name: getattr(prediction, name) for name in names}


def _bare(recipe: Recipe) -> dict[Offload, Prediction]:
    # all that happened before the peak is too large to pass on
    return {name: replace(p, trace=None, blocks=None) for name, p in dry_run(recipe).items()}


def dry_run(recipe: Recipe) -> dict[Offload, Prediction]:
    """Predict a step of a recipe's costliest block.

    Args:
        recipe:  whose stem and head count as if they were not compiled; its offload is the
                 answer's
    Returns:
        By what is on the device, for each of the recipe's offloads: all blocks with their
        optimizers' state, or only what the step updates or reads and the rest of the slots, the
        other blocks being on the host.
    """
    slots, target, offloads = 1 + recipe.prefetch, recipe.device, recipe.offloads

    def workspace(func: OpOverload, args: tuple, kwargs: dict) -> int:
        own = scratch_bytes(func, args) if target.is_gpu else 0
        return own or target.workspace(func, args, kwargs)

    found: list[tuple[Prediction, ...]] = []  # of a block, for each of the offloads
    with fake_job(recipe.data_parallel, recipe.tensor_parallel) as job, _pretending(target):
        for trainer, block in _trainers(_plain(recipe), job):
            moved, on_device = trainer.moved(block), _on_device(trainer, block)
            trace = record(
                partial(trainer.advance, block),
                model=on_device,
                optimizers=[each for group in moved for each in group.optimizers],
                inputs=[tensor for group in moved for tensor in group.average.values()],
                workspace=workspace,
            )
            beside = _elsewhere(trainer, block, on_device), _empty(trainer, block, slots)
            every = beside[: len(offloads)]
            found.append(tuple(predict(trace.beside(more), target) for more in every))
    # of blocks that peak alike, the one that computes the most
    highest = partial(max, key=attrgetter("peak_allocated_bytes", "flops"))
    return dict(zip(offloads, map(highest, zip(*found, strict=True)), strict=True))


def _trainers(recipe: Recipe, job: Job) -> Iterator[tuple[Trainer, Block]]:
    """The costliest blocks, each with a trainer."""
    if not recipe.is_apart:
        trainer = _trainer(recipe, job)
        yield from ((trainer, block) for block in _costliest(trainer.blocks))
        return
    for block in _costliest(recipe.config().build("cpu")):
        own = Job(block.index, job.data, job.tensor, job.group)
        yield _trainer(recipe, own), block


def _trainer(recipe: Recipe, job: Job) -> Trainer:
    trainer = recipe.trainer("cpu", job)
    if recipe.offload_activations:
        trainer.activations.copies = Copies(trainer.device, _off_the_device)
    return trainer


def sweep_flops(recipe: Recipe) -> int:
    """Operations of matmuls and attention in one step of every block of a recipe."""
    with _pretending(recipe.device):
        trainer = _plain(recipe).trainer("cpu")
        steps = (partial(trainer.advance, block) for block in trainer.blocks)
        return sum(record(step, model=trainer.blocks).flops for step in steps)


def _plain(recipe: Recipe) -> Recipe:
    """With what is on the device there from the start, and each op by itself.

    Host and device are one memory here, in which blocks off the device would count; a graph's steps
    need what they need op by op, but for a cut batch, which it holds as a whole; a compiled stem or
    head keeps no more than op by op, and has no kernels here.
    """
    alone = replace(recipe, offload="none", prefetch=False)
    return replace(alone, cuda_graphs=False, compile_stem_and_head=False)


def _off_the_device(nbytes: int) -> Tensor:
    """Host memory, which is counted with no device."""
    return torch.empty(nbytes, dtype=torch.uint8, device="meta")


class _Mode(FakeTensorMode):
    """Copies of a model are of the mode of the model itself."""

    def __deepcopy__(self, memo: dict) -> "_Mode":
        return self


@contextmanager
def _pretending(target: Target) -> Iterator[None]:
    forget_orders()
    as_on = dry_run_on_gpu(target.processors) if target.is_gpu else nullcontext()
    try:
        with warnings.catch_warnings(), _Mode(), as_on:
            # torch's own deepcopy asks, and does with the answer 0
            asked = "Accessing the data pointer of FakeTensor"
            warnings.filterwarnings("ignore", asked, category=UserWarning)
            yield
    finally:
        forget_orders()


def _costliest(blocks: DiffusionBlocks) -> list[Block]:
    """Blocks of which one needs the most: no block that runs some of another's ops, or the same."""
    if not blocks.model.independent:
        return list(blocks)  # each may run other layers besides its own
    # how often a step on each block reads a parameter of a layer, by shape
    layers = blocks.model.layers
    shapes = [
        Counter(tuple(p.shape) for index in block.layers for p in layers[index].parameters())
        for block in blocks
    ]
    return [
        block
        for i, block in enumerate(blocks)
        if not any(shapes[i] < other or shapes[i] == other for other in shapes[:i])
        and not any(shapes[i] < other for other in shapes[i + 1 :])
    ]


def _on_device(trainer: Trainer, block: Block) -> nn.Module:
    """What is on the device for a step on a block: its layers, and what no other has alone.

    All is there where a step may read the layers of other blocks.
    """
    model, frozen, read = trainer.blocks.of(block), trainer.blocks.frozen(), nn.Module()
    if not model.independent:
        return model
    idle = trainer.groups.keys() - {own_group(block), SHARED}
    of_others: list[Sequence[nn.Parameter]] = [
        (*trainer.groups[name].parameters.values(), *frozen[name]) for name in idle
    ]
    of_others.append(trainer.blocks.idle())
    left_out = {id(parameter) for parameters in of_others for parameter in parameters}
    read.own = nn.ParameterList(p for p in model.parameters() if id(p) not in left_out)
    for index, buffer in enumerate(model.buffers()):
        read.register_buffer(f"buffer{index}", buffer)
    return read


def _elsewhere(trainer: Trainer, block: Block, on_device: nn.Module) -> list[tuple[str, int]]:
    """Category and bytes of what a step on a block does not touch."""
    read = {id(tensor) for tensor in (*on_device.parameters(), *on_device.buffers())}
    moved = trainer.moved(block)
    # copies of what the blocks share have buffers of their own
    every = [*trainer.blocks.parameters(), *trainer.blocks.buffers()]
    # beside a block that is trained alone, there is no other
    there = [tensor for tensor in every if tensor.device.type != "meta"]
    tensors = [("parameters", tensor) for tensor in there if id(tensor) not in read]
    for group in (group for group in trainer.groups.values() if group not in moved):
        tensors += [("optimizer", tensor) for tensor in group.optimizer_tensors().values()]
        tensors += [("inputs", tensor) for tensor in group.average.values()]
    return [(name, tensor.nbytes) for name, tensor in tensors]


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
