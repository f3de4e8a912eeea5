import pytest

from dbkernels.cli import profile_rows
from dbkernels.cli.profile_rows import METHODS, OFFLOAD, Case, cases, configured, rows
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.memory.workspace import TARGETS
from dbkernels.models import DiTConfig
from dbkernels.ops.layer.recompute import POLICIES, policies_of
from dbkernels.training.run import PartitionConfig, RunConfig
from dbkernels.training.trainer import TrainerConfig

TINY = DiTConfig(dim=16, depth=4, num_heads=2, image_size=4, channels=1, num_classes=3)
CONFIG = RunConfig(
    family="dit",
    model=TINY,
    data="none",
    weighting="none",
    label_drop=0.0,
    mirror=False,
    shift=0,
    partition=PartitionConfig(),
    prior=LogNormal(),
    trainer=TrainerConfig(steps=4, batch_size=4),
)


def found(todo, offload=OFFLOAD):
    return list(rows(todo, CONFIG, offload, budget=0.5, target=TARGETS["h100"]))


def test_end_to_end_is_one_case_and_blocks_are_one_for_each_number():
    every = cases(METHODS, [1, 2, 4], list(POLICIES))
    alone = [case for case in every if not case.method.startswith("block")]
    assert [(case.num_blocks, case.recompute) for case in alone] == [(1, None)] * 4
    stock = [case.num_blocks for case in every if case.method == "block_stock"]
    assert stock == [2, 4]  # with one block it is end to end
    fused = {(c.num_blocks, c.recompute) for c in every if c.method == "block_fused"}
    assert fused == {(count, recompute) for count in (1, 2, 4) for recompute in POLICIES}


def test_one_block_of_plain_torch_is_there_where_end_to_end_is_not():
    assert cases(["block_stock"], [1], ["none"]) == [Case("block_stock", 1, None)]


def test_a_case_decides_blocks_and_policy_and_nothing_else():
    config = configured(Case("block_fused", 2, "layer"), CONFIG)
    assert (config.partition.num_blocks, config.model.recompute) == (2, "layer")
    assert configured(Case("end_to_end", CONFIG.partition.num_blocks, None), CONFIG) == CONFIG


def test_rows_come_in_order_with_what_is_on_the_device():
    todo = [Case("end_to_end", 1, None), Case("block_fused", 2, "qkv")]
    keys = [(r["method"], r["num_blocks"], r["recompute"], r["offload"]) for r in found(todo)]
    assert keys == [(*case.__dict__.values(), name) for case in todo for name in OFFLOAD]
    assert [row["offload"] for row in found(todo, ["cpu"])] == ["cpu"] * 2


def test_less_is_kept_from_policy_to_policy_and_more_computed():
    ladder = found(
        [Case("block_fused", 2, recompute) for recompute in policies_of(mixed=False)], ["cpu"]
    )
    saved = [row["saved_bytes"] for row in ladder]
    flops = [row["flops"] for row in ladder]
    assert saved == sorted(saved, reverse=True) and len(set(saved)) == len(saved)
    assert flops == sorted(flops) and len(set(flops)) == len(flops)


def test_checkpointing_runs_every_layer_again():
    whole, checkpointed, selective = found(
        [Case(method, 1, None) for method in ("end_to_end", "checkpointed", "selective")], ["none"]
    )
    assert 1.3 < checkpointed["flops"] / whole["flops"] < 4 / 3
    assert selective["flops"] == whole["flops"]
    assert checkpointed["saved_bytes"] < whole["saved_bytes"]


def test_several_processes_find_what_one_does(monkeypatch):
    todo = [Case("block_fused", count, "none") for count in (1, 2)]
    alone = found(todo)
    monkeypatch.setattr(profile_rows, "ALONE", 1)
    monkeypatch.setattr(profile_rows.os, "cpu_count", lambda: 2)
    assert found(todo) == alone


def test_names_are_checked():
    assert profile_rows.check_recompute("none,layer") == ["none", "layer"]
    assert profile_rows.check_recompute("qkv, none,qkv") == ["qkv", "none"]
    with pytest.raises(ValueError, match=r"recompute must be of none, attention, .*, got all"):
        profile_rows.check_recompute("none,all")
