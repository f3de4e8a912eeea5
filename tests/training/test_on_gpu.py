"""What a CPU cannot show of residency: locked pages, streams, graphs, and memory in two places."""

from functools import partial

import pytest
import torch
from training.tiny import PRIOR, equal, make_data

from dbkernels.models import DiT, DiTConfig
from dbkernels.training.objective import gaussian_step
from dbkernels.training.partition import partition
from dbkernels.training.resting import HostRest, pin
from dbkernels.training.sharing import BlockModels
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DIT = DiTConfig(width=64, depth=3, heads=2, image_size=4, channels=1, num_classes=3)


def make_trainer(sharing="joint", **settings):
    torch.manual_seed(1)
    models = BlockModels(DiT(DIT), partition(3, 3, PRIOR), sharing)
    config = TrainerConfig(steps=6, batch_size=4, ema=0.9, sharing=sharing, **settings)
    if config.resident == "all":
        models = models.to(CUDA)
    step = partial(gaussian_step, prior=PRIOR, weighting="edm", sigma_data=0.5)
    return Trainer(models, make_data(), step, config, device=CUDA)


def on_device(tensors):
    return [tensor for tensor in tensors if tensor.is_cuda]


@pytest.mark.parametrize("sharing", ["joint", "copies"])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_gives_the_bits_of_a_run_with_all_blocks_resident(tmp_path, disk, prefetch, sharing):
    on_disk = {"rest": "disk", "rest_dir": str(tmp_path)} if disk else {}
    whole = make_trainer(sharing, visit=2)
    swapped = make_trainer(sharing, visit=2, resident="block", prefetch=prefetch, **on_disk)
    for _ in range(whole.total_steps):
        row = whole.step_block(whole.next_block())
        assert swapped.step_block(swapped.next_block()) == row
    for group, expected in whole.tensors().items():
        ours = swapped.tensors()[group]
        assert equal(
            {n: t.cpu() for n, t in ours.items()}, {n: t.cpu() for n, t in expected.items()}
        )


def test_only_what_is_shared_and_one_block_are_on_the_device():
    trainer = make_trainer(resident="block")
    for index in (1, 2):
        trainer.step_block(trainer.blocks[index])
        for name in ("block0", "block1", "block2", "shared"):
            tensors = trainer.parts[name].tensors()
            there = name in (f"block{index}", "shared")
            assert len(on_device(tensors)) == (len(tensors) if there else 0)
    trainer.close()
    assert on_device([*trainer.models.parameters(), *trainer.models.buffers()]) == []


def test_locked_pages_are_those_of_torch_and_a_refusal_disturbs_no_later_kernel():
    home = HostRest(CUDA).room(4096)
    assert home.is_pinned()
    assert not pin(home, CUDA)
    torch.testing.assert_close(torch.ones(3, device=CUDA).sum().item(), 3.0)


def test_a_captured_graph_survives_a_swap():
    trainer = make_trainer(resident="block")
    enter, part = trainer.residency.enter, trainer.parts["block0"]
    enter("block0")
    weight = next(iter(part.parameters.values())).detach()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = weight * 2
    trainer.step_block(trainer.blocks[0])
    trainer.step_block(trainer.blocks[1])
    enter("block0")
    graph.replay()
    expected = next(iter(part.parameters.values())).detach() * 2
    assert torch.equal(doubled, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradients": "freed", "clip": 0.0},
        {"accumulate": 2, "autocast": True},
        {"resident": "block", "visit": 3},
        {"resident": "block", "visit": 3, "prefetch": True},
    ],
)
def test_captured_steps_give_the_bits_of_steps_op_by_op(settings):
    plain, captured = make_trainer(**settings), make_trainer(graphs=True, **settings)
    for _ in range(plain.total_steps):
        row = plain.step_block(plain.next_block())
        assert captured.step_block(captured.next_block()) == row
    for group, expected in plain.tensors().items():
        assert equal(captured.tensors()[group], expected), group


def test_captured_steps_share_one_pool():
    trainer = make_trainer(graphs=True)
    reserved = []
    for block in trainer.blocks:
        trainer.step_block(block)
    for block in trainer.blocks:
        trainer.step_block(block)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] == reserved[1]


def test_graphs_are_captured_again_after_the_trainer_was_closed():
    plain, captured = make_trainer(resident="block"), make_trainer(resident="block", graphs=True)
    for _ in range(2):
        for index in (0, 0, 0, 1):
            row = plain.step_block(plain.blocks[index])
            assert captured.step_block(captured.blocks[index]) == row
        captured.close()
