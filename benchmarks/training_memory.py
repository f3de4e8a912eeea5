"""What a training step needs: measured on the device that runs it, or predicted for another.

Other processes predict, and compile, while a benchmark weighs; never while it times.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import measure
import torch
from rehearsal import rehearsing
from show import Row
from torch import Tensor
from training_step import Steps, make_trainer, named

from dbkernels.memory.measure import Prediction, record
from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.recipe import Recipe
from dbkernels.pool import processes
from dbkernels.training.trainer import Trainer

BLOCK = 512  # bytes; the caching allocator gives multiples of it
NOT_SEEN = "compiled"  # by the tracker: the method whose ops it does not meet
PROCESSES = 14  # at once, where there are so many cores beside those of the benchmark itself
# of activation memory, of which the one is chosen whose peak is nearest to that of a fused way
BUDGETS = (0.9, 0.6, 0.5, 0.4, 0.3, 0.2)


# measured


def weigh(
    recipe: Recipe, steps: Steps, others: Sequence[Trainer] = (), prediction: Row | None = None
) -> Row:
    """Bytes and operations of a step of the costliest block, which has the most layers.

    It runs in the process that also times it. On a GPU the allocator begins empty but for what
    stays, and what other trainers have there of their own is left out of the peaks.

    Args:
        recipe:      of the steps
        steps:       whose trainer moves on by a few
        others:      trainers that are there too
        prediction:  of the same step, where it is known already
    Raises:
        torch.OutOfMemoryError: the device does not hold the batch at once.
    """
    trainer = steps.trainer
    device, block = trainer.device, max(trainer.blocks, key=lambda block: len(block.layers))
    on_gpu, graphs, reserved = device.type == "cuda", trainer.cuda_graphs, None
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
    step = partial(steps.step, block)
    steps.sweep()
    if graphs is not None:
        steps.sweep()
        reserved = torch.cuda.memory_reserved(device)
        graphs.drop()
    # a replay allocates nothing: all but the reserved bytes are told by the same steps without
    with mock.patch.object(trainer, "cuda_graphs", None):
        found = measure.memory(step, inputs=_on_device(trainer), device=device)
        beside = _beside(trainer, others)
        if on_gpu and graphs is None:
            reserved = torch.cuda.max_memory_reserved(device)
        figures = {
            "peak_allocated_bytes": sum(found.values()) - beside,
            "peak_reserved_bytes": None if reserved is None else reserved - beside,
            "saved_bytes": _saved_bytes(trainer, step),
            "memory": "measured",
            "weighed": "in the process that times it",
            "beside_bytes": beside,
        }
        if trainer.micro_batch.size < recipe.batch_size:
            raise torch.OutOfMemoryError(f"a batch of {recipe.batch_size} does not fit")
        if recipe.method == NOT_SEEN:
            flops = (prediction or predicted(recipe)["none"])["flops"]
            return figures | {"by_category": None, "flops": flops}
        return figures | _told_apart(steps, figures["peak_allocated_bytes"])


def _beside(trainer: Trainer, others: Sequence[Trainer]) -> int:
    """Bytes on a GPU that other trainers have there of their own, and a step does not need."""
    if trainer.device.type == "cpu":
        return 0
    own = measure.storage_bytes(_on_device(trainer))
    theirs = [t for each in others for t in _on_device(each) if t.device == trainer.device]
    found = measure.storage_bytes(theirs)
    return sum(-(-size // BLOCK) * BLOCK for key, size in found.items() if key not in own)


def _on_device(trainer: Trainer) -> list[Tensor]:
    state = [t for group in trainer.groups.values() for t in group.optimizer_tensors().values()]
    return [*trainer.blocks.parameters(), *trainer.blocks.buffers(), *state]


def _saved_bytes(trainer: Trainer, step: measure.Call) -> int:
    """What is there when the forward of a step ends, and was not when it began."""
    objective, kept = trainer.objective, []

    def weighed(*arguments) -> Tensor:
        with measure.growth(trainer.device) as found:
            loss = objective(*arguments)
        kept.append(found["left_bytes"])
        return loss

    with mock.patch.object(trainer, "objective", weighed):
        step()
    return sum(kept)


def _told_apart(steps: Steps, peak_bytes: int) -> Row:
    """The peak by category, and the operations of a step, averaged over the blocks."""
    trainer, traces = steps.trainer, {}
    optimizers = [each for group in trainer.groups.values() for each in group.optimizers]
    about = {"model": trainer.blocks, "optimizers": optimizers, "device": trainer.device}
    for block in trainer.blocks:
        if len(block.layers) not in traces:
            traces[len(block.layers)] = record(partial(steps.step, block), **about)
    flops = sum(traces[len(block.layers)].flops for block in trainer.blocks)
    peak = traces[max(traces)].peak()
    # what is left was allocated within ops, where the tracker does not look
    unseen = {"workspaces": max(peak_bytes - peak.total_bytes, 0)}
    return {"by_category": peak.by_category | unseen, "flops": flops // len(trainer.blocks)}


# predicted


def predicted(recipe: Recipe) -> dict[str, Row]:
    """Figures of a step by what is on the device: all blocks, or one."""
    return {place: figures_of(recipe, each) for place, each in dry_run(recipe).items()}


def figures_of(recipe: Recipe, prediction: Prediction) -> Row:
    """What a row says of a prediction."""
    # what a selective checkpoint keeps is in no hook's sight
    saved = None if recipe.method == "selective" else prediction.saved_bytes
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "by_category", "flops")
    about = {"memory": "predicted", "weighed": None, "beside_bytes": None}
    return {name: getattr(prediction, name) for name in names} | {"saved_bytes": saved} | about


# by other processes


class Preparation:
    """Predictions to come, and kernels that are being compiled.

    What fails here costs a row its prediction, or its first step the time of a compiler: no row.

    Args:
        pool:      of processes
        device:    that the steps will run on
        rehearse:  as `rehearsing` has it
    """

    def __init__(self, pool: Executor, device: torch.device, rehearse: bool = False):
        self._pool, self._device, self._rehearse = pool, device, rehearse
        self._tasks: dict[tuple[Callable[..., object], Recipe], Future] = {}

    def predict(self, every: Sequence[Recipe]) -> None:
        """Begin to predict some ways."""
        for recipe in map(with_all, every):
            self._begin(predicted, recipe)

    def compile(self, every: Sequence[Recipe]) -> None:
        """Begin to compile what the layers of some ways need."""
        for recipe in map(with_all, every):
            # a model of one layer has every kernel that one of many has
            model = replace(recipe.model, depth=1)
            alone = replace(recipe, model=model, num_blocks=1, optimizer_in_backward=False)
            self._begin(compile_alone, alone, self._device)

    def _begin(self, function: Callable[..., object], recipe: Recipe, *more: object) -> None:
        if (function, recipe) in self._tasks:
            return
        try:
            task = self._pool.submit(alone_in_a_process, self._rehearse, function, recipe, *more)
        except BrokenExecutor as error:  # a process has died, and the pool runs nothing any more
            task = Future()
            task.set_exception(error)
        self._tasks[function, recipe] = task

    def figures(self, recipe: Recipe) -> Row | None:
        """What is predicted of one way; None, and the reason on stderr, where nothing could be."""
        try:
            return self._tasks[predicted, with_all(recipe)].result()[recipe.offload]
        except Exception as error:  # whatever it is, the way itself may well run
            print(f"{named(recipe)} was not predicted: {error!r}", file=sys.stderr)
            return None

    def nearest(self, model: Recipe, recompute: str) -> Recipe | None:
        """The compiled way whose predicted peak is nearest to that of the fused layers end to end.

        Args:
            model:      that is trained
            recompute:  of the fused layers
        Returns:
            None where the peaks could not be predicted.
        """
        fused, *every = candidates(model, recompute)
        self.predict([fused, *every])
        found = {recipe: self.figures(recipe) for recipe in (fused, *every)}
        peaks = {recipe: of["peak_allocated_bytes"] for recipe, of in found.items() if of}
        goal = peaks.pop(fused, None)
        if goal is None:
            return None
        return min(peaks, key=lambda recipe: abs(peaks[recipe] - goal), default=None)

    def wait(self) -> None:
        """Return when no other process works; says what could not be compiled."""
        wait(self._tasks.values())
        for function, recipe in [key for key in self._tasks if key[0] is compile_alone]:
            if error := self._tasks.pop((function, recipe)).exception():
                print(f"{named(recipe)} was not compiled beside: {error!r}", file=sys.stderr)


def with_all(recipe: Recipe) -> Recipe:
    """The way of which a dry run tells both what all blocks need and what one needs."""
    return replace(recipe, offload="none", cuda_graphs=False)


def candidates(model: Recipe, recompute: str) -> list[Recipe]:
    """The fused layers end to end, and the compiled ways of which one comes nearest to them."""
    fused = replace(model, method="block_fused", num_blocks=1, recompute=recompute)
    plain = replace(fused, method="compiled", recompute=None)
    return [fused, *(replace(plain, budget=budget) for budget in BUDGETS)]


@contextmanager
def preparing(device: torch.device, rehearse: bool) -> Iterator[Preparation]:
    """A preparation whose processes end with the context.

    Args:
        device:    that the steps will run on
        rehearse:  as `rehearsing` has it
    """
    with processes(max(1, min(PROCESSES, (os.cpu_count() or 1) - 1))) as pool:
        yield Preparation(pool, device, rehearse)


def alone_in_a_process(
    rehearse: bool, function: Callable[..., object], *arguments: object
) -> object:
    """Call a function in one thread, and its compiler's."""
    torch.set_num_threads(1)
    # the compiler reads it when it is first used; each would start a worker for every core
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with rehearsing(rehearse):
        return function(*arguments)


def compile_alone(recipe: Recipe, device: torch.device) -> None:
    """Run a step."""
    trainer = make_trainer(recipe, device)
    trainer.step_block(trainer.blocks[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        del trainer
        gc.collect()  # what is in a cycle would keep its memory, which others need
        torch.cuda.empty_cache()
