"""How many threads of the CPU a step is fastest with.

A small step parts into regions of microseconds, at whose end each thread waits for the others.
Beside a busy process one of them may not be running, and a step takes many times as long.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dbkernels.data.dataset import gives_batches
from dbkernels.ops.philox import Draw
from dbkernels.training.trainer import Trainer

ROUNDS = 3  # of a step that is short
LONG = 1.0  # seconds of a step that need not be repeated
GAIN = 0.9  # of the time, for which it is worth to have more threads
MOST_THREADS = 1024


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads, and the one before again at the end; 0 leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_for(trainer: Trainer) -> int:
    """With how many threads the forward and backward of a trainer's largest block are fastest.

    Nothing of the trainer moves. Where its blocks wait elsewhere than in memory, or on a GPU, or a
    stream would lose a batch, nothing is tried, and it is torch's own number.
    """
    blocks = trainer.blocks
    block = max(blocks.trained, key=lambda block: len(block.layers))
    parameters = [p for p in blocks.of(block).parameters() if p.requires_grad and not p.is_meta]
    most = torch.get_num_threads()
    elsewhere = trainer.device.type != "cpu" or trainer.config.offload != "none"
    data = trainer.samples.data
    if most == 1 or elsewhere or not parameters or not gives_batches(data):
        return most
    batch = data.batch(torch.arange(min(trainer.micro_batch.size, len(data))))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.config.autocast):
            loss = trainer.objective(blocks, block, batch, Draw(0, step=0))
        # into no parameter, where an optimizer in the backward would find it
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return fastest_threads(step)


def fastest_threads(step: Callable[[], object]) -> int:
    """Run a step with 1, 2, 4, ... threads up to torch's own number, which is set again then.

    Args:
        step:  to run a few times; the first time is not counted
    Returns:
        The least number that no larger one is well ahead of.
    """
    most = torch.get_num_threads()
    if most == 1:
        return 1
    try:
        times = {count: min(_times(step, count)) for count in _counts(most)}
    finally:
        torch.set_num_threads(most)
    best = min(times.values())
    return next(count for count, seconds in times.items() if GAIN * seconds <= best)


def _counts(most: int) -> Iterator[int]:
    yield from (2**k for k in range(most.bit_length()) if 2**k < most)
    yield most


def _times(step: Callable[[], object], count: int) -> Iterator[float]:
    torch.set_num_threads(count)
    step()
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        step()
        yield (seconds := time.perf_counter() - begin)
        if seconds > LONG:
            return
