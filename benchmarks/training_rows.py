"""The rows of `benchmarks/training.py`."""

import statistics
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields

import measure
import torch
from machine import Ceilings, ceilings, faster
from training_case import TrainingCase, Way
from training_memory import Figures, predicted, weigh
from training_prepare import Preparation, predicted_peak
from training_step import Steps, make_steps, step_times

from dbkernels.memory.allocator import Target, target_of
from dbkernels.training.diffusion_blocks import SHARED
from dbkernels.training.trainer import Trainer

Row = dict[str, object]

TIMES = ("step_ms", "p20_ms", "p80_ms", "sweep_ms", "samples_per_second", "rounds", "timing")
SWAPS = 3
RATES = ("achieved_tflops", "share_of_matmul_rate")
CEILINGS = tuple(field.name for field in fields(Ceilings))


def predicted_rows(
    case: TrainingCase, every: Sequence[Way], target: Target, about: Row
) -> Iterator[Row]:
    """One row for each way, without times.

    Args:
        case:    what is trained
        every:   way
        target:  the device that is predicted
        about:   the machine
    """
    none = dict.fromkeys((*TIMES, *RATES, *CEILINGS))
    # what a GPU runs; with CUDA's own kernels the memory is the same
    runs = {"block_fused": "triton", "compiled": "inductor"}
    for way, figures in predicted(case, every, target):
        implementation = {"implementation": runs.get(way.method, "torch")}
        yield _row(case, way, figures) | none | implementation | about


def measured_rows(
    case: TrainingCase,
    every: Sequence[Way],
    device: torch.device,
    rounds: int,
    ready: Preparation | None,
    about: Row,
    *,
    early: bool,
    failed: list[str],
) -> Iterator[Row]:
    """One row for each way; those that do not fit the device are predicted for it.

    Args:
        case:    what is trained
        every:   way
        device:  to train on
        rounds:  in each of which every way has one step
        ready:   whose predictions stand beside what is measured; it rests before a step is timed
        about:   the machine
        early:   whether a row without times comes as soon as a way is weighed
        failed:  ways that raise something else than that memory is out are added, and left out
    """
    missing = []
    for together in _groups(every):
        # a function is recompiled for so many shapes only before it is left in plain torch
        torch.compiler.reset()
        steps, rows = {}, {}
        for way in together:
            prediction = ready.figures(case, way) if ready else None
            try:
                figures = _weighed(case, way, device, steps, prediction)
            except torch.OutOfMemoryError:
                missing.append(way)
            except Exception:  # whatever it is, the other ways are worth their minutes
                print(f"{case.preset}, {way.name} failed:", file=sys.stderr)
                traceback.print_exc()
                failed.append(f"{case.preset}, {way.name}")
            else:
                implementation = {"implementation": way.implementation(device)}
                rows[way] = _row(case, way, figures) | predicted_peak(prediction) | implementation
                if early:
                    yield rows[way] | dict.fromkeys((*TIMES, *RATES, *CEILINGS)) | about
        if not steps:
            continue
        if ready:
            ready.wait()
        before = ceilings(device, case.compute_dtype)
        timed = _timed(case, steps, device, rounds)
        ceiling = asdict(faster(before, ceilings(device, case.compute_dtype)))
        for way, times in timed.items():
            yield rows[way] | times | _rates(rows[way], times, ceiling) | ceiling | about
        for way in steps:
            steps[way].trainer.close()
    for way in missing:
        print(f"{way.name} does not fit the device, and is predicted", file=sys.stderr)
    if missing:
        yield from predicted_rows(case, missing, target_of(device), about)


def _weighed(
    case: TrainingCase,
    way: Way,
    device: torch.device,
    steps: dict[Way, Steps],
    prediction: Figures | None,
) -> Figures:
    """The figures of a way, whose steps join those that are there where nothing is wrong."""
    made = make_steps(case, way, device, steps)
    figures = weigh(case, way, made, [each.trainer for each in steps.values()], prediction)
    steps[way] = made
    return figures


def _groups(every: Sequence[Way]) -> list[list[Way]]:
    """Ways whose steps are interleaved.

    All that have everything on the device; apart from them, by number of blocks, those with one
    block there, as each has all the others on the host for itself.
    """
    groups: dict[int, list[Way]] = {}
    for way in every:
        groups.setdefault(0 if way.offload == "none" else way.num_blocks, []).append(way)
    return list(groups.values())


def _timed(
    case: TrainingCase, steps: dict[Way, Steps], device: torch.device, rounds: int
) -> dict[Way, Figures]:
    for way, of in steps.items():
        # each block has had its first steps when it was weighed, but for those of its graph
        for _ in range(2 if way.launch == "graph" else 0):
            of.sweep()
    # a step reads its loss, for which a captured graph cannot wait
    samples = measure.samples(steps, device=device, rounds=rounds, capture=False)
    found = {}
    for way, (milliseconds, timing) in samples.items():
        times = step_times(milliseconds, steps[way].visited[-rounds:])
        found[way] = times | {
            "samples_per_second": 1e3 * case.batch / times["step_ms"],
            "rounds": rounds,
            "timing": timing,
        }
        if way.offload == "cpu":
            found[way] |= _swap(steps[way].trainer)
    return found


def _swap(trainer: Trainer) -> Figures:
    """What it takes to bring a block to the host and another from there, by wall clock."""
    seconds = [trainer.offloader.swap_seconds() for _ in range(SWAPS)]
    sizes = [
        sum(tensor.nbytes for tensor in group.tensors())
        for name, group in trainer.groups.items()
        if name != SHARED
    ]
    return {"swap_ms": 1e3 * statistics.median(seconds), "swap_bytes": 2 * max(sizes)}


def _rates(figures: Figures, times: Figures, ceiling: Row) -> Row:
    achieved = figures["flops"] / times["step_ms"] / 1e9
    return dict(zip(RATES, (achieved, achieved / ceiling["matmul_tflops"]), strict=True))


def _row(case: TrainingCase, way: Way, figures: Figures) -> Row:
    return {"suite": "training"} | asdict(case) | asdict(way) | figures
