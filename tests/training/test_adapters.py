"""Adapters trained block by block: the base travels, and the optimizer holds them alone."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from models.tiny import randomise
from training.tiny import (
    CPU,
    PREFETCH,
    assert_same,
    assert_same_steps,
    make_blocks,
    make_data,
    steps,
    weights,
)

from dbkernels.models import add_adapters
from dbkernels.models.adapter import adapters_in
from dbkernels.training.lora_config import LoraConfig
from dbkernels.training.run import load_run
from dbkernels.training.run_config import config_of, read_config, write_config
from dbkernels.training.trainer import Trainer

PLACES = [CPU, PREFETCH, {"offload": "disk", "prefetch": True}]
TARGETS = ("q", "v", "out", "fc2", "modulation")


def trainer_of(family="dit", sharing="joint", dtype=torch.float32, **settings):
    blocks = randomise(make_blocks(family, sharing=sharing)).to(dtype)
    torch.manual_seed(2)
    add_adapters(blocks, rank=2, alpha=4.0, targets=TARGETS)
    return Trainer(blocks, make_data(), steps=4, batch_size=4, lr=1e-2, ema=0.9, **settings)


def small_of(trainer):
    return {name for name, p in trainer.blocks.named_parameters() if ".adapters." in name}


@pytest.mark.parametrize("sharing", ["joint", "copies"])
@pytest.mark.parametrize("settings", PLACES, ids=str)
def test_a_base_travels_with_its_block_and_no_bit_depends_on_it(tmp_path, settings, sharing):
    where = {"offload_dir": str(tmp_path)} if settings["offload"] == "disk" else {}
    swapped = trainer_of(sharing=sharing, **settings, **where)
    whole = trainer_of(sharing=sharing)
    before = weights(whole)
    own = {id(t) for flat in swapped.offloader._blocks.values() for t in flat.tensors}
    layers = swapped.blocks.model.layers
    assert all(id(p) in own for p in layers.parameters())
    assert_same_steps(swapped, whole, [1, 0, 2, 2])
    moved = {name for name, now in weights(whole).items() if not torch.equal(now, before[name])}
    assert moved == small_of(whole) and len(moved) == 3 * 2 * len(TARGETS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_optimizer_and_the_average_hold_the_adapters_alone(dtype):
    trainer = trainer_of(dtype=dtype)
    small = [p for _, adapter in adapters_in(trainer.blocks) for p in adapter.parameters()]
    numbers = sum(p.numel() for p in small)
    found = trainer.tensors()
    assert set(found["ema"]) == small_of(trainer)
    assert sum(t.nbytes for t in found["ema"].values()) == 4 * numbers
    # two moments, and a count of steps of each tensor
    assert sum(t.nbytes for t in found["optimizer"].values()) == 4 * (2 * numbers + len(small))
    rows = steps(trainer, (0, 1, 2))
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("settings", [{}, CPU], ids=str)
def test_a_run_of_adapters_resumes_to_the_same_bits(make_config, train, settings):
    config = replace(make_config("dit", **settings), lora=LoraConfig(2, 3.0, "qkv,fc1"))
    write_config(config, Path("kept"))
    assert read_config(Path("kept")) == config
    whole = train(config, "whole", save_every=0)
    half = replace(config, trainer=replace(config.trainer, steps=2))
    train(half, save_every=2)
    assert_same(train(config, resume="latest"), whole)
    plain = replace(config, lora=LoraConfig()).build("cpu")
    base = dict(plain.named_parameters())
    _, blocks = load_run(Path("run"), averaged=False, device="cpu")
    for name, p in blocks.named_parameters():
        assert (name in base) == (".adapters." not in name)
        assert name not in base or torch.equal(p, base[name])
    assert {place.target for place, _ in adapters_in(blocks)} == {"qkv", "fc1"}
    assert {adapter.alpha for _, adapter in adapters_in(blocks)} == {3.0}
    with pytest.raises(ValueError, match=r"lora\.rank: saved 2, current 4"):
        train(replace(config, lora=LoraConfig(4, 3.0, "qkv,fc1")), resume="latest")


@pytest.mark.parametrize("family", ["dit", "mmdit"])
def test_a_base_in_bfloat16_is_rounded_and_its_adapters_are_not(family, make_config, train):
    config = replace(make_config(family), lora=LoraConfig(2, base="bfloat16"))
    exact = weights_of(replace(config, lora=LoraConfig()))
    whole = train(config, "whole", save_every=0)
    for name, p in whole.blocks.named_parameters():
        if name in exact:
            assert torch.equal(p, exact[name].bfloat16()), name
        else:
            assert p.dtype == torch.float32, name
    train(replace(config, trainer=replace(config.trainer, steps=2)), save_every=2)
    assert_same(train(config, resume="latest"), whole)


def test_a_run_from_before_there_were_adapters_has_none(make_config):
    saved = asdict(make_config("dit"))
    del saved["lora"]
    assert config_of(saved, 4, None).lora == LoraConfig()


def test_the_adapters_of_a_run_are_drawn_from_its_seed(make_config):
    config = replace(make_config("dit"), lora=LoraConfig(2))
    state, first, second = torch.get_rng_state(), weights_of(config), weights_of(config)
    assert torch.equal(state, torch.get_rng_state())
    other = weights_of(replace(config, trainer=replace(config.trainer, seed=1)))
    name = "model.layers.0.attention.qkv.adapters.q.down"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


def weights_of(config):
    return dict(config.build("cpu").named_parameters())


def test_a_base_of_8_bits_trains_where_it_is_and_nowhere_else():
    quantization = pytest.importorskip("torchao.quantization")
    blocks = randomise(make_blocks("dit"))
    quantization.quantize_(blocks.model.layers, quantization.Int8WeightOnlyConfig())
    add_adapters(blocks, rank=2)
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2}
    trainer = Trainer(blocks, make_data(), **settings)
    assert all(row["grad_norm"] > 0 for row in steps(trainer, (0, 1, 2)))
    name = "model.layers.0.attention.qkv.weight of Int8Tensor"
    with pytest.raises(ValueError, match=f"a checkpoint has no place for {name}: save the adapt"):
        trainer.tensors()
    with pytest.raises(ValueError, match=f"offload must be none with {name}, got cpu"):
        Trainer(blocks, make_data(), **settings, **CPU)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ((-1,), "lora must be at least 0, got -1"),
        ((2, -1.0), "lora_alpha must be at least 0, got -1.0"),
        ((2, 0.0, "q,w"), "target must be one of q, k, v, .*, got w"),
        ((0, 0.0, "q,k,v,out", "bfloat16"), "at least 1 where .* lora_base is given, got 0"),
        ((2, 0.0, "q", "float16"), "lora_base must be one of float32, bfloat16, got float16"),
        ((2, 0.0, ""), "target must be one of q, k, v, .*, got $"),
        ((0, 1.0), "at least 1 where lora_alpha, lora_targets or lora_base is given, got 0"),
        ((0, 0.0, "q"), "at least 1 where lora_alpha, lora_targets or lora_base is given, got 0"),
    ],
)
def test_rejects(told, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(*told)


def test_rejects_a_rank_above_a_width_before_a_file_is_written(make_config, train, tmp_path):
    config = replace(make_config("dit"), lora=LoraConfig(17))
    with pytest.raises(ValueError, match=r"rank must be at most 16, the width of q of layers\.0"):
        train(config)
    assert not (tmp_path / "run").exists()
