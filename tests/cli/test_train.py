import json
import shutil
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.runs import SIZES, read_tree, refused, write_captions, write_npz
from fake_torchvision import modules
from training.tiny import make_older
from training.trackers import PACKAGES

from dbkernels.cli.progress import ProgressBar
from dbkernels.cli.train import PartitionFlags
from dbkernels.data.token_files import write_tokens
from dbkernels.models import FAMILIES, dit, family_named
from dbkernels.training import checkpoint
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.run_config import PartitionConfig, read_config
from dbkernels.training.trained import trained_run


def test_says_what_it_trained(train, tmp_path):
    outcome = train("vit --out out")
    assert (outcome.code, outcome.out) == (0, "trained 6 steps in 3 blocks: out\n")
    assert "training 6 of 6 steps: block " in outcome.err
    rows = (tmp_path / "out/log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(6))
    assert train("vit --out one --num-blocks 1").out == "trained 2 steps in 1 block: one\n"


def test_flags_reach_the_configuration(train, monkeypatch, tmp_path):
    flags = "--split 2,1 --num-blocks 2 --gamma 0.2 --sigma-max 40 --lr 0.01 --seed 7 --ema 0.5"
    flags += " --offload disk --offload-dir off --prefetch --steps-per-swap 2"
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    train(f"dit --out out {flags} --label-drop 0.1 --mirror --rand-augment --patch 4")
    config = json.loads((tmp_path / "out/config.json").read_text())
    trainer = {"steps": 2, "batch_size": 8, "lr": 0.01, "seed": 7, "ema": 0.5}
    trainer |= {"offload": "disk", "offload_dir": "off", "prefetch": True, "steps_per_swap": 2}
    sizes = {"patch": 4, "dim": 16, "depth": 3, "num_heads": 2, "image_size": 8, "num_classes": 3}
    assert trainer.items() <= config["trainer"].items() and sizes.items() <= config["model"].items()
    assert {"split": "2,1", "gamma": 0.2}.items() <= config["partition"].items()
    assert {"sigma_max": 40.0, "sigma_min": 0.002}.items() <= config["prior"].items()
    assert (config["label_drop"], config["mirror"], config["rand_augment"]) == (0.1, True, True)
    assert list((tmp_path / "off").iterdir()) == []


OF_IMAGES = [
    name
    for name, entry in FAMILIES.items()
    if any(field.name == "patch" for field in fields(entry.config))
]


def test_three_families_have_patches():
    assert OF_IMAGES == ["vit", "dit", "mmdit"]


@pytest.mark.parametrize("family", OF_IMAGES)
def test_a_patch_fits_the_images_of_the_data_and_not_those_of_the_preset(cli, tmp_path, family):
    entry = FAMILIES[family].model
    assert entry.preset(entry.smallest).image_size % 7
    write_npz(tmp_path / "z.npz", (1, 14, 14))
    write_captions(tmp_path, side=14)
    data = "z.npy" if family == "mmdit" else "z.npz"
    line = f"train {family} --data {data} {' '.join(SIZES)} --out"
    assert cli(f"{line} run --patch 7").code == 0
    model = read_config(tmp_path / "run").model
    assert (model.patch, model.image_size, model.dim) == (7, 14, 16)
    for patch in (4, 28):
        message = f"the patch must divide the image size, got {patch} and 14"
        assert refused(cli(f"{line} wrong --patch {patch}"), message)
    assert not (tmp_path / "wrong").exists()


def test_a_run_is_shown_by_what_is_asked_for_and_goes_on_there(train, monkeypatch):
    runs = []
    for name in ("trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, name, PACKAGES[name](runs))
    flags = "vit --out out --track trackio,mlflow --threads 1"
    assert train(flags).code == 0 and train(f"{flags} --steps 3 --resume latest").code == 0
    assert [run.ends for run in runs] == [["finished"] * 2, ["finished", "RUNNING", "finished"]]
    for run in runs:
        losses = [curve for name, curve in run.curves.items() if name.startswith("loss")]
        assert sorted(step for curve in losses for step, _ in curve) == [*range(9)]
    assert runs[0].config["model"]["dim"] == 16 and runs[1].config["trainer.batch_size"] == "8"


def test_a_run_that_a_signal_ends_is_shown_as_one_that_failed(train, monkeypatch):
    runs = []
    monkeypatch.setitem(sys.modules, "mlflow", PACKAGES["mlflow"](runs))

    def ask_once(shown, done, text):
        if done == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ProgressBar, "step", ask_once)
    assert train("vit --out out --track mlflow --threads 1").code == 128 + signal.SIGTERM
    assert runs[0].ends == ["failed"]


def test_a_tracker_that_is_missing_is_said_before_anything_is_done(train, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert refused(train("vit --out out --track wandb"), "pip install dbkernels[wandb]")
    assert refused(
        train("vit --out out --track neptune"), "track must be one of tensorboard, wandb"
    )
    assert not (tmp_path / "out").exists()


def test_a_torchvision_that_is_missing_is_said_before_anything_is_done(
    train, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    message = "torchvision must be installed for rand_augment (pip install dbkernels[augment]), got"
    assert refused(train("vit --out out --rand-augment"), message)
    assert not (tmp_path / "out").exists()


def test_adapters_alone_are_trained_and_their_base_is_said_to_be_random(train, tmp_path):
    outcome = train("dit --out out --lora 2 --lora-alpha 4 --lora-targets qkv,fc1")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["lora"] == {
        "rank": 2, "alpha": 4.0, "targets": "qkv,fc1", "base": "float32"
    }  # fmt: skip
    assert "give one that was trained with --from" in outcome.err
    assert train("dit --out plain").err.count("adapters") == 0


@pytest.mark.parametrize(
    ("family", "objective", "count"),
    [("vit", "blocks", 3), ("huginn", "blocks", 1), ("ar", "conventional", 1)],
)
def test_the_number_of_blocks_follows_the_family_unless_it_is_given(family, objective, count):
    told = family_named(family), objective
    assert PartitionFlags(split="2").for_family(*told) == PartitionConfig(count, split="2")
    assert PartitionFlags(2, gamma=0.2).for_family(*told) == PartitionConfig(2, gamma=0.2)


@pytest.mark.parametrize(("family", "automatic"), [("vit", "none"), ("dit", "process")])
def test_the_weighting_follows_the_family_unless_it_is_given(runs, family, automatic):
    for flags, expected in (("", automatic), (" --weighting normalised", "normalised")):
        config = json.loads((runs(f"{family}{flags}") / "config.json").read_text())
        assert config["weighting"] == expected


@pytest.mark.parametrize(
    ("flags", "mean", "least"),
    [
        ("vit", -1.2, 0.4),
        ("vit --mean 0.5", 0.5, 0.4),
        ("vit --paper", -1.2, 0.002),
        ("vit --paper --sigma-min 0.1", -1.2, 0.1),
        ("dit", -1.2, 0.002),
    ],
)
def test_the_prior_is_the_familys_or_the_papers_with_what_is_asked_for(runs, flags, mean, least):
    prior = json.loads((runs(flags) / "config.json").read_text())["prior"]
    assert prior == {"mean": mean, "std": 1.2, "sigma_min": least, "sigma_max": 80.0}


@pytest.mark.parametrize(
    ("flags", "noise", "prior"),
    [
        ("dit", ("gaussian", "edm"), {"mean": -1.2}),
        ("dit --process flow", ("flow", "velocity"), {"mean": 0.0, "time_shift": 1.0}),
        (
            "dit --process flow --prediction x0 --mean 0.5 --time-shift 3 --t-max 0.9",
            ("flow", "x0"),
            {"mean": 0.5, "time_shift": 3.0, "t_max": 0.9},
        ),
        ("dit --process flow --density uniform", ("flow", "velocity"), {"density": "uniform"}),
        ("dit --process vp", ("vp", "epsilon"), {}),
        ("dit --process vp --prediction v", ("vp", "v"), {}),
    ],
)
def test_noise_and_its_prior_are_those_that_were_asked_for(runs, flags, noise, prior):
    config = json.loads((runs(flags) / "config.json").read_text())
    assert (config["model"]["process"], config["model"]["prediction"]) == noise
    assert prior.items() <= config["prior"].items()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--process flow --prediction v", "prediction of flow must be one of velocity, x0, got v"),
        ("--prediction epsilon", "prediction of gaussian must be one of edm, got epsilon"),
        ("--process vp --mean 0.5", "mean is no setting of the prior, which has none; got 0.5"),
        ("--process flow --sigma-max 5", "sigma_max is no setting of the prior: mean, std, dens"),
        ("--process flow --density uniform --mean 0.5", "mean and std must be those of logit_nor"),
        ("--process flow --paper", "paper must be False for noise that is not the paper's"),
    ],
)
def test_noise_that_there_is_not_is_refused(train, flags, message):
    assert refused(train(f"dit --out out {flags}"), message)


def test_a_run_goes_on_to_its_end_and_not_with_other_settings(train, runs, tmp_path):
    whole, out = runs("vit --save-every 4"), tmp_path / "out"
    shutil.copytree(whole, out)
    before = read_tree(tmp_path)
    again = f"vit --out out --data {whole.parent}/data.npz"
    other = train(f"{again} --resume latest --lr 0.5 --gamma 0.1")
    assert refused(other, "2 settings differ from checkpoint out/checkpoints/step-00000006")
    assert "trainer.lr: saved 0.001, current 0.5" in other.err
    assert "partition.gamma: saved 0.05, current 0.1" in other.err
    same = train(f"{again} --resume latest")
    assert (same.code, same.out) == (0, "nothing to do: all 6 steps are trained already: out\n")
    assert read_tree(tmp_path) == before
    rest = train(f"{again} --save-every 4 --resume out/checkpoints/step-00000004")
    assert (rest.code, rest.out) == (0, "trained 2 steps in 3 blocks: out\n")
    for file in ("log.jsonl", "checkpoints/step-00000006/model.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


def test_an_older_run_goes_on_with_the_flags_that_it_had(train, tmp_path, monkeypatch):
    with monkeypatch.context() as then:
        preset = replace(dit.PRESETS["digits"], positions="cos_sin")
        then.setitem(dit.PRESETS, "digits", preset)
        train("dit --out whole --save-every 4 --decay-on all")
        shutil.copytree("whole", "out")
    shutil.rmtree("out/checkpoints/step-00000006")
    make_older(tmp_path / "out")
    assert train("dit --out out --resume latest").out == "trained 2 steps in 3 blocks: out\n"
    for file in ("log.jsonl", "config.json", "checkpoints/step-00000006/model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert refused(train("vit --out out --resume latest"), "family: saved 'dit', current 'vit'")
    again = train("dit --out out --resume latest --decay-on matrices")
    assert refused(again, "decay_on: saved 'all', current 'matrices'")


def test_a_run_starts_from_a_network_whose_sizes_it_has_and_goes_on_without_it(cli, runs):
    whole = runs("dit --num-blocks 1 --patch 4 --save-every 2")
    shutil.copytree(whole, "whole")
    told = f"--data {whole.parent}/data.npz --steps 2 --batch-size 8 --device cpu"
    line = f"train dit --out out --from whole --distill 0.5 --save-every 3 {told}"
    assert cli(line).out == "trained 6 steps in 3 blocks: out\n"
    config, source = (read_config(Path(name)) for name in ("out", "whole"))
    assert config.model == source.model and config.model.patch == 4
    assert (config.start.source, config.start.distill) == ("whole", 0.5)
    first = checkpoint.load(Path("whole/checkpoints/step-00000002"))[0]["model"]
    assert config.start.digest == trained_run(Path("whole")).digest
    kept = checkpoint.load(Path("out/trained/step-00000000"))[0]["model"]
    assert all(torch.equal(kept[n], first[f"model.{n}"]) for n in kept)
    shutil.rmtree("whole")
    shutil.copytree("out", "whole_run")
    shutil.rmtree("out/checkpoints/step-00000006")
    assert cli(f"{line} --resume latest").out == "trained 3 steps in 3 blocks: out\n"
    file = "checkpoints/step-00000006/model.safetensors"
    assert Path("out", file).read_bytes() == Path("whole_run", file).read_bytes()
    other = cli(f"{line.replace('whole', 'else')} --resume latest")
    assert refused(other, "start.source: saved 'whole', current 'else'")


def test_blocks_of_a_language_model_keep_what_it_knows_unless_another_is_asked_for(runs, cli):
    tokens = np.random.default_rng(0).integers(0, 3, (6, 48))
    write_tokens("tokens", {"train": tokens}, vocabulary=3)
    small = "--data tokens --length 8 --steps 1 --batch-size 2 --device cpu"
    sizes = "--dim 16 --depth 3 --num-heads 2"
    made = cli(f"train ar --out whole --objective conventional {small} {sizes} --read-out paper")
    assert made.code == 0
    for flags, expected in (
        ("", ("through", "map_and_clean", "posterior", "deepest")),
        ("--clean own --noise-order first", ("own", "map_and_clean", "posterior", "first")),
        ("--objective conventional", ("own", "z", "paper", "first")),
    ):
        out = f"out{len(flags)}"
        assert cli(f"train ar --out {out} --from whole {small} {flags}").code == 0
        config = read_config(Path(out))
        model = config.model
        found = (model.clean, model.noisy_input, model.read_out, config.partition.noise_order)
        assert found == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("vit --from whole", "family must be dit as in whole, got vit"),
        ("dit --from whole --dim 32", "dim must be 16 as in whole/checkpoints/step-00000002, got"),
        ("dit --from whole --preset digits", "preset must be left out with from, got digits"),
        ("dit --from whole --process flow", "process must be gaussian as in whole/checkpoints/st"),
        ("dit --from whole --data more.npz", "num_classes must be 3 as in whole/checkpoints/step"),
        ("dit --from whole --distill 2", "distill must be from 0 to 1, got 2"),
        ("dit --from whole.pt", "whole.pt must be a file, got none"),
        ("dit --from none", "a run's directory must hold config.json, got none in none"),
        ("dit --distill 0.5", "distill must be 0 for a run that starts from no trained network"),
    ],
)
def test_a_network_that_a_run_cannot_start_from_is_refused(cli, runs, tmp_path, flags, message):
    shutil.copytree(runs("dit --num-blocks 1"), "whole")
    write_npz(tmp_path / "more.npz", classes=5)
    told = "--data data.npz --steps 1 --batch-size 8 --device cpu --out out"
    assert refused(cli(f"train {told} {flags}"), message)
    assert not (tmp_path / "out").exists()


def test_a_warning_is_one_line_beside_the_bar(train, monkeypatch):
    def loss(blocks, block, batch, draw):
        if len(batch["label"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(blocks, block, batch, draw)

    inner = DiffusionBlocks.loss
    monkeypatch.setattr(DiffusionBlocks, "loss", loss)
    outcome = train("vit --out out")
    assert outcome.code == 0
    (line,) = [x for x in outcome.err.splitlines() if x.startswith("warning: out of memory in blo")]
    assert line.endswith("in micro-batches of 8: they have 4 from now on")
