"""A trainer that more than one thread or process comes to."""

import os
import threading

import pytest
from training.tiny import PREFETCH, assert_same, copies, make_trainer, steps

from dbkernels.training.diffusion_blocks import DiffusionBlocks

CALLS = {
    "launch": lambda trainer, other: trainer.launch(trainer.blocks[1]),
    "step_block": lambda trainer, other: trainer.step_block(trainer.blocks[1]),
    "tensors": lambda trainer, other: trainer.tensors(),
    "restore": lambda trainer, other: trainer.restore(copies(other), other.counters()),
    "close": lambda trainer, other: trainer.close(),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_thread_is_refused_while_one_is_in_a_step_and_spoils_nothing(call):
    entered, go_on = threading.Event(), threading.Event()

    def objective(*arguments):
        entered.set()
        assert go_on.wait(60)
        return DiffusionBlocks.loss(*arguments)

    trainer, whole = make_trainer(objective=objective, **PREFETCH), make_trainer()
    thread = threading.Thread(target=lambda: trainer.step_block(trainer.blocks[0]))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(ValueError, match="must be used by one thread at a time, got Main"):
        CALLS[call](trainer, whole)
    go_on.set()
    thread.join()
    steps(whole, [0])
    assert_same(trainer, whole)
    # one after another they may
    thread = threading.Thread(target=lambda: trainer.step_block(trainer.blocks[1]))
    thread.start(), thread.join()
    steps(whole, [1])
    assert_same(trainer, whole)


@pytest.mark.parametrize("call", CALLS)
def test_a_fork_of_a_process_that_copies_beside_its_steps_is_refused(call):
    trainer, other = make_trainer(**PREFETCH), make_trainer()
    steps(trainer, [0])
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            CALLS[call](trainer, other)
        except ValueError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    assert said == (
        f"prefetch must be used by the process {os.getpid()} that has its thread, "
        f"got its fork {child}"
    )
    steps(trainer, [1])
