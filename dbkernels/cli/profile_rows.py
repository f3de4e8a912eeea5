"""The rows of `python -m dbkernels profile`: what is run, and what it is predicted to need."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from dbkernels.memory.predict import Prediction
from dbkernels.memory.workspace import Target
from dbkernels.models.baseline import Baseline
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.training.dry_run import dry_run
from dbkernels.training.run import RunConfig
from dbkernels.training.trainer_config import Offload

Method = Literal[
    "end_to_end", "checkpointed", "selective", "compiled", "block_stock", "block_fused"
]
METHODS: tuple[Method, ...] = get_args(Method)
OFFLOAD: tuple[Offload, ...] = ("none", "cpu")  # disk needs of the device what cpu does
BASELINES: dict[Method, Baseline | None] = {
    "end_to_end": "stock",
    "checkpointed": "checkpointed",
    "selective": "selective",
    "compiled": "compiled",
    "block_stock": "stock",
    "block_fused": None,
}
BLOCKWISE = ("block_stock", "block_fused")
ALONE = 150  # layers of dry runs in the time that another process takes to start


@dataclass(frozen=True)
class Case:
    """One way of training."""

    method: Method
    num_blocks: int
    recompute: Recompute | None  # of the fused layer; None for plain torch


def cases(
    methods: Sequence[Method], num_blocks: Sequence[int], policies: Sequence[Recompute]
) -> list[Case]:
    """Every case there is: end to end once, block by block for each number of blocks."""
    every = [
        Case(method, count, recompute)
        for method in methods
        for count in (num_blocks if method in BLOCKWISE else (1,))
        for recompute in (policies if method == "block_fused" else (None,))
    ]
    # one block of plain torch is end to end
    twice = Case("block_stock", 1, None) if "end_to_end" in methods else None
    return [case for case in every if case != twice]


def configured(case: Case, config: RunConfig) -> RunConfig:
    """A run's configuration with a case's number of blocks and policy."""
    model = replace(config.model, recompute=case.recompute or config.model.recompute)
    blocks = replace(config.partition, num_blocks=case.num_blocks)
    return replace(config, model=model, partition=blocks)


def run_by(case: Case, budget: float) -> dict[str, Baseline | float | None]:
    """What runs a case's layers, as `trainer_with` and `dry_run` are told."""
    baseline = BASELINES[case.method]
    return {"baseline": baseline, "budget": budget if baseline == "compiled" else 1.0}


def predicted(
    case: Case, config: RunConfig, *, budget: float, target: Target
) -> dict[Offload, Prediction]:
    """A case's prediction for everything on the device, and for one block on it."""
    ways = run_by(case, budget)
    return dry_run(configured(case, config), **ways, target=target)


def rows(
    todo: Sequence[Case],
    config: RunConfig,
    offload: Sequence[Offload],
    *,
    budget: float,
    target: Target,
) -> Iterator[dict[str, object]]:
    """One row for each case and each choice of what is on the device, in order.

    Args:
        todo:      cases
        config:    of a run; number of blocks and policy are the cases'
        offload:   none has all blocks on the device, cpu one
        budget:    of activation memory, of the compiled baseline
        target:    the device that is predicted
    """
    work = partial(_rows_of, config=config, budget=budget, target=target)
    layers = sum(config.model.depth // case.num_blocks for case in todo)
    processes = min(os.cpu_count() or 1, len(todo), layers // ALONE + 1)
    if processes == 1:
        yield from (each[name] for each in map(work, todo) for name in offload)
        return
    # a forked process would inherit torch's threads without their locks
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        yield from (each[name] for each in pool.map(work, todo) for name in offload)


def _rows_of(
    case: Case, config: RunConfig, budget: float, target: Target
) -> dict[Offload, dict[str, object]]:
    found = predicted(case, config, budget=budget, target=target)
    return {name: row(case, name, prediction) for name, prediction in found.items()}


def row(case: Case, offload: Offload, prediction: Prediction) -> dict[str, object]:
    """A case and its prediction, for JSON."""
    return {
        "method": case.method,
        "num_blocks": case.num_blocks,
        "recompute": case.recompute,
        "offload": offload,
        "peak_allocated_bytes": prediction.peak_allocated_bytes,
        "peak_reserved_bytes": prediction.peak_reserved_bytes,
        "by_category": prediction.by_category,
        "saved_bytes": prediction.saved_bytes,
        "at": prediction.at,
        "flops": prediction.flops,
    }


def check_names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """Names with commas between, each of which must be known; what is said twice counts once.

    Raises:
        ValueError: one is not.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} must be of {', '.join(known)}, got {name}")
    return names


def check_recompute(text: str) -> list[Recompute]:
    """Names of recompute policies with commas between.

    Raises:
        ValueError: one is unknown.
    """
    return check_names("recompute", text, tuple(POLICIES))
