import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training.tiny import DIT, PRIOR, VIT, equal, weights

import dbkernels.training.run as run_module
from dbkernels.data.images import open_data
from dbkernels.models import ViT
from dbkernels.training import checkpoint
from dbkernels.training.log import read_log
from dbkernels.training.run import (
    PartitionConfig,
    RunConfig,
    load_run,
    read_config,
    train,
)
from dbkernels.training.trainer_config import TrainerConfig


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.npy"
    random = np.random.default_rng(0)
    images = random.standard_normal((12, 1, 4, 4)).astype(np.float32)
    np.save(path, images)
    np.save(tmp_path / "data_labels.npy", np.arange(12) % 3)
    return str(path)


def make_config(source, family="vit", **changes):
    trainer = TrainerConfig(steps=4, batch_size=4, lr=1e-2, ema=0.9)
    fields = {
        "family": family,
        "model": VIT if family == "vit" else DIT,
        "data": source,
        "weighting": "none" if family == "vit" else "edm",
        "label_drop": 0.0,
        "mirror": False,
        "shift": 0,
        "partition": PartitionConfig(num_blocks=3),
        "prior": PRIOR,
        "trainer": trainer,
    }
    return RunConfig(**{**fields, **changes})


class Interrupted(Exception):
    pass


def stop_at(step):
    def on_step(row):
        if row["step"] == step:
            raise Interrupted

    return on_step


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_config_comes_back_as_it_was_written(tmp_path, source, family):
    config = make_config(source, family)
    train(config, tmp_path / "run", device="cpu")
    assert read_config(tmp_path / "run") == config


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, source, stop):
    config = make_config(source, "dit", label_drop=0.3, mirror=True, shift=1)
    whole = train(config, tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", device="cpu", save_every=2, on_step=stop_at(stop))
    resumed = train(config, tmp_path / "cut", device="cpu", save_every=2, resume="latest")
    for group, expected in whole.tensors().items():
        assert equal(resumed.tensors()[group], expected), group
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    saved = [
        checkpoint.load(checkpoint.latest(tmp_path / n / "checkpoints")) for n in ("whole", "cut")
    ]
    for group in saved[0][0]:
        assert equal(saved[0][0][group], saved[1][0][group])


def swapping(tmp_path, **changes):
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, "ema": 0.9, "steps_per_swap": 3, **changes}
    on_disk = {"offload": "disk", "offload_dir": str(tmp_path / "off"), "prefetch": True}
    return [
        TrainerConfig(**settings),
        TrainerConfig(**settings, offload="cpu"),
        TrainerConfig(**settings, **on_disk),
    ]


@pytest.mark.parametrize("stop", [4, 7])
def test_a_run_resumes_in_a_turn_to_the_same_bits_wherever_its_blocks_are(tmp_path, source, stop):
    everywhere, *others = swapping(tmp_path)
    whole = train(make_config(source, trainer=everywhere), tmp_path / "whole", device="cpu")
    config = make_config(source, trainer=others[0])
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", device="cpu", save_every=2, on_step=stop_at(stop))
    config = make_config(source, trainer=others[1])
    resumed = train(config, tmp_path / "cut", device="cpu", save_every=2, resume="latest")
    for group, expected in whole.tensors().items():
        assert equal(resumed.tensors()[group], expected), group
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    for checkpoints in (tmp_path / "cut" / "checkpoints").iterdir():
        load_run(tmp_path / "cut", which=str(checkpoints), device="cpu")


def test_a_run_with_offload_ends_with_all_on_the_host_and_can_be_used(tmp_path, source):
    config = make_config(source, trainer=swapping(tmp_path)[2])
    trainer = train(config, tmp_path / "run", device="cpu")
    assert trainer.offloader._slots == []
    _, loaded = load_run(tmp_path / "run", averaged=False, device="cpu")
    assert equal(dict(loaded.named_parameters()), weights(trainer))


def test_models_whose_blocks_are_offloaded_are_built_on_the_host(source, monkeypatch):
    places = []
    build = RunConfig.build
    monkeypatch.setattr(
        RunConfig, "build", lambda c, device: places.append(device) or build(c, "cpu")
    )
    trainers = [TrainerConfig(steps=1), TrainerConfig(steps=1, offload="cpu")]
    configs = [make_config(source, trainer=trainer) for trainer in trainers]
    data = open_data(source, "train", 3)
    with pytest.raises(ValueError, match="blocks must be on meta"):
        configs[0].trainer_on("meta", data)
    assert configs[1].trainer_on("meta", data).device.type == "meta"
    assert places == ["meta", "cpu"]


def test_a_disk_too_small_for_the_blocks_stops_before_the_run(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9000))
    config = make_config(source, trainer=swapping(tmp_path)[2])
    with pytest.raises(ValueError, match=r"offload_dir must have .*iB free .* got 8.79 KiB"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_out_of_memory_is_said_in_the_log_and_kept_by_a_resumed_run(tmp_path, source, monkeypatch):
    inner = ViT.loss

    def loss(model, draw, level, scale, layers, batch):
        if len(level) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(model, draw, level, scale, layers, batch)

    monkeypatch.setattr(ViT, "loss", loss)
    config = make_config(source)
    with pytest.warns(UserWarning, match="out of memory in block . at its step 0"):
        whole = train(config, tmp_path / "run", device="cpu", save_every=6)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert [row.get("micro_batch") for row in rows] == [2] + [None] * 11
    earlier = sorted((tmp_path / "run" / "checkpoints").iterdir())[0]
    again = train(config, tmp_path / "run", device="cpu", resume=str(earlier))
    assert equal(weights(again), weights(whole))


def test_an_earlier_checkpoint_can_be_named(tmp_path, source):
    config = make_config(source)
    whole = train(config, tmp_path / "run", device="cpu", save_every=4)
    earlier = sorted((tmp_path / "run" / "checkpoints").iterdir())[0]
    again = train(config, tmp_path / "run", device="cpu", resume=str(earlier))
    assert equal(weights(again), weights(whole))


def test_the_same_seed_initialises_the_same_layers_in_any_partition(source):
    one = make_config(source, partition=PartitionConfig(num_blocks=1)).build("cpu")
    three = make_config(source).build("cpu")
    assert all(map(torch.equal, one.model.parameters(), three.model.parameters()))


def test_building_leaves_the_global_generator_alone(source):
    before = torch.random.get_rng_state()
    make_config(source).build("cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loaded_run_has_the_average_or_the_last_weights(tmp_path, source):
    trainer = train(make_config(source), tmp_path / "run", device="cpu")
    _, averaged = load_run(tmp_path / "run", device="cpu")
    _, last = load_run(tmp_path / "run", averaged=False, device="cpu")
    assert equal(dict(last.named_parameters()), weights(trainer))
    assert equal(dict(averaged.named_parameters()), trainer.tensors()["ema"])
    assert not averaged.training


def test_copies_load_their_frozen_table_beside_the_average(tmp_path, source):
    trainer = TrainerConfig(steps=2, batch_size=4, ema=0.9)
    partition = PartitionConfig(sharing="copies")
    config = make_config(source, trainer=trainer, partition=partition)
    trained = train(config, tmp_path / "run", device="cpu")
    _, loaded = load_run(tmp_path / "run", device="cpu")
    table = loaded.model.label_table.weight
    assert torch.equal(table, trained.blocks.model.label_table.weight)
    assert all(model.label_table.weight is table for model in loaded.copies)


def test_a_resumed_run_may_free_its_gradients(tmp_path, source):
    kept = TrainerConfig(steps=4, batch_size=4, lr=1e-2, ema=0.9, clip=0.0)
    whole = train(make_config(source, trainer=kept), tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted):
        config = make_config(source, trainer=kept)
        train(config, tmp_path / "cut", device="cpu", save_every=2, on_step=stop_at(5))
    config = make_config(source, trainer=dataclasses.replace(kept, optimizer_in_backward=True))
    resumed = train(config, tmp_path / "cut", device="cpu", resume="latest")
    for group, expected in whole.tensors().items():
        assert equal(resumed.tensors()[group], expected), group


def test_split_reaches_the_blocks(source):
    config = make_config(source, partition=PartitionConfig(num_blocks=2, split="1,2"))
    assert [block.layers for block in config.build("cpu")] == [(0,), (1, 2)]


def test_a_run_is_not_written_over(tmp_path, source):
    config = make_config(source)
    train(config, tmp_path / "run", device="cpu")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="must hold no run yet"):
        train(config, tmp_path / "run", device="cpu")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, source):
    config = make_config(source)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", device="cpu", on_step=stop_at(1))
    whole = train(config, tmp_path / "run", device="cpu")
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == whole.total_steps


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, source):
    config = make_config(source)
    train(config, tmp_path / "run", device="cpu")
    other = dataclasses.replace(config, shift=1)
    with pytest.raises(ValueError, match="shift"):
        train(other, tmp_path / "run", device="cpu", resume="latest")
    for name, value in {"accumulate": 2, "steps_per_swap": 2, "seed": 1, "clip": 0.0}.items():
        trainer = dataclasses.replace(config.trainer, **{name: value})
        other = dataclasses.replace(config, trainer=trainer)
        with pytest.raises(ValueError, match=f"1 settings differ .*trainer.{name}: saved"):
            train(other, tmp_path / "run", device="cpu", resume="latest")


def test_a_directory_in_which_another_run_still_goes_on_is_refused(tmp_path, source):
    config, run = make_config(source), tmp_path / "run"

    def second(row):
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(ValueError, match="run must have one writer, got another that goes on"):
            train(config, run, device="cpu")
        assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        raise Interrupted

    with pytest.raises(Interrupted):
        train(config, run, device="cpu", on_step=second)
    train(config, run, device="cpu")


def test_bad_settings_touch_no_file(tmp_path, source):
    run = tmp_path / "run"
    cases = [
        (make_config(source, partition=PartitionConfig(num_blocks=4)), {}, "num_blocks"),
        (make_config(source, partition=PartitionConfig(split="1,1")), {}, "split"),
        (make_config(source, partition=PartitionConfig(split="1,x")), {}, "whole numbers"),
        (make_config(source, partition=PartitionConfig(gamma=-1.0)), {}, "gamma"),
        (make_config(str(tmp_path / "none.npy")), {}, "none.npy"),
        (make_config(source), {"resume": "latest"}, "must hold a checkpoint"),
        (make_config(source), {"save_every": -1}, "save_every"),
    ]
    for config, options, message in cases:
        with pytest.raises(ValueError, match=message):
            train(config, run, device="cpu", **options)
        assert not run.exists()


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path, source):
    config = make_config(source, trainer=TrainerConfig(steps=4, batch_size=4, lr=1e30, clip=0))
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        train(config, tmp_path / "run", device="cpu", save_every=1)
    checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_drop": 1.0}, r"label_drop must be in \[0, 1\), got 1.0"),
        ({"label_drop": 0.1}, "label_drop must be 0 for vit, got 0.1"),
        (
            {"weighting": "published", "trainer": TrainerConfig(steps=1, accumulate=2)},
            "accumulate must be 1 with the published weighting, .*, got 2",
        ),
        ({"shift": -1}, "shift must be at least 0 pixels, got -1"),
    ],
)
def test_rejects(source, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(source, **changes)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"version": 1, "family": "vit"}))
    with pytest.raises(ValueError, match="must hold the configuration of a run"):
        read_config(tmp_path)


@pytest.mark.parametrize("version", [{}, {"version": 3}, {"version": 0}])
def test_a_configuration_of_another_version_is_refused(tmp_path, version):
    (tmp_path / "config.json").write_text(json.dumps(version))
    got = version.get("version")
    with pytest.raises(ValueError, match=rf"must have a version from 1 to 2, got {got}"):
        read_config(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(source, tmp_path, monkeypatch):
    config = make_config(source)
    monkeypatch.setattr(run_module, "VERSION", 3)
    train(config, tmp_path, device="cpu")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"step-\d+ must have a version from 1 to 2, got 3"):
        train(config, tmp_path, device="cpu", resume="latest")


# stopped after 2 of its 4 steps, and never written again
VERSION_1 = Path(__file__).parent / "version_1"


def test_a_run_of_version_1_is_read():
    config = read_config(VERSION_1)
    assert json.loads((VERSION_1 / "config.json").read_text())["version"] == 1
    assert (config.family, config.model.dim, config.model.recompute) == ("vit", 8, "qkv")
    assert (config.trainer.offload, config.trainer.steps_per_swap) == ("cpu", 2)
    assert (config.partition.num_blocks, config.partition.sharing) == (2, "joint")
    _, models = load_run(VERSION_1, averaged=False, device="cpu")
    tensors, state = checkpoint.load(checkpoint.latest(VERSION_1 / "checkpoints"))
    assert equal(dict(models.named_parameters()), tensors["model"])
    assert state["version"] == 1 and state["counters"]["groups"]["block1"] == 2


def test_a_run_of_version_1_goes_on(tmp_path):
    directory = shutil.copytree(VERSION_1, tmp_path / "run")
    trainer = train(read_config(directory), directory, device="cpu", resume="latest")
    assert trainer.step == trainer.total_steps == 4
    assert [row["step"] for row in read_log(directory / "log.jsonl")] == [0, 1, 2, 3]
