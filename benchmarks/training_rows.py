"""The rows of `benchmarks/training.py`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial

import measure
import torch
from machine import Ceilings, ceilings, faster
from training_case import TrainingCase, Way
from training_memory import Figures, predicted, weigh, weigh_alone
from training_step import Steps, make_trainer, shares, step_times

from dbkernels.memory.workspace import Target, target_of
from dbkernels.training.trainer import Trainer

Row = dict[str, object]

TIMES = ("step_ms", "p20_ms", "p80_ms", "sweep_ms", "samples_per_second", "rounds", "timing")
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
    processes: int,
    about: Row,
) -> Iterator[Row]:
    """One row for each way; those that do not fit the device are predicted for it.

    Args:
        case:       what is trained
        every:      way
        device:     to train on
        rounds:     in each of which every way has one step
        processes:  of a GPU, that weigh a way each at once
        about:      the machine
    """
    missing = []
    for together in _groups(every):
        # a function is recompiled for so many shapes only before it is left in plain torch
        torch.compiler.reset()
        weighed = _weighed_alone(case, together, device, processes)
        fits = [way for way in together if weighed.get(way, {}) is not None]
        missing += [way for way in together if way not in fits]
        if not fits:
            continue
        steps = _steps(case, fits, device)
        if device.type == "cpu":
            weighed = {way: weigh(case, way, of.trainer) for way, of in steps.items()}
        before = ceilings(device, case.compute_dtype)
        timed = _timed(case, steps, device, rounds)
        ceiling = asdict(faster(before, ceilings(device, case.compute_dtype)))
        for way, times in timed.items():
            implementation = {"implementation": way.implementation(device)}
            rates = _rates(weighed[way], times, ceiling)
            yield _row(case, way, weighed[way]) | times | rates | implementation | ceiling | about
    for way in missing:
        print(f"{way.name} does not fit the device, and is predicted", file=sys.stderr)
    if missing:
        yield from predicted_rows(case, missing, target_of(device), about)


def _weighed_alone(
    case: TrainingCase, together: Sequence[Way], device: torch.device, processes: int
) -> dict[Way, Figures | None]:
    """On a GPU, None where it does not fit; on a CPU, nothing."""
    if device.type == "cpu":
        return {}
    free_bytes = torch.cuda.mem_get_info(device)[0] if processes == 1 else None
    alone = partial(weigh_alone, case, device, free_bytes)
    found = measure.in_fresh_processes(alone, together, processes=processes)
    return dict(zip(together, found, strict=True))


def _groups(every: Sequence[Way]) -> list[list[Way]]:
    """Ways whose steps are interleaved.

    All that have everything on the device; apart from them, by number of blocks, those with one
    block there, as each has all the others on the host for itself.
    """
    groups: dict[int, list[Way]] = {}
    for way in every:
        groups.setdefault(0 if way.resident == "all" else way.num_blocks, []).append(way)
    return list(groups.values())


def _steps(case: TrainingCase, together: Sequence[Way], device: torch.device) -> dict[Way, Steps]:
    # the hooks by which a way frees its gradients are called in the steps of all who share with it
    owners: dict[str, Trainer] = {}
    found = {}
    for way in together:
        owner = owners.get(way.gradients) if shares(way) else None
        found[way] = Steps(make_trainer(case, way, device, owner=owner))
        if shares(way):
            owners.setdefault(way.gradients, found[way].trainer)
    return found


def _timed(
    case: TrainingCase, steps: dict[Way, Steps], device: torch.device, rounds: int
) -> dict[Way, Figures]:
    for way, of in steps.items():
        for _ in range(2 if way.launch == "graph" else 1):
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
    return found


def _rates(figures: Figures, times: Figures, ceiling: Row) -> Row:
    achieved = figures["flops"] / times["step_ms"] / 1e9
    return dict(zip(RATES, (achieved, achieved / ceiling["matmul_tflops"]), strict=True))


def _row(case: TrainingCase, way: Way, figures: Figures) -> Row:
    return {"suite": "training"} | asdict(case) | asdict(way) | figures
