import importlib
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from baseline_case import DATA, VIT

from dbkernels.ops.backend import library

# without compiled kernels there is nothing there to compare
SERVED = library.serves("gated_adaln_norm_bwd", torch.device("cpu"))
collect_ignore = [] if SERVED else ["test_ratios.py"]
ROOT = Path(__file__).parents[2]
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
            if Path(getattr(module, "__file__", None) or "").parent == ROOT / "benchmarks":
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
