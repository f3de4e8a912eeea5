"""Whether a run is told from its flags to be too large for a machine."""

from dataclasses import replace

import pytest
import torch

from dbkernels.memory.allocator import TARGETS
from dbkernels.models import FAMILIES
from dbkernels.planning.dry_run import predicted
from dbkernels.planning.recipe import of_preset
from dbkernels.training.lora_config import LoraConfig

CPU, H100 = TARGETS["cpu"], TARGETS["h100"]
SMALL = "--depth 3 --dim 16 --num-heads 2 --batch-size 8"


@pytest.fixture
def fits(bench):
    return bench("fits")


def test_flags_make_the_recipe_that_they_describe(fits):
    found = fits.recipe_of(
        "vit",
        "--preset published --batch-size 64 --accumulate 2 --num-blocks 2 --split 5,7 --patch 8 "
        "--autocast --ema 0.9 --offload disk --offload-dir x --recompute mlp --optimizer muon "
        "--sharing copies --lora 2 --lora-targets qkv",
        H100,
        {"image_size": 64, "num_classes": 7},
    )
    own = of_preset("vit", "published")
    model = own.model.resized({"image_size": 64, "num_classes": 7, "patch": 8})
    expected = replace(own, model=model, batch_size=64, accumulate=2, num_blocks=2, split=(5, 7))
    expected = replace(expected, autocast=True, ema=0.9, offload="cpu", recompute="mlp")
    expected = replace(expected, optimizer="muon", sharing="copies", device=H100)
    assert found == replace(expected, lora=LoraConfig(2, targets="qkv"))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_flags_a_recipe_is_that_of_the_smallest_preset_in_the_familys_blocks(fits, family):
    entry = FAMILIES[family]
    found = fits.recipe_of(family, "--batch-size 5", CPU, {})
    own = of_preset(family, entry.model.smallest)
    assert found == replace(own, num_blocks=entry.num_blocks, batch_size=5, device=CPU)


def test_what_is_trained_without_noise_is_another_network(fits):
    flags = f"--objective conventional {SMALL}"
    found = fits.recipe_of("ar", flags, CPU, {})
    assert (found.config().objective, found.num_blocks, found.method) == (
        "conventional", 1, "block_fused"
    )  # fmt: skip
    assert fits.recipe_of("ar", SMALL, CPU, {}).config().objective == "blocks"


@pytest.mark.parametrize(("target", "beside"), [(CPU, 2**29), (H100, 2**29)])
def test_a_run_needs_its_peak_and_what_no_tensor_has(fits, target, beside):
    found = fits.needed_bytes("vit", SMALL, target)
    (expected,) = predicted([fits.recipe_of("vit", SMALL, target, {})])
    assert found == expected.peak_reserved_bytes + beside
    images = {"image_size": 64, "channels": 3}
    assert fits.needed_bytes("vit", SMALL, target, of_data=images) > found


def test_free_memory_is_what_nobody_uses(fits, monkeypatch):
    found = fits.free_bytes(torch.device("cpu"))
    assert 2**20 < found < 2**46
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert fits.free_bytes(torch.device("cuda")) == 7


def test_a_run_that_does_not_fit_is_one_sentence(fits, monkeypatch):
    cpu, needed = torch.device("cpu"), fits.needed_bytes("vit", SMALL, CPU)
    monkeypatch.setattr(fits, "free_bytes", lambda device: needed)
    assert fits.require_fits("vit", SMALL, cpu) == needed
    monkeypatch.setattr(fits, "free_bytes", lambda device: needed - 1)
    message = rf"^cpu must have 51\d MiB free to train vit {SMALL}, got 51\d MiB$"
    with pytest.raises(ValueError, match=message):
        fits.require_fits("vit", SMALL, cpu)
    images = {"image_size": 16}
    with pytest.raises(ValueError, match="cpu must have"):
        fits.require_fits("vit", SMALL, cpu, of_data=images)
    with pytest.raises(ValueError, match="family must be one of"):
        fits.require_fits("cnn", SMALL, cpu)
