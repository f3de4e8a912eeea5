import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dbkernels.data.images import batch_indices
from dbkernels.data.made_up import MadeUpData
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.memory.measure import MEASURED, measure_peak
from dbkernels.memory.workspace import TARGETS, MiB
from dbkernels.models import DiTConfig, ViTConfig
from dbkernels.ops.backend.register import registered
from dbkernels.training.dry_run import dry_run, trainer_with
from dbkernels.training.run import PartitionConfig, RunConfig
from dbkernels.training.trainer import TrainerConfig

DIT = DiTConfig(dim=64, depth=4, num_heads=4, image_size=8, channels=4, num_classes=10)
VIT = ViTConfig(8, 2, 1, 10, dim=16, depth=4, num_heads=2, mlp_hidden=32, cond_dim=8)
CPU, H100 = TARGETS["cpu"], TARGETS["h100"]


def made_up(config):
    return MadeUpData(config.model.fields(), config.trainer.batch_size)


def configured(num_blocks=2, recompute="none", model=DIT, split="", sharing="joint", **trainer):
    family = "dit" if isinstance(model, DiTConfig) else "vit"
    settings = {"steps": 4, "batch_size": 8, "sharing": sharing, **trainer}
    return RunConfig(
        family=family,
        model=replace(model, recompute=recompute),
        data="none",
        weighting="none",
        label_drop=0.0,
        mirror=False,
        shift=0,
        partition=PartitionConfig(num_blocks=num_blocks, split=split),
        prior=LogNormal(),
        trainer=TrainerConfig(**settings),
    )


def real_trainer(config, baseline=None):
    """A trainer in its steady state, on blank data: its numbers are not read."""
    trainer = trainer_with(config, "cpu", made_up(config), baseline=baseline)
    for block in trainer.blocks:
        trainer.advance(block)
    return trainer


def resident_bytes(trainer):
    state = [t for group in trainer.groups.values() for t in group.optimizer_tensors().values()]
    tensors = [*trainer.blocks.parameters(), *trainer.blocks.buffers(), *state]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def allocator_peak(step):
    """Highest growth over the start, from the CPU allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    deltas = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(deltas, initial=0))


@pytest.fixture
def hollow_ops():
    """Ops that write nothing, as a kernel allocates nothing; plain torch inside them would."""
    library = torch.library.Library("dbkernels", "IMPL")
    for name in registered():
        library.impl(name, lambda *_: None, "CPU")
    yield
    library._destroy()


ROWS = [
    ("stock", "none", 1),
    ("stock", "none", 2),
    ("checkpointed", "none", 1),
    ("selective", "none", 1),
    (None, "none", 2),
    (None, "attention", 2),
    (None, "mlp", 2),
    (None, "qkv", 2),
    (None, "layer", 2),
]


# against the CPU's allocator, which no dispatch mode feeds


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("baseline, recompute, num_blocks", ROWS)
def test_the_prediction_is_what_the_cpus_allocator_sees(
    baseline, recompute, num_blocks, autocast, hollow_ops
):
    config = configured(num_blocks, recompute, autocast=autocast)
    predicted = dry_run(config, baseline=baseline, target=CPU)["none"].peak_allocated_bytes
    # a bfloat16 matmul of oneDNN has buffers inside, which no GPU has
    with torch.backends.mkldnn.flags(enabled=False):
        trainer = real_trainer(config, baseline)
        offload = resident_bytes(trainer)
        peaks = [offload + allocator_peak(lambda b=b: trainer.advance(b)) for b in trainer.blocks]
    assert abs(predicted - max(peaks)) <= 0.005 * max(peaks)


# against the tracker on real tensors


@pytest.mark.parametrize("baseline, recompute, num_blocks", ROWS)
def test_fake_tensors_have_the_peak_of_real_ones(baseline, recompute, num_blocks):
    config = configured(num_blocks, recompute, autocast=True)
    predicted = dry_run(config, baseline=baseline, target=CPU)["none"]
    trainer = real_trainer(config, baseline)
    optimizers = [group.optimizer for group in trainer.groups.values()]
    peaks = [
        measure_peak(lambda b=b: trainer.advance(b), model=trainer.blocks, optimizers=optimizers)
        for b in trainer.blocks
    ]
    worst = max(peaks, key=lambda peak: peak.total_bytes)
    assert predicted.saved_bytes == worst.saved_bytes and predicted.at == worst.at
    for name in MEASURED:
        # a scalar or two more: fake tensors have their norms one by one
        assert abs(predicted.by_category[name] - worst.by_category[name]) <= 256, name


# what is on the device


def test_all_blocks_on_the_device_add_what_the_step_does_not_touch():
    found = dry_run(configured(4), target=CPU)
    trainer = real_trainer(configured(4))
    others = [trainer.groups[f"block{index}"] for index in (1, 2, 3)]
    weights = sum(p.nbytes for group in others for p in group.parameters.values())
    state = sum(t.nbytes for group in others for t in group.optimizer_tensors().values())
    for name, more in {"parameters": weights, "optimizer": state}.items():
        assert found["none"].by_category[name] - found["cpu"].by_category[name] == more
    more = found["none"].peak_allocated_bytes - found["cpu"].peak_allocated_bytes
    assert more == weights + state
    assert found["none"].flops == found["cpu"].flops


def test_end_to_end_everything_is_touched():
    found = dry_run(configured(1), target=CPU)
    assert found["none"] == found["cpu"]


@pytest.mark.parametrize("sharing", ["joint", "copies"])
@pytest.mark.parametrize("model", [DIT, VIT], ids=["dit", "vit"])
def test_one_block_on_the_device_has_its_layers_and_what_is_no_layer(model, sharing):
    config = configured(4, model=model, sharing=sharing)
    trainer = trainer_with(config, "cpu", made_up(config))
    network = trainer.blocks.model
    layer = sum(p.nbytes for p in network.layers[0].parameters())
    shared = sum(p.nbytes for p in network.parameters()) - 4 * layer
    buffers = sum(b.nbytes for b in network.buffers())
    found = dry_run(config, target=CPU)["cpu"].by_category["parameters"]
    assert found == layer + shared + buffers


def test_averages_of_the_weights_are_there_too():
    without, with_them = (
        dry_run(configured(2, ema=ema), target=CPU)["none"].peak_allocated_bytes
        for ema in (0.0, 0.9)
    )
    trainer = trainer_with(configured(2), "cpu", made_up(configured(2)))
    weights = sum(p.nbytes for p in trainer.blocks.parameters())
    assert weights <= with_them - without <= 1.01 * weights


@pytest.mark.parametrize("model", [DIT, VIT], ids=["dit", "vit"])
def test_copies_of_what_the_blocks_share_are_all_there(model):
    config = configured(4, model=model, sharing="copies", ema=0.9)
    predicted = dry_run(config, target=CPU)["none"].by_category
    trainer = trainer_with(config, "cpu", made_up(config))
    tensors = [*trainer.blocks.parameters(), *trainer.blocks.buffers()]
    assert predicted["parameters"] == sum(tensor.nbytes for tensor in tensors)


def test_tells_the_same_of_a_run_whose_blocks_are_offloaded():
    config = configured(2)
    offloaded = replace(config.trainer, offload="cpu")
    found = dry_run(replace(config, trainer=offloaded), target=CPU)
    assert found == dry_run(config, target=CPU)


@pytest.mark.parametrize(("split", "more"), [("2,2", 2), ("1,3", 3)])
def test_a_second_slot_has_room_for_the_largest_block(split, more):
    config = configured(2, split=split, ema=0.9)
    without = dry_run(config, target=CPU)
    ahead = replace(config.trainer, offload="cpu", prefetch=True)
    found = dry_run(replace(config, trainer=ahead), target=CPU)
    trainer = trainer_with(config, "cpu", made_up(config))
    layer = sum(p.nbytes for p in trainer.blocks.model.layers[0].parameters())
    grown = found["cpu"].peak_allocated_bytes - without["cpu"].peak_allocated_bytes
    # weights, average and both moments; the tensors of a slot are aligned
    assert 4 * more * layer <= grown <= 1.02 * 4 * more * layer
    assert found["none"] == without["none"]


# the costliest block


def test_blocks_of_equal_shapes_have_equal_peaks():
    trainer = real_trainer(configured(4))
    peaks = [
        measure_peak(lambda b=b: trainer.advance(b), model=trainer.blocks) for b in trainer.blocks
    ]
    assert len({peak.total_bytes for peak in peaks}) == 1


@pytest.mark.parametrize("split", ["1,3", "3,1", "2,1,1", "1,1,2"])
def test_the_costliest_block_counts_wherever_it_is(split):
    sizes = split.split(",")
    found = dry_run(configured(len(sizes), split=split), target=CPU)
    whole = dry_run(configured(1), target=CPU)["none"].flops
    rest = whole - dry_run(configured(4), target=CPU)["none"].flops
    # a layer's share, as many times as the longest block has layers
    assert found["none"].flops == whole - (4 - int(max(sizes))) * rest // 3


# a GPU


def test_a_gpu_has_workspaces_and_kernels_with_partial_sums():
    config = configured(2, autocast=True, batch_size=2)
    predicted = dry_run(config, target=H100)["cpu"]
    trace = predicted.trace
    names = {
        trace.name(event.op).partition("dbkernels::")[2]
        for event in trace.events
        if trace.categories[event.storage] == len(MEASURED)
    }
    assert {"gated_adaln_norm_bwd", "gelu_bwd"} <= names
    assert predicted.by_category["workspaces"] >= 2 * 33 * MiB
    assert predicted.peak_reserved_bytes >= predicted.peak_allocated_bytes


# leaving no trace


def test_leaves_no_fake_order_behind():
    config = configured(2)
    dry_run(config, target=CPU)
    indices = batch_indices(8, 8, seed=config.trainer.seed, block=0, step=0)
    assert type(indices) is torch.Tensor and sorted(indices.tolist()) == list(range(8))
    dry_run(config, target=CPU)


def test_rejects_a_budget_that_nothing_asks_for():
    with pytest.raises(ValueError, match=r"budget must be 1 for stock, got 0\.5"):
        dry_run(configured(1), baseline="stock", budget=0.5, target=CPU)


def test_reads_no_data():
    assert not Path(configured(1).data).exists()
    assert dry_run(configured(1), target=CPU)
