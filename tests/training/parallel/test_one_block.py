"""A process that trains one block alone: the bits of one that trains all, and no other's memory."""

import pytest
import torch
from training.parallel.runs import open_data
from training.tiny import CPU

from dbkernels.training.diffusion_blocks import own_group
from dbkernels.training.offload.offloader import device_of
from dbkernels.training.parallel.job import Axis, Job

DEEPEST = {"num_blocks": 2, "split": "2,1", "noise_order": "deepest"}


def trained(config, block=None):
    """A trainer at its end, and the rows of its blocks by (block, step of the block)."""
    trainer, rows = config.trainer_on("cpu", open_data(config), job=Job(block)), []
    trainer.run(rows.append)
    return trainer, {(row["block"], row["block_step"]): row for row in rows}


def without_step(row):
    return {name: value for name, value in row.items() if name != "step"}


CASES = {
    "vit": ("vit", {}),
    "dit": ("dit", {"label_drop": 0.3, "mirror": True}),
    "mmdit": ("mmdit", {}),
    "mdm": ("mdm", {}),
    "ar": ("ar", {}),
    "deepest": ("vit", {"partition": DEEPEST}),
    "adapters": ("dit", {"lora": 2}),
    "offloaded": ("vit", CPU),
    "offloaded turns": ("mdm", {**CPU, "steps_per_swap": 2}),
    "accumulated": ("dit", {"accumulate": 2, "clip": 0.1}),
    "sequential": ("vit", {"order": "sequential"}),
    "recomputed": ("dit", {"model": {"recompute": "layer"}}),
    "muon": ("vit", {"optimizer": "muon", "weight_decay": 0.1}),
    "idle": ("vit", {"partition": {"num_blocks": 2, "layers": "0,2"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_block_alone_has_the_bits_of_the_run_of_all(make_copies, case):
    family, changes = CASES[case]
    config = make_copies(family, **changes)
    together, rows = trained(config)
    expected, left = together.tensors(), set(rows)
    for block in together.blocks:
        alone, own_rows = trained(config, block.index)
        assert alone.step == config.trainer.steps
        for group, named in alone.tensors().items():
            assert named
            for name, tensor in named.items():
                assert torch.equal(tensor, expected[group][name]), (group, name)
        own = together.groups[own_group(block)]
        assert alone.tensors()["optimizer"].keys() == own.optimizer_tensors().keys()
        assert alone.tensors()["ema"].keys() == own.average.keys()
        for key, row in own_rows.items():
            assert key[0] == block.index and row["step"] == row["block_step"]
            assert without_step(row) == without_step(rows[key])
            left.remove(key)
        alone.close()
    assert not left


@pytest.mark.parametrize("family", ["vit", "dit", "mmdit", "mdm", "ar"])
def test_what_other_blocks_own_is_in_no_memory(make_copies, family):
    config = make_copies(family)
    whole = config.build("cpu")
    for block in whole:
        own = {name for name in whole.groups()[own_group(block)]}
        common = {
            f"model.{part}.{name}"
            for part in whole.model.target_parts
            for name, _ in getattr(whole.model, part).named_parameters()
        }
        alone = config.build("cpu", only=block.index)
        there = {name for name, p in alone.named_parameters() if not p.is_meta}
        assert there == own | common
        assert [n for n, _ in alone.named_parameters()] == [n for n, _ in whole.named_parameters()]
        assert alone.groups().keys() == {own_group(block)}
        assert len(alone) == 3 and alone.trained == [block]


def test_what_a_trainer_of_one_block_holds_is_of_that_block(make_copies):
    config = make_copies("vit")
    alone = config.trainer_on("cpu", open_data(config), job=Job(1))
    assert alone.total_steps == 3 and alone.groups.keys() == {"block1"}
    assert alone.counters()["groups"] == {"block1": 0}
    names = alone.tensors()["optimizer"]
    assert names and not any(
        "copies.1." in name or name.startswith("model.")
        for name in names
        if ".layers.1." not in name
    )


def test_a_run_of_one_block_is_block_0_alone(make_copies):
    config = make_copies("vit", partition={"num_blocks": 1})
    whole, rows = trained(config)
    alone, own_rows = trained(config, 0)
    assert rows == own_rows
    for group, named in whole.tensors().items():
        assert all(torch.equal(named[name], t) for name, t in alone.tensors()[group].items())
        assert named.keys() == alone.tensors()[group].keys()


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        (3, {}, "block must be at most 2, got 3"),
        (-1, {}, "block must be at least 0, got -1"),
        (
            1,
            {"partition": {"sharing": "joint"}},
            "sharing must be copies for a block that is trained alone, got j",
        ),
    ],
)
def test_what_cannot_be_a_block_of_its_own_is_refused(make_copies, block, changes, message):
    config = make_copies(**changes)
    with pytest.raises(ValueError, match=message):
        config.trainer_on("cpu", open_data(config), job=Job(block))


def test_blocks_that_read_layers_of_others_are_not_trained_apart(make_copies):
    through = make_copies("ar", model={"clean": "through"})
    with pytest.raises(ValueError, match="sharing must be joint where a block's steps read layers"):
        through.trainer_on("cpu", open_data(through), job=Job(1))


@pytest.mark.parametrize(
    ("data", "shard", "home"), [(2, True, "cpu"), (2, False, "cuda"), (1, True, "cuda")]
)
def test_what_is_shared_out_is_built_on_the_host_and_goes_to_the_device_layer_by_layer(
    make_copies, data, shard, home
):
    config, others = make_copies("vit", shard=shard), None if data == 1 else object()
    job = Job(1, data=Axis(0, data, others))
    assert config.home("cuda", job) == home
    blocks = config.build("cpu", only=1)
    told = {"shared_out": job.shares_out(shard)}
    if home == "cpu":
        assert device_of(blocks, config.trainer, "meta", **told) == torch.device("meta")
        return
    with pytest.raises(ValueError, match="blocks must be on meta where offload is none, got cpu"):
        device_of(blocks, config.trainer, "meta", **told)
