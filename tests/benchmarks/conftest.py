import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dbkernels.ops.backend import library

# without compiled kernels there is nothing there to compare
SERVED = library.serves("gated_adaln_norm_bwd", torch.device("cpu"))
collect_ignore = [] if SERVED else ["test_ratios.py"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def bench():
    """Import one of the benchmarks' files, which stand beside each other and are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        # folders of tests have these names too, and may have been imported by them
        for name in ("ops", "training"):
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module


@pytest.fixture(scope="session")
def layer_rows():
    """The lines that a small case of `benchmarks/layer.py` prints."""
    sizes = (
        "--B 2 --T 32 --dim 64 --num-heads 2 --hidden 256 --dtype float32 --device cpu --threads 1"
    )
    command = [sys.executable, str(ROOT / "benchmarks" / "layer.py"), "--json", "--rounds", "2"]
    command += [*sizes.split(), "--impls", "eager", "fused", "checkpointed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def small_case(bench):
    """A layer and its inputs."""
    case = bench("layer_case").LayerCase(B=2, T=8, dim=16, num_heads=2, hidden=64, dtype="float32")
    return case, bench("layer_case").make_inputs(case, torch.device("cpu"))
