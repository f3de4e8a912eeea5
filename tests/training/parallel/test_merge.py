"""Blocks that were trained apart make the run that one process would have made."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from training.parallel.runs import (
    RUN,
    WHOLE,
    assert_same_runs,
    open_data,
    read,
    train_apart,
    train_block,
)
from training.tiny import CPU

from dbkernels.models.start import Trained
from dbkernels.training import checkpoint
from dbkernels.training.log import RunLog
from dbkernels.training.merge import merge
from dbkernels.training.run import load_run
from dbkernels.training.run_config import StartConfig

DEEPEST = {"num_blocks": 2, "split": "2,1", "noise_order": "deepest"}
CASES = {
    "vit": ("vit", {}),
    "dit": ("dit", {"label_drop": 0.3, "accumulate": 2}),
    "mdm": ("mdm", {}),
    "ar": ("ar", {}),
    "deepest": ("vit", {"partition": DEEPEST}),
    "deepest, one after another": ("vit", {"partition": DEEPEST, "order": "sequential"}),
    "adapters": ("dit", {"lora": 2}),
    "idle layers": ("vit", {"partition": {"num_blocks": 2, "layers": "0,2"}}),
    "one block": ("vit", {"partition": {"num_blocks": 1}}),
    "turns": ("vit", {**CPU, "steps_per_swap": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_run_of_one_process_bit_for_bit_and_goes_on_like_it(make_copies, case):
    family, changes = CASES[case]
    config = make_copies(family, **changes)
    train_block(config, name="whole", threads=1)
    train_apart(config, threads=1)
    parts = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    assert merge(RUN) == checkpoint.latest(RUN / "checkpoints")
    assert_same_runs()
    # what was united stays as it was
    assert all(path.read_bytes() == before for path, before in parts.items())
    merge(RUN)
    assert_same_runs()
    if config.trainer.order == "sequential" or config.trainer.steps_per_swap > 1:
        return
    longer = replace(config, trainer=replace(config.trainer, steps=5))
    for directory in ("run", "whole"):
        train_block(longer, name=directory, resume="latest", threads=1)
    assert_same_runs()


def test_blocks_are_united_on_the_way_and_again_when_they_have_gone_on(make_copies):
    half, config = make_copies(steps=2), make_copies(steps=4)
    train_apart(half, threads=1)
    # to see what they are worth by now
    merge(RUN)
    train_apart(config, threads=1, resume="latest")
    merge(RUN)
    train_block(config, name="whole", threads=1)
    assert_same_runs()


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_layers_that_no_block_runs_are_those_of_the_network_it_started_from(make_copies):
    config = make_copies("vit", partition={"num_blocks": 2, "layers": "0,2"})
    torch.manual_seed(11)
    weights = {n: torch.randn_like(p) / 4 for n, p in config.model_of().named_parameters()}
    trained = Trained("there", "vit", config.model, weights, False)
    config = replace(config, start=StartConfig("there", trained.digest))
    for block in range(2):
        train_block(config, block, trained=trained, threads=1)
    train_block(config, name="whole", trained=trained, threads=1)
    merge(RUN)
    assert_same_runs()
    idle = read(RUN)[1]["model"]["model.layers.1.attention.qkv.weight"]
    assert torch.equal(idle, weights["layers.1.attention.qkv.weight"])


def test_the_united_run_is_worth_as_much_and_a_part_says_what_unites_it(make_copies):
    config = make_copies("vit")
    train_apart(config, threads=1)
    train_block(config, name="whole", threads=1)
    for block in range(3):
        with pytest.raises(
            ValueError,
            match=rf"block{block} must hold all blocks of a run, got "
            rf"block{block} alone: merge unites them",
        ):
            load_run(RUN / f"block{block}", device="cpu")
    merge(RUN)
    worth = []
    for directory in (RUN, WHOLE):
        loaded, blocks = load_run(directory, device="cpu")
        assert loaded == config
        worth.append([blocks.loss_at(open_data(config), level) for level in (0.01, 0.5, 50.0)])
    assert worth[0] == worth[1]


# what is refused


@pytest.fixture
def apart(make_copies):
    """A run of three blocks at step 3, and its configuration."""
    config = make_copies()
    train_apart(config, threads=1)
    return config


def without_block(number):
    return lambda config: shutil.rmtree(RUN / f"block{number}")


def another_configuration(config):
    shutil.rmtree(RUN / "block1")
    train_block(replace(config, trainer=replace(config.trainer, lr=3e-2)), 1)


def another_number_of_steps(config):
    shutil.rmtree(RUN / "block2")
    shorter = replace(config, trainer=replace(config.trainer, steps=2))
    train_block(shorter, 2)
    edit(RUN / "block2/config.json", lambda c: c["trainer"].update(steps=3))


def one_block_in_the_place_of_another(config):
    shutil.rmtree(RUN / "block2")
    shutil.copytree(RUN / "block1", RUN / "block2")


def a_block_too_many(config):
    shutil.copytree(RUN / "block2", RUN / "block3")


def damage(config):
    path = checkpoint.latest(RUN / "block1/checkpoints") / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def no_blocks(config):
    shutil.rmtree(RUN)


def another_run_in_the_directory(config):
    train_block(replace(config, mirror=True), name="run")


def a_run_that_has_gone_on(config):
    merge(RUN)
    train_block(
        replace(config, trainer=replace(config.trainer, steps=4)), name="run", resume="latest"
    )


def another_table_of_the_target(config):
    path = checkpoint.latest(RUN / "block2/checkpoints")
    tensors, state = checkpoint.load(path)
    tensors["model"]["model.label_table.weight"] += 1
    checkpoint.save(path.parent, state["counters"]["step"], tensors, state)


REFUSED = {
    "the first block": (without_block(0), "run must hold block0 of 3, got block1, block2 alone"),
    "a later block": (without_block(2), "run must hold block2 of 3, got block0, block1 alone"),
    "no blocks": (no_blocks, "run must hold block0, block1, ... as `train --block` makes them, g"),
    "a block too many": (a_block_too_many, "run must hold 3 blocks, got block3 too"),
    "another configuration": (
        another_configuration,
        "1 settings differ from checkpoint run/block1@3: trainer.lr: saved 0.03, current 0.01",
    ),
    "another number of steps": (
        another_number_of_steps, "block2@2 must be at step 3 of its block as run/block0@3, got 2"
    ),
    "another block": (one_block_in_the_place_of_another, "must hold block2 alone, got block1"),
    "damage": (damage, "run/block1@3: ema.safetensors"),
    "another run": (another_run_in_the_directory, "mirror: saved True, current False"),
    "it has gone on": (
        a_run_that_has_gone_on, "must hold no later checkpoint than that of step 9 which the"
    ),
    "another target": (
        another_table_of_the_target,
        "run/block2@3 must have the model.label_table.weight of other blocks, got another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_run_is_refused_and_no_file_is_touched(apart, case):
    change, message = REFUSED[case]
    change(apart)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as refused:
        merge(RUN)
    assert message in re.sub("/checkpoints/step-0+", "@", str(refused.value))
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


def test_a_directory_that_another_writes_into_is_refused(apart):
    log = RunLog(RUN)
    with pytest.raises(ValueError, match="run must have one writer, got another that goes on"):
        merge(RUN)
    log.close()
    merge(RUN)
    # and it is given back
    RunLog(RUN).close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "sequential"}, "order must be shuffled to merge blocks at step 3 of 4, got seq"),
        ({**CPU, "steps_per_swap": 2}, "turns of 2 steps must be merged between turns, got step 3"),
    ],
)
def test_a_step_at_which_one_process_would_not_have_stood_is_refused(
    make_copies, settings, message
):
    config = make_copies(steps=3, **settings)
    train_apart(config)
    for block in range(3):
        edit(RUN / f"block{block}/config.json", lambda c: c["trainer"].update(steps=4))
    with pytest.raises(ValueError, match=message):
        merge(RUN)


def measured(turns):
    """Give each block turns of so many steps, as if that had been found out."""
    for block, turn in enumerate(turns):
        path = checkpoint.latest(RUN / f"block{block}/checkpoints")
        tensors, state = checkpoint.load(path)
        state["counters"]["steps_per_swap"] = turn
        checkpoint.save(path.parent, state["counters"]["step"], tensors, state)
        edit(RUN / f"block{block}/config.json", lambda c: c["trainer"].update(steps=8))


def test_blocks_that_have_measured_other_turns_take_the_shortest_or_none_that_does_not_fit(
    make_copies,
):
    config = make_copies(steps=6, steps_per_swap=0, **CPU)
    train_apart(config)
    measured([6, 6, 4])
    with pytest.raises(ValueError, match="turns of 4 steps must be merged between turns, got st"):
        merge(RUN)
    longer = replace(config, trainer=replace(config.trainer, steps=8))
    # where a block was asked to end before it knew, any turn will do
    for turns, expected in (([6, 3, 6], 3), ([6, 0, 6], 1)):
        measured(turns)
        merge(RUN)
        assert read(RUN)[2]["counters"]["steps_per_swap"] == expected
        shutil.copytree(RUN, f"turns{expected}")
        trainer = train_block(longer, name=f"turns{expected}", resume="latest")
        assert trainer.counters()["groups"] == {f"block{index}": 8 for index in range(3)}


def test_logs_that_were_set_aside_and_names_in_trackers_stay_with_their_blocks(apart):
    for name in ("log-1.jsonl", "tracked_as.txt", ".log.jsonl-0a"):
        (RUN / "block0" / name).write_text("of block 0")
    (RUN / "block0/tokenizer.json").write_text("of all")
    merge(RUN)
    assert (RUN / "tokenizer.json").read_text() == "of all"
    assert {path.name for path in RUN.iterdir() if path.is_file()} == {
        "config.json", "log.jsonl", "tokenizer.json"
    }  # fmt: skip
