import importlib
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from baseline_case import DATA, VIT
from cli.runs import write_npz

from dbkernels.data.token_files import write_tokens
from dbkernels.ops.backend import library

# without compiled kernels there is nothing there to compare
SERVED = library.serves("gated_adaln_norm_bwd", torch.device("cpu"))
collect_ignore = [] if SERVED else ["test_ratios.py"]
ROOT = Path(__file__).parents[2]
SMALL = "--dim 16 --num-heads 2 --batch-size 4 --lr 1e-2"  # models of a study
TEXT = f"{SMALL} --length 8"
FITTED = "--mean -0.55 --std 0.8 --sigma-max 8"
LAYER = "--B 2 --T 32 --dim 64 --num-heads 2 --hidden 256 --dtype float32 --device cpu --threads 1"


@pytest.fixture(scope="module")
def bench():
    """Import one of the benchmarks' files, which stand beside each other and are no package.

    What they measure beside a case, and the time to warm up, is small.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        # folders of tests have these names too, and may have been imported by them
        for name in ("ops", "training"):
            patch.delitem(sys.modules, name, raising=False)
        machine, measure = map(importlib.import_module, ("machine", "measure"))
        patch.setattr(machine, "COPY_BYTES", 2**16)
        patch.setattr(machine, "MATMUL", {"cpu": 64})
        patch.setattr(measure, "WARM_UP_MS", {"cpu": 0, "cuda": 0})
        yield importlib.import_module
        # for those folders, and the processes that they start, all is as it was before
        for name, module in list(sys.modules.items()):
            file = Path(getattr(module, "__file__", None) or "")
            if file.is_relative_to(ROOT / "benchmarks"):
                del sys.modules[name]


@pytest.fixture
def run_main(bench, monkeypatch, capsys):
    """Runs a benchmark as a command would; what it prints."""

    def run(program, words):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{program}.py", *words.split()])
        capsys.readouterr()
        threads = torch.get_num_threads()
        bench("program").main(bench(program).Options)
        torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def layer_rows(bench):
    """The rows of a small case of `benchmarks/layer.py`, measured once."""
    return _layer_rows(bench)


@cache
def _layer_rows(bench):
    words = f"--json --rounds 2 {LAYER} --impls eager fused checkpointed".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks/layer.py", *words])
        rows = []
        patch.setattr("builtins.print", lambda line, flush: rows.append(json.loads(line)))
        bench("program").main(bench("layer").Options)
    return rows


@pytest.fixture
def small_case(bench):
    """A layer and its inputs."""
    case = bench("layer_case").LayerCase(B=2, T=8, dim=16, num_heads=2, hidden=64, dtype="float32")
    return case, bench("layer_case").make_inputs(case, torch.device("cpu"))


@pytest.fixture
def make_baseline(bench, monkeypatch):
    """Makes a small baseline by network and name."""
    module = bench("baselines")
    monkeypatch.setattr(bench("baselines.noprop_dt"), "NETS", 4)

    def of(network, name, data=DATA, sizes=None, seed=0, **options):
        cnn = module.CNNConfig(channels=(4, 8, 8), hidden=16)
        kind = module.BASELINES[network, name]
        if kind.__name__ in ("NoPropCT", "NoPropFM", "DiffusionBlocksCNN"):
            options = {"steps": 12, **options}
        if kind.__name__ in ("DiffusionBlocksViT", "Unconditioned"):
            options = {"num_blocks": 2, **options}
        if network == "cnn" or "noprop" in name:
            options = {"embedding": 4, **options}
        return kind(data, seed, sizes or (VIT if network == "vit" else cnn), **options)

    return of


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Made-up data of every name, as --data takes them."""
    root = tmp_path_factory.mktemp("data")
    images = {
        "digits": ((1, 8, 8), 10),
        "fashion": ((1, 28, 28), 10),
        "cifar100": ((3, 32, 32), 100),
        "cifar10": ((3, 32, 32), 10),
        "tiny-imagenet": ((3, 64, 64), 200),
    }
    for name, (shape, classes) in images.items():
        write_npz(root / f"{name}.npz", shape, classes)
    for end in ("", "_test"):
        np.save(root / f"latents{end}.npy", np.zeros((4, 4, 32, 32), np.float32))
        np.save(root / f"latents{end}_labels.npy", np.arange(4))
    random = np.random.default_rng(0)
    texts = {"shakespeare": 27, "text8": 27, "lm1b": 32_000, "owt": 50_257}
    for name, words in texts.items():
        of_split = {split: [random.integers(27, size=2100)] for split in ("train", "test")}
        write_tokens(root / name, of_split, vocabulary=words)
    names = [*(f"{name}.npz" for name in images), "latents.npy", *texts]
    return tuple(f"{name.partition('.')[0]}={root / name}" for name in names)


@pytest.fixture
def study(bench, places, tmp_path, monkeypatch):
    """Runs a study of small models; gives the rows."""
    module, scales = bench("study"), bench("studies.scales")
    of_images = [scales.Setting("digits", 4, 3, 0.05, 2, SMALL)]
    of_text = scales.Setting("shakespeare", 4, 3, 0.1, 2, TEXT, FITTED)
    drawn = [replace(each, flags=f"{SMALL} --label-drop 0.1") for each in of_images]
    small = {"vit": of_images, "dit": drawn, "mdm": [of_text], "ar": [of_text]}
    small["huginn"] = [replace(of_text, blocks=1)]
    monkeypatch.setitem(scales.SETTINGS, "tiny", scales.SETTINGS["tiny"] | small)
    monkeypatch.setitem(bench("studies.conversion").ON, "tiny", 1)
    monkeypatch.setattr(bench("judge"), "STEPS", 1)
    monkeypatch.setattr(bench("judge"), "PASSES", 0)
    measuring = bench("studies.measuring")
    # none is the default, and there are more images and windows
    sizes = measuring.Sizes(images=8, starts=2, drawn=10, levels=3, windows=2)
    jobs = module.Run._jobs

    def quick(self, arms):
        return [replace(job, sizes=sizes) for job in jobs(self, arms)]

    monkeypatch.setattr(module.Run, "_jobs", quick)

    def run(name, **options):
        out = tmp_path / "rows.jsonl"
        told = {"seeds": 1, "data": places, "runs": tmp_path / "runs", "processes": 1, "out": out}
        module.Run(name, **told | options).run()
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run
