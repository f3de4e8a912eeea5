import json
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_torchvision import modules
from models.tiny import dynamo_alone
from torch._dynamo.utils import counters
from training.tiny import CONFIGS, CPU, IN_BACKWARD, equal, families, make_data, make_older, weights

import dbkernels.training.run as run_module
from dbkernels.data.images import open_data
from dbkernels.diffusion.flow import Flow
from dbkernels.diffusion.timesteps import Timesteps
from dbkernels.models import AR, stem_and_head
from dbkernels.training import checkpoint
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.log import read_log
from dbkernels.training.run import load_run
from dbkernels.training.run_config import RunConfig, read_config, write_config
from dbkernels.training.trainer import Trainer

RUN = Path("run")
PIXELS = {"data": "pixels", "rand_augment": True}
CONVENTIONAL = {"family": "huginn", "objective": "conventional", "partition": {"num_blocks": 1}}


def files(directory=RUN):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# from a configuration to a trainer


@families
def test_config_comes_back_as_it_was_written(make_config, family, tmp_path):
    config = make_config(family, partition={"split": "1,1,1"}, lr=1 / 3)
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("noise", "prior"),
    [(("flow", "velocity"), Flow(mean=0.5, time_shift=3.0)), (("vp", "v"), Timesteps())],
)
def test_a_config_of_other_noise_comes_back_and_has_no_prior_but_its_own(
    make_config, noise, prior, tmp_path
):
    own = make_config("dit")
    model = replace(own.model, process=noise[0], prediction=noise[1])
    config = replace(own, model=model, prior=prior)
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert config.build("cpu").process == prior
    with pytest.raises(ValueError, match=f"prior must be {type(prior).__name__} for this model"):
        replace(config, prior=own.prior)


def test_blocks_are_built_of_the_seed_alone_whatever_the_partition(make_config):
    before = torch.random.get_rng_state()
    three, one, split, other = (
        make_config(seed=seed, partition=partition).build("cpu")
        for seed, partition in (
            (0, {}), (0, {"num_blocks": 1}), (0, {"num_blocks": 2, "split": "1,2"}), (1, {})
        )
    )  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), before)
    parameters = dict(three.named_parameters())
    assert equal(dict(one.named_parameters()), parameters)
    assert not equal(dict(other.named_parameters()), parameters)
    assert [block.layers for block in split] == [(0,), (1, 2)]


def test_models_whose_blocks_are_offloaded_are_built_on_the_host(make_config, monkeypatch):
    places, build = [], RunConfig.build
    monkeypatch.setattr(
        RunConfig, "build", lambda c, device, *_: places.append(device) or build(c, "cpu")
    )
    data = open_data("data.npy", "train", make_config().model.num_classes)
    with pytest.raises(ValueError, match="blocks must be on meta"):
        make_config().trainer_on("meta", data)
    assert make_config(**CPU).trainer_on("meta", data).device.type == "meta"
    assert places == ["meta", "cpu"]


# from a directory to blocks


@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_a_loaded_run_has_the_average_or_the_last_weights(make_config, train, sharing):
    config = make_config(partition={"sharing": sharing, "split": "1,1,1"}, lr=1 / 3, **CPU)
    trainer = train(config)
    loaded, averaged = load_run(RUN, device="cpu")
    _, last = load_run(RUN, averaged=False, device="cpu")
    assert loaded == config and not averaged.training
    assert equal(dict(last.named_parameters()), weights(trainer))
    # what is frozen has no average
    expected = weights(trainer) | trainer.tensors()["ema"]
    assert equal(dict(averaged.named_parameters()), expected)
    table = averaged.model.label_table.weight
    assert all(model.label_table.weight is table for model in averaged.copies)


# what is refused


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"label_drop": 1.0}, {}, r"label_drop must be in \[0, 1\), got 1.0"),
        ({"label_drop": 0.1}, {}, "label_drop must be 0 for vit, got 0.1"),
        (
            {"weighting": "published", "accumulate": 2},
            {},
            "accumulate must be 1 with the published weighting, .*, got 2",
        ),
        ({"shift": -1}, {}, "shift must be at least 0, got -1"),
        ({"family": "mdm", "stride": -1}, {}, "stride must be at least 0, got -1"),
        ({"stride": 2}, {}, "stride must be 0 where data is no text, got 2"),
        ({"family": "mdm", "rand_augment": True}, {}, "rand_augment must be False for mdm, got Tr"),
        ({"rand_augment": True}, {}, "rand_augment needs images of pixels, which are uint8, got"),
        ({**PIXELS, "cuda_graphs": True}, {}, "cuda_graphs must be off with rand_augment, which"),
        ({"partition": {"num_blocks": 4}}, {}, "num_blocks"),
        ({"partition": {"split": "1,1"}}, {}, "split"),
        ({"partition": {"split": "1,x"}}, {}, "whole numbers"),
        ({"partition": {"gamma": -1.0}}, {}, "gamma"),
        ({"data": "none.npy"}, {}, "none.npy"),
        ({}, {"resume": "latest"}, "must hold a checkpoint"),
        ({}, {"save_every": -1}, "save_every"),
        ({"compile_stem_and_head": True}, {}, "compile_stem_and_head needs what cpu has, got none"),
        ({**CONVENTIONAL, "partition": {}}, {}, "num_blocks must be 1 for the conventional obj"),
        ({**CONVENTIONAL, "cuda_graphs": True}, {}, "cuda_graphs must be off for the conventional"),
        ({"objective": "conventional"}, {}, "objective must be blocks for vit, which is trained"),
    ],
)
def test_rejects_and_touches_no_file(make_config, train, monkeypatch, changes, options, message):
    monkeypatch.setattr(stem_and_head, "_missing", lambda device: f"what {device} has")
    with pytest.raises(ValueError, match=message):
        train(make_config(**changes), **options)
    assert not RUN.exists()


def test_a_run_trains_on_windows_at_its_stride_and_goes_on_at_no_other(make_config, train):
    for stride, samples in ((0, 12), (1, 6 * 25), (20, 6 * 3)):
        config = make_config("mdm", stride=stride, steps=1)
        assert len(train(config, f"{stride}").data) == samples
        (saved,) = Path(f"{stride}/checkpoints").iterdir()
        assert checkpoint.load(saved)[1]["conditions"]["samples"] == samples
    with pytest.raises(ValueError, match=r"1 settings differ .*: stride: saved 1, current 0"):
        train(make_config("mdm", steps=1), "1", resume="latest")


@pytest.mark.parametrize(("family", "field"), [("mdm", "stride"), ("vit", "rand_augment")])
def test_a_run_of_before_a_setting_was_there_has_none_of_it(make_config, tmp_path, family, field):
    config = make_config(family)
    write_config(config, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert not fields.pop(field) and not getattr(config, field)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path) == config


def test_a_run_whose_images_are_changed_goes_on_with_the_same_bits(make_config, train, monkeypatch):
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    Path("pixels").mkdir()
    for name, shape, most in (("images-idx3", (12, 4, 4), 256), ("labels-idx1", (12,), 3)):
        header = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
        values = np.random.default_rng(2).integers(most, size=shape, dtype=np.uint8)
        Path(f"pixels/train-{name}-ubyte").write_bytes(header + values.tobytes())
    whole = train(make_config(**PIXELS), "whole")
    train(make_config(**PIXELS, steps=2), "parts")
    assert equal(weights(train(make_config(**PIXELS), "parts", resume="latest")), weights(whole))
    plain = train(make_config(**PIXELS | {"rand_augment": False}), "plain")
    assert not equal(weights(plain), weights(whole))
    with pytest.raises(ValueError, match="rand_augment: saved True, current False"):
        train(make_config(**PIXELS | {"rand_augment": False}), "parts", resume="latest")


def test_a_run_is_neither_written_over_nor_goes_on_with_other_settings(make_config, train):
    train(make_config())
    before, latest = files(), {"resume": "latest"}
    for changes, options, message in [
        ({}, {}, "must hold no run yet"),
        ({"shift": 1}, latest, "1 settings differ .*shift: saved 0, current 1"),
        ({"accumulate": 2}, latest, "1 settings differ .*trainer.accumulate: saved 1, current 2"),
        ({"steps_per_swap": 2}, latest, "1 settings differ .*trainer.steps_per_swap: saved 1"),
        ({"seed": 1}, latest, "1 settings differ .*trainer.seed: saved 0, current 1"),
        ({"clip": 0.0}, latest, "1 settings differ .*trainer.clip: saved 1.0, current 0.0"),
        ({"compile_stem_and_head": True}, latest, "1 .*compile_stem_and_head: saved False"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(make_config(**changes), **options)
        assert files() == before


def test_a_directory_in_which_another_run_still_goes_on_is_refused(make_config, train):
    def second(row):
        before = files()
        with pytest.raises(ValueError, match="run must have one writer, got another that goes on"):
            train(make_config())
        assert before == files()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config(), on_row=second)
    train(make_config(), resume="latest")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"must hold config\.json"),
        *((text, "must be the JSON of a run") for text in ("5", "[1]", '{"', "[" * 10**5)),
        ({"version": 1, "family": "vit"}, "must hold the configuration of a run"),
        ({}, "must have a version from 1 to 5, got None"),
        ({"version": 6}, "must have a version from 1 to 5, got 6"),
        ({"version": 0}, "must have a version from 1 to 5, got 0"),
    ],
)
def test_a_directory_without_a_run_that_can_be_read_is_refused(tmp_path, text, message):
    if text is not None:
        written = text if isinstance(text, str) else json.dumps(text)
        (tmp_path / "config.json").write_text(written)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(make_config, train, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(run_module, "VERSION", 6)
        train(make_config())
    with pytest.raises(ValueError, match=r"step-\d+ must have a version from 1 to 5, got 6"):
        train(make_config(), resume="latest")


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


def test_a_run_of_version_1_goes_on(tmp_path, train):
    directory = shutil.copytree(VERSION_1, tmp_path / "run")
    trainer = train(read_config(directory), directory, resume="latest")
    assert trainer.step == trainer.total_steps == 4
    assert [row["step"] for row in read_log(directory / "log.jsonl")] == [0, 1, 2, 3]


def test_an_older_run_keeps_its_positions_and_decay_to_the_same_bits(make_config, train):
    config = make_config("dit", decay_on="all")
    config = replace(config, model=replace(config.model, positions="cos_sin"))
    expected = weights(train(config, save_every=4))
    shutil.rmtree(RUN / "checkpoints/step-00000012")
    make_older(RUN)
    batch, z = {"label": torch.tensor([0, 2])}, torch.randn(2, 1, 4, 4)
    old, blocks = load_run(RUN, device="cpu")
    assert old == config
    new = replace(config, model=replace(config.model, positions="sin_cos")).build("cpu")
    new.load_state_dict(blocks.state_dict())
    first, other = (each.predict(batch, z, 1.0) for each in (blocks, new))
    assert not torch.equal(first, other)
    assert equal(weights(train(read_config(RUN), resume="latest")), expected)
    assert json.loads((RUN / "config.json").read_text())["model"]["positions"] == "cos_sin"
    assert equal(dict(load_run(RUN, averaged=False, device="cpu")[1].named_parameters()), expected)


# stem and head that are compiled


@pytest.fixture
def compiled(make_config, monkeypatch):
    """Configurations of runs whose stem and head are compiled, and the same without."""
    dynamo_alone(monkeypatch)
    torch._dynamo.reset()
    counters.clear()

    def make(family="vit", **changes):
        plain = make_config(family, **{"steps": 3, **changes})
        return replace(plain, trainer=replace(plain.trainer, compile_stem_and_head=True)), plain

    return make


@pytest.mark.parametrize(
    ("family", "sharing", "settings"),
    [
        ("vit", "copies", {}),
        ("dit", "copies", {**CPU, "steps_per_swap": 2}),
        ("vit", "joint", {**CPU, **IN_BACKWARD}),
        ("dit", "joint", {"accumulate": 2}),
    ],
)
def test_each_copy_trains_its_own_stem_and_head_wherever_it_lies(
    compiled, train, family, sharing, settings
):
    config, plain = compiled(family, partition={"sharing": sharing}, **settings)
    trained, graphs = train(config), 6 if sharing == "copies" else 2
    assert counters["stats"]["unique_graphs"] == graphs
    assert equal(weights(trained), weights(train(plain, "plain")))
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_compiled_run_resumes_to_the_same_bits_and_is_loaded_without_a_compiler(
    compiled, train, monkeypatch
):
    config, _ = compiled(steps=2)
    expected = weights(train(config, save_every=3))
    path = sorted((RUN / "checkpoints").iterdir())[0]
    assert equal(weights(train(config, resume=str(path))), expected)
    monkeypatch.setattr(stem_and_head, "_missing", lambda device: "anything")
    loaded, models = load_run(RUN, device="cpu")
    assert loaded == config and not vars(models.model).keys() & {"stem", "cross_entropy"}


def test_stem_and_head_are_compiled_for_the_device_that_trains(compiled, monkeypatch):
    devices = []
    monkeypatch.setattr(
        stem_and_head, "compile_stem_and_head", lambda model, device: devices.append(str(device))
    )
    config, _ = compiled(partition={"sharing": "copies"}, **CPU)
    config.trainer_on("meta", make_data())
    config.trainer_of(config.build("cpu"), make_data())
    assert devices == ["meta"] * 3 + ["cpu"] * 3


# blocks that read the layers before their own


DEPENDENT = replace(CONFIGS["ar"], clean="through")


def trainer_through(**settings):
    return Trainer(DiffusionBlocks(AR(DEPENDENT)), make_data(family="ar"), steps=1, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda config: replace(
                config, model=DEPENDENT, trainer=replace(config.trainer, offload="cpu")
            ),
            "offload must be none where a block's steps read layers of others, got cpu",
        ),
        (lambda _: trainer_through(offload="cpu"), "offload must be none .*, got cpu"),
        (
            lambda _: DiffusionBlocks(AR(DEPENDENT), sharing="copies"),
            "sharing must be joint where a block's steps read layers of others, got copies",
        ),
        (lambda config: replace(config, mirror=True), "mirror must be False for ar, got True"),
        (lambda config: replace(config, shift=2), "shift must be 0 for ar, got 2"),
        (
            lambda config: replace(config, objective="conventional"),
            "num_blocks must be 1 for the conventional objective, got 3",
        ),
    ],
)
def test_what_a_model_of_text_cannot_do_is_refused(make_config, call, message):
    config = make_config("ar")
    with pytest.raises(ValueError, match=message):
        call(config)


def test_one_block_that_reads_no_other_is_offloaded_whatever_it_could_read():
    blocks = DiffusionBlocks(AR(DEPENDENT), num_blocks=1)
    Trainer(blocks, make_data(family="ar"), steps=1, batch_size=4, offload="cpu").run()
