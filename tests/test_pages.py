"""The code of every page under docs runs, block after block, and the site is built of the pages."""

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from convert import their_dit
from training.trackers import PACKAGES

import dbkernels
from dbkernels import DiT
from dbkernels.convert import save_adapters, save_as
from dbkernels.memory.budget import require_within
from dbkernels.models import add_adapters, run_layers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PUBLISHED = replace(DiT.preset("digits"), process="vp", prediction="epsilon")
FEWER = {
    "steps=500": "steps=1",
    "steps=1000": "steps=1",
}  # a reader waits for these, a test does not


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


PAGES = [page for page in sorted(DOCS.glob("*.md")) if blocks_of(page)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the pages' code reads, small."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DiT(PUBLISHED)
    save_as(model, "a diffusers folder", "diffusers")
    save_as(model, "DiT-XL-2-256x256.pt", "dit")
    np.save("latents.npy", np.zeros((8, 1, 8, 8), dtype=np.float32))
    np.save("latents_labels.npy", np.arange(8))
    for end, shape in {"": (1, 8, 8), "_text": (3, 5), "_pooled": (6,)}.items():
        np.save(f"captions{end}.npy", np.ones((8, *shape), dtype=np.float32))
    add_adapters(model, rank=16)
    for block, layers in (("block1", range(4, 8)), ("block2", range(8, 12))):
        save_adapters(model, block, "peft", layers=layers)


@pytest.fixture
def shown(monkeypatch):
    """The runs that the pages' code shows, by packages that need not be there."""
    runs = []
    for name, make in PACKAGES.items():
        monkeypatch.setitem(sys.modules, name, make(runs))
    return runs


def names_of(page):
    """What a page's code takes from the reader's own."""
    if page.stem == "adopt":
        noise = torch.randn(2, their_dit.CHANNELS, their_dit.SIDE, their_dit.SIDE)

        def training_losses(model, x, t, told):
            return {"loss": their_dit.loss_of(model, x, t, told["y"], noise)}

        diffusion = SimpleNamespace(training_losses=training_losses)
        of_batch = {"x": noise.flip(0), "t": torch.tensor([3, 500]), "y": torch.tensor([0, 4])}
        return {"DiT_XL_2": their_dit.DiT, "diffusion": diffusion, **of_batch}
    if page.stem == "checkpoints":
        of_batch = {"z": torch.randn(2, 1, 8, 8), "step": torch.tensor([3.0, 500.0])}
        return {**of_batch, "label": torch.tensor([0, 9]), "run_layers": run_layers}
    return {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, files, shown):
    names = names_of(page)
    for code in blocks_of(page):
        for much, little in FEWER.items():
            code = code.replace(much, little)
        extra = re.search(r"^(?:from|import) (schedulefree|torchao)", code, re.MULTILINE)
        if not extra or find_spec(extra[1]):
            exec(code, names)
    assert len(shown) == (len(PACKAGES) if page.stem == "tracking" else 0)
    assert all(step == row for run in shown for row, (step, _) in enumerate(run.curves["loss"]))


def test_a_test_of_memory_holds_as_the_page_has_it():
    names = {}
    [code] = blocks_of(DOCS / "prediction.md")
    exec(code, names)
    example = names["test_a_training_step_stays_within_its_memory"]
    example(require_within)
    with pytest.raises(AssertionError, match="needs"):
        example(lambda step, **more: require_within(step, **more | {"ceiling": "1.5 GiB"}))


def test_the_pictures_are_those_that_their_script_draws(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "tools")
    script = runpy.run_path(str(ROOT / "tools" / "pictures.py"))
    monkeypatch.setitem(script["main"].__globals__, "FOLDER", tmp_path)
    assert script["main"]() == 0
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    named = set(re.findall(r"\]\(pictures/([\w.-]+)\)", pages))
    for folder in (tmp_path, DOCS / "pictures"):
        assert {path.name for path in folder.iterdir()} == named


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    flags = (tmp_path / "flags" / "index.html").read_text()
    assert "--num-blocks" in flags and "train huginn" in flags
    # every page under docs is in the navigation, and every name of the package has its place
    assert not [page for page in DOCS.glob("*.md") if not (tmp_path / page.stem).exists()]
    reference = "".join(path.read_text() for path in (tmp_path / "api").rglob("index.html"))
    assert not [name for name in dbkernels.__all__ if f'.{name}"' not in reference]
