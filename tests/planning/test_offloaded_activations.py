"""What a step needs of its device where what it keeps for the backward is on the host."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from memory.steps import allocator_peak
from planning.test_dry_run import FUSED, MODELS, hollow_ops, nbytes, real_trainer

from dbkernels.memory.measure import MEASURED, measure_peak
from dbkernels.ops.layer.recompute import policies_of
from dbkernels.planning.dry_run import dry_run
from dbkernels.training.offload.activations import Copies

__all__ = ["hollow_ops"]
OFF = replace(FUSED, batch_size=32, offload_activations=True)
FUSED_ROWS = [
    *(replace(OFF, recompute=recompute) for recompute in policies_of(mixed=False)),
    replace(OFF, accumulate=2),
    replace(OFF, family="ar", model=MODELS["ar"]),
    replace(OFF, family="mmdit", model=MODELS["mmdit"]),
]
ROWS = [replace(row, autocast=autocast) for row in FUSED_ROWS for autocast in (False, True)]
# in bfloat16 a copy of plain torch has a buffer inside
ROWS.append(replace(OFF, method="block_stock", recompute=None))


class OutOfSight(Copies):
    """Copies that neither an allocator nor a dispatch mode sees."""

    def store(self, flat):
        return flat.numpy().copy(), None

    def load(self, home):
        flat = torch.empty(len(home), dtype=torch.uint8)
        flat.numpy()[:] = home
        return flat, None


def named(recipe):
    compute = "autocast" if recipe.autocast else "float32"
    return f"{recipe.family}-{recipe.method}-{recipe.recompute}-{recipe.accumulate}-{compute}"


@pytest.mark.parametrize("recipe", ROWS, ids=named)
def test_a_step_peaks_as_predicted(recipe, hollow_ops):
    expected = dry_run(recipe)["none"]
    with torch.backends.mkldnn.flags(enabled=False):
        trainer = real_trainer(recipe)
        trainer.activations.copies = OutOfSight(trainer.device)
        optimizers = [o for group in trainer.groups.values() for o in group.optimizers]
        state = [t for group in trainer.groups.values() for t in group.optimizer_tensors().values()]
        resident = nbytes([*trainer.blocks.parameters(), *trainer.blocks.buffers(), *state])
        steps = [partial(trainer.advance, block) for block in trainer.blocks]
        highest = resident + max(map(allocator_peak, steps))
        peaks = [measure_peak(s, model=trainer.blocks, optimizers=optimizers) for s in steps]
    assert abs(expected.peak_allocated_bytes - highest) <= 0.005 * highest
    worst = max(peaks, key=lambda peak: peak.total_bytes)
    assert expected.saved_bytes == worst.saved_bytes and expected.at == worst.at
    for name in MEASURED:
        assert abs(expected.by_category[name] - worst.by_category[name]) <= 256, name


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_what_is_on_the_device_does_not_grow_with_the_layers(recompute):
    few, many = (replace(OFF.model, depth=depth) for depth in (10, 14))
    recipe = replace(OFF, model=few, num_blocks=1, recompute=recompute, autocast=True)
    # the smallest of what a layer keeps, such as a policy's statistics, is large enough to move
    recipe = replace(recipe, batch_size=256)
    moved, more = (dry_run(replace(recipe, model=model))["none"] for model in (few, many))
    stays = dry_run(replace(recipe, offload_activations=False))["none"]
    units = 256 * 16 * 64 * 2  # bytes of bfloat16
    assert more.saved_bytes - moved.saved_bytes < 4 * 0.2 * units
    assert moved.saved_bytes < stays.saved_bytes / 2
    assert moved.flops == stays.flops and moved.peak_allocated_bytes < stays.peak_allocated_bytes
