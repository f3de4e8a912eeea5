"""Fine-tuning: whatever is frozen, a block's layers travel together and no bits move."""

import pytest
import torch
from training.tiny import CPU, PREFETCH, assert_same_steps, make_blocks, make_data, steps, weights

from dbkernels.training.diffusion_blocks import SHARED
from dbkernels.training.trainer import Trainer

PLACES = [CPU, PREFETCH, {"offload": "disk"}, {"offload": "disk", "prefetch": True}]


def trained(family, sharing, keep, tmp_path, **settings):
    """A trainer of blocks of which the parameters that `keep` names get gradients."""
    if settings.get("offload") == "disk":
        settings["offload_dir"] = str(tmp_path)
    blocks = make_blocks(family, sharing=sharing)
    for name, parameter in blocks.named_parameters():
        parameter.requires_grad_(keep(name) and parameter.requires_grad)
    return Trainer(blocks, make_data(), steps=4, batch_size=4, lr=1e-2, ema=0.9, **settings)


def at_home(offloader, name):
    """Which of a block's own tensors lie in its home."""
    flat = offloader._blocks[name]
    begin = flat.home.data_ptr()
    return {begin <= t.data_ptr() < begin + len(flat.home) for t in flat.tensors}


@pytest.mark.parametrize("place", range(len(PLACES)))
@pytest.mark.parametrize("seed", range(6))
def test_any_subset_of_parameters_trains_with_one_block_on_the_device(tmp_path, seed, place):
    random = torch.Generator().manual_seed(seed)
    share = (0.0, 0.05, 0.3, 0.9)[seed % 4]
    kept = {
        name: bool(torch.rand((), generator=random) < share)
        for name, _ in make_blocks("dit", sharing="copies").named_parameters()
    }
    # the head of every model, so that no block is without a parameter
    keep = lambda name: kept[name] or "head" in name or "final" in name  # noqa: E731
    family, sharing = "dit", ("joint", "copies")[seed % 2]
    swapped = trained(family, sharing, keep, tmp_path, **PLACES[place])
    whole = trained(family, sharing, keep, tmp_path)
    own = {id(t) for flat in swapped.offloader._blocks.values() for t in flat.tensors}
    for block in swapped.blocks:
        layers = [swapped.blocks.of(block).layers[index] for index in block.layers]
        assert all(id(p) in own for layer in layers for p in layer.parameters())
    for index in (1, 0, 2, 2, 1):
        assert_same_steps(swapped, whole, [index])
        swapped.offloader.wait()
        for other in range(3):
            found = at_home(swapped.offloader, f"block{other}")
            assert found <= {other != index}
        slots = swapped.offloader._slots
        assert len(slots) == 1 + bool(PLACES[place].get("prefetch"))
        assert len(slots[0]) == max(len(f.home) for f in swapped.offloader._blocks.values())


@pytest.mark.parametrize("settings", [{}, CPU])
def test_blocks_of_frozen_layers_train_what_they_share(tmp_path, settings):
    trainer = trained("vit", "joint", lambda name: "layers" not in name, tmp_path, **settings)
    before = weights(trainer)
    rows = steps(trainer, (0, 1, 2, 0))
    assert [row["block_step"] for row in rows] == [0, 0, 0, 1]
    moved = {name for name, now in weights(trainer).items() if not torch.equal(now, before[name])}
    assert "model.head.weight" in moved and moved <= set(trainer.groups[SHARED].parameters)
    assert trainer.counters()["groups"] == {"block0": 2, "block1": 1, "block2": 1, "shared": 4}


@pytest.mark.parametrize("settings", [{}, CPU])
def test_a_block_without_anything_to_train_is_named(tmp_path, settings):
    with pytest.raises(ValueError, match=r"^block 1 must have a parameter to train, got none"):
        trained("vit", "joint", lambda name: "layers.0." in name, tmp_path, **settings)


@pytest.mark.parametrize("settings", [{}, CPU])
def test_a_parameter_that_is_thawed_later_is_refused_at_the_next_step(tmp_path, settings):
    trainer = trained("vit", "joint", lambda name: "mlp" not in name, tmp_path, **settings)
    steps(trainer, (0, 1))
    name, parameter = next((n, p) for n, p in trainer.blocks.named_parameters() if "mlp" in n)
    parameter.requires_grad_(True)
    with pytest.raises(ValueError, match=f"^{name} must stay frozen, as it was when the trainer"):
        steps(trainer, [0])
    parameter.requires_grad_(False)
    steps(trainer, [0])


@pytest.mark.parametrize("keep", [False, True])
def test_a_layer_that_no_block_runs_stays_on_the_host(keep):
    blocks = make_blocks("vit", layers=(2, 0, 0))
    for parameter in blocks.model.layers[0].parameters():
        parameter.requires_grad_(keep)
    trainer = Trainer(blocks, make_data(), steps=4, batch_size=4, **CPU)
    names = {id(parameter): name for name, parameter in blocks.named_parameters()}
    assert {names[id(p)].split(".")[2] for p in blocks.idle()} == {"1"}
    # another dtype can be seen here, which another device cannot
    trainer.offloader._move_common(torch.float64)
    moved = {names[id(p)] for p in blocks.parameters() if p.dtype == torch.float64}
    # layer 0 is run by two blocks and lies with what is shared, frozen or not
    assert {name.split(".")[2] for name in moved if "layers" in name} == {"0"}
    assert "model.head.weight" in moved
