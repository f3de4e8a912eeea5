"""Every example runs, at a small size; commands of the pages that name one are these."""

import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dbkernels import DiT
from dbkernels.convert import load, save_as

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, **settings):
        runpy.run_path(str(EXAMPLES / name))["main"](**settings)
        return capsys.readouterr().out

    return run


def test_a_flow_is_trained_in_blocks_and_draws_digits(run, tmp_path):
    lines = run("flow.py", steps=2).splitlines()
    assert lines[0].endswith("t from 0.606 to 1.000") and lines[-1].startswith("wrote 80 digits")
    assert Image.open(tmp_path / "digits.png").size == (8 * 64, 10 * 64)


def test_adapters_of_two_blocks_are_trained_apart_and_merge(run, tmp_path):
    lines = run("lora_blocks.py", steps=1, rank=2).splitlines()
    assert [line[:7] for line in lines[:2]] == ["block 0", "block 1"]
    assert lines[2].startswith("wrote adapters: 72 adapters of rank 2")
    assert (tmp_path / "adapters/adapter_config.json").exists()


def test_a_model_trains_as_before_and_keeps_less_once_it_is_fused(run):
    sizes = {"dim": 24, "heads": 2, "depth": 2, "tokens": 30, "batch": 2, "steps": 2}
    before, *report, after = run("adopt.py", **sizes).splitlines()
    assert report[:2] == ["replaced: 2", "  blocks.0  DiTBlock"]
    (loss, kept), (same_loss, less) = (
        re.search(r"(loss .*), (.*) units", line).groups() for line in (before, after)
    )
    assert loss == same_loss
    assert float(less) < 0.7 * float(kept)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_published_dit_is_fine_tuned_and_given_back(num_blocks, run, tmp_path):
    torch.manual_seed(1)
    published = replace(DiT.preset("digits"), depth=4, process="vp", prediction="epsilon")
    save_as(model := DiT(published), "theirs.pt", "dit")
    told = {"weights": Path("theirs.pt"), "data": "digits", "num_heads": published.num_heads}
    said = run("finetune_dit.py", **told, num_blocks=num_blocks, steps=2, batch_size=4)
    if num_blocks == 2:
        assert said == "wrote 8 samples of 2 blocks: finetuned.npy\n"
        assert np.isfinite(np.load("finetuned.npy")).all()
        return
    assert said == "wrote finetuned.pt, which the published code loads\n"
    tuned = load("finetuned.pt", num_heads=published.num_heads)
    moved = [
        not torch.equal(*each) for each in zip(tuned.parameters(), model.parameters(), strict=True)
    ]
    assert any(moved) and tuned.config == model.config


def test_a_plan_that_fits_is_trained_by(run):
    whole, plan, *losses = run("small_gpu.py", steps=1, batch=16, memory="600MiB").splitlines()
    assert whole.startswith("end to end needs") and re.match(r"\d+ blocks, recompute", plan)
    assert losses
    with pytest.raises(SystemExit, match="nothing fits 513MiB: the smallest plan needs"):
        run("small_gpu.py", steps=1, batch=16, memory="513MiB")


def test_runs_are_compared(run, tmp_path):
    whole, blocks, wrote = run("compare_runs.py", steps=2, out=tmp_path / "both").splitlines()
    needs = [
        float(re.fullmatch(r"\d blocks?: accuracy [\d.]+%, a step needs ([\d.]+) MiB", line)[1])
        for line in (whole, blocks)
    ]
    assert needs[1] < needs[0]
    assert Image.open(wrote.removeprefix("wrote ")).size[0] > 100


def test_a_step_is_held_to_a_budget(monkeypatch):
    settings = runpy.run_path(str(EXAMPLES / "test_memory_budget.py"))
    test = settings["test_a_step_stays_within_its_budget"]
    for recompute, ceiling in settings["CEILINGS"].items():
        test(recompute, ceiling)
        # no more than a tenth is left
        number, unit = ceiling.split()
        with pytest.raises(AssertionError, match="more than the ceiling"):
            test(recompute, f"{0.9 * float(number)} {unit}")


def test_the_notebook_runs(monkeypatch, capsys):
    book = json.loads((EXAMPLES / "blocks.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in book["cells"])
    names = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("steps = 300", "steps = 2"), names)
    assert [len(each) for each in names["losses"].values()] == [2, 2, 2]
    assert re.search(r"3 blocks: [\d.]+ MiB\n1 blocks: [\d.]+ MiB", capsys.readouterr().out)


def test_a_data_set_of_ones_own_is_read_by_workers_and_goes_on(run, tmp_path):
    told = {"steps": 2, "save_every": 4}
    said = run("own_dataset.py", **told, workers=1, out=Path("whole"))
    assert said.splitlines()[0].startswith("loss of each block")
    first = run("own_dataset.py", **told, out=Path("cut"))
    shutil.rmtree("cut/step-00000006")
    again = run("own_dataset.py", **told, workers=2, out=Path("cut"))
    assert again == f"goes on from step 4 of 6\n{said}" and first == said


@pytest.mark.parametrize("layers", ["torch", "adaln", "timm"])
def test_layers_of_ones_own_are_trained_in_blocks(layers, run):
    if layers == "timm":
        pytest.importorskip("timm", reason="needs timm")
    sizes = {"steps": 2, "dim": 16, "depth": 3, "num_heads": 2}
    lines = run("own_layers.py", layers=layers, **sizes).splitlines()
    assert len(lines[0].split("block")[1].split()) == 3
    assert lines[2].startswith("accuracy after each step")


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        assert f'"{path.name}"' in text or not path.is_file(), path.name


def test_a_model_of_any_size_is_planned_for_many_gpus(run):
    sizes = {"dim": 32, "depth": 4, "num_heads": 2, "per_gpu": 1}
    first, _, *plans = run("scale.py", gpus=8, memory="600MiB", **sizes).splitlines()
    assert first == "0.0e9 parameters in layers, 8 samples a step"
    ways = [line.split()[:4] for line in plans]
    assert [way[0] for way in ways] and all(
        int(at_once) * int(batch) * int(layer) == 8 for _, at_once, batch, layer in ways
    )
    with pytest.raises(SystemExit, match="nothing fits 513MiB: the smallest plan needs"):
        run("scale.py", gpus=8, memory="513MiB", **sizes)
