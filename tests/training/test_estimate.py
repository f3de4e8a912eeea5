from dataclasses import replace

import pytest

from dbkernels.cli.preset_run import preset_run
from dbkernels.memory.workspace import target_named
from dbkernels.training.dry_run import dry_run
from dbkernels.training.estimate import Setting, estimate

H100 = target_named("h100")


def tiny(batch=8):
    config = preset_run("dit", "digits", batch=batch, autocast=False)
    return replace(config, model=replace(config.model, depth=4, dim=32, num_heads=2))


def trained(**changes):
    config = tiny()
    return replace(
        config,
        partition=replace(config.partition, num_blocks=2),
        trainer=replace(config.trainer, **changes),
    )


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_two_micro_batches_tell_of_all(pieces):
    found = estimate(Setting(2, "none", 8 // pieces), tiny(), H100)
    for offload, step in dry_run(trained(accumulate=pieces), target=H100).items():
        assert found[offload].peak_bytes == step.peak_reserved_bytes
        assert found[offload].flops == 2 * step.flops
        # what clips the gradient and updates is counted with every micro-batch
        assert 1 <= found[offload].ops / (2 * len(step.trace.ops)) < 1.1
        if pieces == 2:
            assert found[offload].by_category == step.by_category


def test_a_policy_takes_the_place_of_the_runs_own():
    everything, nothing = (
        estimate(Setting(1, recompute, 8), tiny(), H100)["none"] for recompute in ("none", "layer")
    )
    assert nothing.by_category["saved_activations"] < everything.by_category["saved_activations"]
    assert nothing.flops > everything.flops


def test_a_sweep_swaps_every_layer_in_and_out():
    found = estimate(Setting(4, "none", 8), tiny(), H100)
    model = tiny().build("cpu").model
    layers = sum(p.nbytes for p in model.layers.parameters())
    assert found["none"].swapped == 0
    # the allocator rounds each tensor up, and every parameter has a count of steps
    tensors = 4 * len(list(model.layers.parameters()))
    assert 0 <= found["cpu"].swapped - 2 * 3 * layers <= 2 * 512 * tensors


def test_end_to_end_swaps_nothing():
    found = estimate(Setting(1, "none", 8), tiny(), H100)
    assert found["none"] == found["cpu"]
