"""Two trainers take the same steps, to the bit."""

from training.tiny import equal


def copies(trainer):
    """All that a checkpoint holds, by group."""
    return {
        group: {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        for group, tensors in trainer.tensors().items()
    }


def assert_same(trainer, other):
    """In all that a checkpoint holds."""
    ours, theirs = copies(trainer), copies(other)
    assert ours.keys() == theirs.keys()
    for group, expected in theirs.items():
        assert equal(ours[group], expected), group
    assert trainer.counters() == other.counters()


def assert_same_steps(trainer, other, order=None):
    """Of blocks in an order, or of the rest of the run; rows are equal, and so is what is left."""
    if order is None:
        count = trainer.total_steps - trainer.step
        blocks = ((trainer.next_block(), other.next_block()) for _ in range(count))
    else:
        blocks = ((trainer.blocks[index], other.blocks[index]) for index in order)
    for ours, theirs in blocks:
        assert trainer.step_block(ours) == other.step_block(theirs)
    assert_same(trainer, other)
