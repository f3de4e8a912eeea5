import weakref

import pytest
import torch

from dbkernels.training.pending import MicroBatch


class Memory:
    """A gradient that needs more memory than there is for more than `fits` samples."""

    def __init__(self, fits):
        self.fits, self.sizes, self.undone, self.kept = fits, [], 0, []

    def gradient(self, size):
        self.sizes.append(size)
        assert not any(kept() is not None for kept in self.kept), "the failed attempt is alive"
        activations = torch.ones(3)
        self.kept.append(weakref.ref(activations))
        if size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(float(size))

    def undo(self):
        self.undone += 1


def attempt(micro_batch, memory):
    return micro_batch.attempt(memory.gradient, memory.undo, "block 1 at its step 3")


def test_runs_once_where_memory_is_enough():
    micro_batch, memory = MicroBatch(8, 16), Memory(fits=8)
    assert attempt(micro_batch, memory) == 8
    assert (memory.sizes, memory.undone, micro_batch.size) == ([8], 0, 8)


@pytest.mark.parametrize("size, half", [(8, 4), (5, 3), (2, 1)])
def test_halves_once_and_stays_at_the_half(size, half):
    micro_batch, memory = MicroBatch(size, 16), Memory(fits=half)
    message = (
        f"out of memory in block 1 at its step 3 with batch 16 in micro-batches of {size}: "
        f"they have {half} from now on"
    )
    with pytest.warns(UserWarning, match=message):
        assert attempt(micro_batch, memory) == half
    assert attempt(micro_batch, memory) == half
    assert (memory.sizes, memory.undone, micro_batch.size) == ([size, half, half], 1, half)


def test_a_second_failure_in_a_step_is_raised_with_its_sizes():
    micro_batch, memory = MicroBatch(8, 16), Memory(fits=2)
    message = "block 1 at its step 3 with batch 16 in micro-batches of 4, halved in this step"
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match=message):
        attempt(micro_batch, memory)
    assert (memory.sizes, memory.undone) == ([8, 4], 2)


def test_one_sample_cannot_be_halved():
    micro_batch, memory = MicroBatch(1, 16), Memory(fits=0)
    message = "with batch 16 in micro-batches of 1, which cannot be halved"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        attempt(micro_batch, memory)
    assert (memory.sizes, memory.undone) == ([1], 1)


def test_the_least_cannot_be_halved():
    micro_batch, memory = MicroBatch(8, 8, least=8), Memory(fits=4)
    with pytest.raises(torch.OutOfMemoryError, match="in micro-batches of 8, which cannot be"):
        attempt(micro_batch, memory)
    assert (micro_batch.size, memory.sizes, memory.undone) == (8, [8], 1)


def test_other_errors_pass():
    def broken(size):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        MicroBatch(8, 16).attempt(broken, lambda: None, "block 0")
