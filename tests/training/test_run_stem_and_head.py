"""Runs whose stem and head are compiled."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models.tiny import dynamo_alone
from torch._dynamo.utils import counters
from training.tiny import DIT, PRIOR, VIT, equal, make_data, weights

from dbkernels.models import stem_and_head
from dbkernels.training.log import read_log
from dbkernels.training.run import PartitionConfig, RunConfig, load_run, train
from dbkernels.training.trainer_config import TrainerConfig


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.npy"
    images = np.random.default_rng(0).standard_normal((12, 1, 4, 4)).astype(np.float32)
    np.save(path, images)
    np.save(tmp_path / "data_labels.npy", np.arange(12) % 3)
    return str(path)


def make_config(source, family="vit", **trainer):
    settings = {"steps": 3, "batch_size": 4, "lr": 1e-2, "compile_stem_and_head": True, **trainer}
    sharing = settings.pop("sharing", "joint")
    return RunConfig(
        family=family,
        model=VIT if family == "vit" else DIT,
        data=source,
        weighting="none" if family == "vit" else "edm",
        label_drop=0.0,
        mirror=False,
        shift=0,
        partition=PartitionConfig(num_blocks=3, sharing=sharing),
        prior=PRIOR,
        trainer=TrainerConfig(**settings),
    )


def plain(config):
    return replace(config, trainer=replace(config.trainer, compile_stem_and_head=False))


def test_a_run_has_the_losses_of_a_plain_one_and_resumes_to_the_same_bits(tmp_path, source):
    config = make_config(source, ema=0.9)
    whole = train(config, tmp_path / "run", device="cpu", save_every=4)
    assert counters["stats"]["unique_graphs"] == 2
    rows = read_log(tmp_path / "run" / "log.jsonl")
    earlier = sorted((tmp_path / "run" / "checkpoints").iterdir())[0]
    again = train(config, tmp_path / "run", device="cpu", resume=str(earlier))
    for group, expected in whole.tensors().items():
        assert equal(again.tensors()[group], expected), group
    assert read_log(tmp_path / "run" / "log.jsonl") == rows
    train(plain(config), tmp_path / "plain", device="cpu")
    expected = [row["loss"] for row in read_log(tmp_path / "plain" / "log.jsonl")]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("vit", {"sharing": "copies"}),
        ("dit", {"sharing": "copies", "offload": "cpu", "steps_per_swap": 2, "ema": 0.9}),
        ("vit", {"offload": "cpu", "optimizer_in_backward": True, "clip": 0.0}),
        ("dit", {"accumulate": 2}),
    ],
)
def test_each_copy_trains_its_own_stem_and_head_wherever_it_lies(
    tmp_path, source, family, settings, monkeypatch
):
    dynamo_alone(monkeypatch)
    config = make_config(source, family, **settings)
    trained = train(config, tmp_path / "run", device="cpu")
    copies = 3 if config.partition.sharing == "copies" else 1
    assert counters["stats"]["unique_graphs"] == 2 * copies
    expected = train(plain(config), tmp_path / "plain", device="cpu")
    assert counters["stats"]["unique_graphs"] == 2 * copies
    assert equal(weights(trained), weights(expected))


def test_a_loaded_run_compiles_nothing(tmp_path, source, monkeypatch):
    dynamo_alone(monkeypatch)
    config = make_config(source, steps=1)
    train(config, tmp_path / "run", device="cpu")
    monkeypatch.setattr(stem_and_head, "_missing", lambda device: "anything")
    loaded, models = load_run(tmp_path / "run", device="cpu")
    assert loaded == config and not vars(models.model).keys() & {"stem", "cross_entropy"}


def test_stem_and_head_are_compiled_for_the_device_that_trains(source, monkeypatch):
    devices = []
    monkeypatch.setattr(
        stem_and_head, "compile_stem_and_head", lambda model, device: devices.append(str(device))
    )
    config = make_config(source, sharing="copies", offload="cpu")
    config.trainer_on("meta", make_data())
    config.trainer_of(config.build("cpu"), make_data())
    assert devices == ["meta"] * 3 + ["cpu"] * 3


def test_a_run_without_a_compiler_stops_before_it_begins(tmp_path, source, monkeypatch):
    monkeypatch.setattr(stem_and_head, "_missing", lambda device: f"something for {device}")
    config = make_config(source)
    with pytest.raises(ValueError, match="compile_stem_and_head needs something for cpu, got none"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_cannot_change_its_mind(tmp_path, source):
    config = make_config(source, steps=1)
    train(plain(config), tmp_path / "run", device="cpu")
    with pytest.raises(
        ValueError, match=r"1 settings differ .*trainer.compile_stem_and_head: saved False"
    ):
        train(config, tmp_path / "run", device="cpu", resume="latest")
