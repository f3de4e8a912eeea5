"""What the steps of `python -m dbkernels profile` take for real, each case in a process of its own.

There, what the allocator has reserved and the driver has given is the case's alone, and a case that
ends its process leaves the others theirs.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial

import torch

from dbkernels.cli.out_of_memory import out_of_memory
from dbkernels.cli.preset_run import made_up
from dbkernels.cli.profile_rows import Case, configured, run_by
from dbkernels.training.dry_run import trainer_with
from dbkernels.training.performance import profile_trainer
from dbkernels.training.run import RunConfig
from dbkernels.training.trainer_config import Offload

Figures = dict[str, object]

KILLED = "its process was killed, as where the host has no memory left"


def measured(
    case: Case,
    offload: Offload,
    config: RunConfig,
    *,
    budget: float,
    steps: int,
    device: torch.device,
) -> Figures:
    """Run a case's steps in a process of its own.

    Args:
        case:      to run
        offload:   none has all blocks on the device, cpu one
        config:    of a run; number of blocks, policy and offload are those above
        budget:    of activation memory, of the compiled baseline
        steps:     that are timed, of every block
        device:    to train on
    Returns:
        Peaks, their parts and seconds, under the names that a row has for them; or not_measured,
        a sentence that says why there are none.
    """
    work = partial(taken, case, offload, config, budget=budget, steps=steps, device=device)
    # a forked process can use neither torch's threads nor a GPU that its parent has begun to use
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(attempted, work).result()
        except BrokenProcessPool:
            return {"not_measured": KILLED}


def attempted(work: Callable[[], Figures]) -> Figures:
    """What is found; or not_measured, where there is no memory for it.

    Args:
        work:  that finds it
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        return {"not_measured": reason}


def taken(
    case: Case,
    offload: Offload,
    config: RunConfig,
    *,
    budget: float,
    steps: int,
    device: torch.device,
) -> Figures:
    """As `measured`, in this process, where memory may run out.

    Args:
        case, offload, config, budget, steps, device:  as those of `measured`
    """
    config = configured(case, config)
    config = replace(config, trainer=replace(config.trainer, offload=offload))
    trainer = trainer_with(config, device, made_up(config), **run_by(case, budget))
    found = profile_trainer(trainer, steps)
    batch, fits = config.trainer.batch_size, trainer.micro_batch.size
    if fits < batch:
        return {"not_measured": f"of a batch of {batch} the device holds {fits} samples at once"}
    on_gpu = found["steady_step"] or {}
    return {
        "device": found["device"],
        "measured_allocated_bytes": on_gpu.get("allocated_bytes", found["peak_bytes"]),
        "measured_reserved_bytes": on_gpu.get("reserved_bytes", found["peak_bytes"]),
        "first_step": found["first_step"],
        "steady_step": found["steady_step"],
        "measured_by_category": found["by_category"],
        "measured_saved_bytes": found["saved_bytes"],
        "seconds_per_step": found["seconds_per_step"],
        "seconds_per_sweep": found["seconds_per_sweep"],
    }
