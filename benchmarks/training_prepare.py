"""What other processes work out while a benchmark of training weighs; never while it times.

They predict the peaks, and run one step of each kind of layer in a model that has no other: what
Triton and the compiler made for it is then on disk, and takes the benchmark no time.
"""

import atexit
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace

import torch
from rehearsal import rehearsing
from training_case import TrainingCase, Way
from training_memory import Figures, figures_of, with_all

from dbkernels.data.made_up import MadeUpData
from dbkernels.memory.allocator import target_of
from dbkernels.models.baseline import use_baseline

Task = tuple[TrainingCase, Way]

PROCESSES = 14  # at once, where there are so many cores beside those of the benchmark itself
# of activation memory, of which the one is taken whose peak is nearest to that of a fused way
BUDGETS = (0.9, 0.6, 0.5, 0.4, 0.3, 0.2)


class Preparation:
    """Predictions to come, and kernels that are being compiled.

    What fails here costs a row its prediction, or its first step the time of a compiler: no row.

    Args:
        pool:    of processes
        device:  that the steps will run on
    """

    def __init__(self, pool: ProcessPoolExecutor, device: torch.device):
        self._pool, self._device = pool, device
        self._predictions: dict[Task, Future] = {}
        self._compiling: dict[Task, Future] = {}

    def predict(self, case: TrainingCase, every: Sequence[Way]) -> None:
        """Begin to predict some ways."""
        target = target_of(self._device)
        for way in map(with_all, every):
            if (case, way) not in self._predictions:
                self._predictions[case, way] = self._submit(figures_of, case, target, way)

    def compile(self, case: TrainingCase, every: Sequence[Way]) -> None:
        """Begin to compile what the layers of some ways need."""
        for way in every:
            alone = replace(with_all(way), num_blocks=1, optimizer_in_backward=False)
            if (case, alone) not in self._compiling:
                task = self._submit(compile_alone, case, alone, self._device)
                self._compiling[case, alone] = task

    def figures(self, case: TrainingCase, way: Way) -> Figures | None:
        """What is predicted of one way; None, and the reason on stderr, where nothing could be."""
        try:
            return self._predictions[case, with_all(way)].result()[way.offload]
        except Exception as error:  # whatever it is, the way itself may well run
            print(f"{case.preset}, {way.name} was not predicted: {error!r}", file=sys.stderr)
            return None

    def nearest(self, case: TrainingCase, recompute: str) -> Way | None:
        """The compiled way whose predicted peak is nearest to that of the fused layers end to end.

        Args:
            case:       what is trained
            recompute:  of the fused layers
        Returns:
            None where the peaks could not be predicted.
        """
        fused, *every = candidates(recompute)
        self.predict(case, [fused, *every])
        goal, *peaks = (self._peak(case, way) for way in (fused, *every))
        if goal is None:
            return None
        far = {
            w: abs(peak - goal) for w, peak in zip(every, peaks, strict=True) if peak is not None
        }
        return min(far, key=far.get, default=None)

    def _peak(self, case: TrainingCase, way: Way) -> int | None:
        figures = self.figures(case, way)
        return figures and figures["peak_allocated_bytes"]

    def _submit(self, function: Callable[..., object], *arguments: object) -> Future:
        try:
            return self._pool.submit(function, *arguments)
        except BrokenExecutor as error:  # a process has died, and the pool takes nothing any more
            failed = Future()
            failed.set_exception(error)
            return failed

    def wait(self) -> None:
        """Return when no other process works; says what could not be compiled."""
        wait([*self._predictions.values(), *self._compiling.values()])
        for (_, way), task in self._compiling.items():
            if error := task.exception():
                print(f"{way.name} was not compiled beside: {error!r}", file=sys.stderr)
        self._compiling.clear()


def candidates(recompute: str) -> list[Way]:
    """The fused layers end to end, and the compiled ways of which one comes nearest to them."""
    return [
        Way("block_fused", 1, recompute),
        *(Way("compiled", budget=budget) for budget in BUDGETS),
    ]


@contextmanager
def preparing(device: torch.device, rehearse: bool) -> Iterator[Preparation]:
    """A preparation whose processes end with the context.

    Args:
        device:    that the steps will run on
        rehearse:  as `rehearsing` has it
    """
    processes = max(1, min(PROCESSES, (os.cpu_count() or 1) - 1))
    # a forked process would inherit torch's threads without their locks
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (rehearse,)) as pool:
        yield Preparation(pool, device)


def _begin(rehearse: bool) -> None:
    torch.set_num_threads(1)
    # the compiler reads it when it is first used; each would start a worker for every core
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    context = rehearsing(rehearse)
    context.__enter__()
    atexit.register(context.__exit__, None, None, None)  # which also keeps it until then


def compile_alone(case: TrainingCase, way: Way, device: torch.device) -> None:
    """Run a step of a model of one layer.

    Args:
        case, way:  of the model that has more
        device:     to run on
    """
    config = case.config(way, depth=1)
    budget = 1.0 if way.budget is None else way.budget
    models = config.build(config.home(device))
    if way.baseline is not None:
        use_baseline(models.model, way.baseline, budget=budget)
    trainer = config.trainer_of(
        models, MadeUpData(config.model.fields(), case.batch), device=device
    )
    trainer.step_block(trainer.blocks[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        del trainer
        gc.collect()  # what is in a cycle would keep its memory, which others need
        torch.cuda.empty_cache()


def predicted_peak(figures: Mapping[str, object] | None) -> dict[str, object]:
    """The columns of a measured row that say what was predicted of it.

    Args:
        figures:  predicted, or None where nothing was
    """
    names = ("peak_allocated_bytes", "peak_reserved_bytes")
    return {f"predicted_{name}": None if figures is None else figures[name] for name in names}
