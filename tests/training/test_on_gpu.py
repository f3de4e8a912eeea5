"""What a CPU cannot show of training: locked pages, streams, memory in two places."""

import pytest
import torch
from captured import capture
from training.bits import assert_same, assert_same_steps, copies
from training.on_gpu import ASIDE, IN_BACKWARD, make_trainer
from training.tiny import equal

from dbkernels.training.offload.memory import CpuMemory, pin

pytestmark = pytest.mark.gpu


def on_device(tensors):
    return [tensor for tensor in tensors if tensor.is_cuda]


@pytest.mark.parametrize("sharing", ["joint", "copies"])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_gives_the_bits_of_a_run_without_offload(gpu, tmp_path, disk, prefetch, sharing):
    where = {"offload": "disk", "offload_dir": str(tmp_path)} if disk else {"offload": "cpu"}
    whole = make_trainer(gpu, sharing=sharing, steps_per_swap=2)
    swapped = make_trainer(gpu, sharing=sharing, steps_per_swap=2, prefetch=prefetch, **where)
    assert_same_steps(swapped, whole)


@pytest.mark.needs_gpu("memory in two places")
def test_only_what_is_shared_and_one_block_are_on_the_device(gpu):
    trainer = make_trainer(gpu, offload="cpu")
    for index in (1, 2):
        trainer.step_block(trainer.blocks[index])
        for name in ("block0", "block1", "block2", "shared"):
            tensors = trainer.groups[name].tensors()
            there = name in (f"block{index}", "shared")
            assert len(on_device(tensors)) == (len(tensors) if there else 0)
    trainer.close()
    assert on_device([*trainer.blocks.parameters(), *trainer.blocks.buffers()]) == []


@pytest.mark.needs_gpu("pages that CUDA locks")
def test_locked_pages_are_those_of_torch_and_a_refusal_disturbs_no_later_kernel(gpu):
    # which unlocks its buffers when it is gone
    memory = CpuMemory(gpu)
    home, other = memory.room(700), memory.room(700)
    assert home.is_pinned() and other.is_pinned()
    assert not pin(home, gpu)
    assert torch.ones(3, device=gpu).sum().item() == 3.0
    address = home.data_ptr()
    del memory
    assert not home.is_pinned() and home.data_ptr() == address


def test_a_captured_graph_survives_a_swap(gpu):
    trainer = make_trainer(gpu, offload="cpu")
    enter, group = trainer.offloader.enter, trainer.groups["block0"]
    enter("block0")
    weight = next(iter(group.parameters.values())).detach()
    replay, (doubled,) = capture(lambda: (weight * 2,), gpu)
    trainer.step_block(trainer.blocks[0])
    trainer.step_block(trainer.blocks[1])
    enter("block0")
    replay()
    expected = next(iter(group.parameters.values())).detach() * 2
    assert torch.equal(doubled, expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2, "autocast": True}, IN_BACKWARD, ASIDE, {**ASIDE, "prefetch": True}],
    ids=str,
)
@pytest.mark.parametrize("family", ["dit", "vit"])
def test_rows_that_are_read_late_are_those_that_are_read_at_once(gpu, family, settings):
    late, early = (make_trainer(gpu, family, **settings) for _ in range(2))
    pending = [late.launch(late.next_block()) for _ in range(9)]
    rows = [early.step_block(early.next_block()) for _ in range(9)]
    assert [each.row() for each in pending] == rows
    assert_same(late, early)


@pytest.mark.parametrize("settings", [{}, IN_BACKWARD], ids=["after", "in backward"])
def test_a_step_that_was_not_finite_stops_those_launched_after_it(gpu, settings):
    trainer = make_trainer(gpu, **settings)
    trainer.step_block(trainer.blocks[0])
    before = copies(trainer)
    inner = trainer.objective
    trainer.objective = lambda *arguments: inner(*arguments) * torch.inf
    broken = trainer.launch(trainer.blocks[1])
    trainer.objective = inner
    for block in trainer.blocks:
        trainer.launch(block)
    with pytest.raises(FloatingPointError, match=r"in block 1 at its step 0 .*nothing was updated"):
        broken.row()
    after = copies(trainer)
    assert all(equal(after[group], before[group]) for group in before) and trainer.step == 1
