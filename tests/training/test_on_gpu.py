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
