"""Every benchmark refuses what it cannot run, in a sentence, before anything runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFUSED = {
    "layer": [
        ({"B": 0}, "B must be at least 1, got 0"),
        ({"rounds": 1}, "rounds must be at least 2, got 1"),
        ({"num_heads": 2}, "num_heads must be given together with dim, got num_heads alone"),
        ({"dim": 64, "num_heads": 3}, "num_heads must divide dim = 64, got 3"),
        ({"dim": 30, "num_heads": 4}, "num_heads must divide dim = 30, got 4"),
        ({"budgets": (0.5, 1.5)}, "budgets must be from 0 to 1, got 1.5"),
        ({"dtype": ("float8",)}, "dtype must be of float32, .*, got float8"),
        ({"impls": ("jax",)}, "impls must be of eager, .*, got jax"),
        ({"target": "v100"}, "target must be one of .*, got v100"),
    ],
    "ops": [
        ({"op": ("norm",)}, "op must be of adaln_norm, .*, got norm"),
        ({"dim": (96,)}, "dim must be a multiple of 64, got 96"),
        ({"rounds": 1}, "rounds must be at least 2, got 1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"stream": ("half",)}, "stream must be of same, float32, got half"),
    ],
    "timeline": [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"dtype": "float16"}, "dtype must be of float32, autocast, got float16"),
        ({"recompute": "all"}, "recompute must be of none, attention, .*, got all"),
        ({"offload": "some"}, "offload must be of none, cpu, got some"),
        ({"methods": ("fused",)}, "methods must be of end_to_end, .*, got fused"),
        ({"budget": 2.0}, "budget must be from 0 to 1, got 2.0"),
        ({"num_blocks": 29}, "num_blocks must be between 1 and the 28 layers, got 29"),
        ({"preset": "huge"}, "preset of DiT must be one of .*, got huge"),
        ({"target": "v100"}, "target must be one of .*, got v100"),
    ],
    "training": [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"methods": ("sgd",)}, "methods must be of end_to_end, .*, got sgd"),
        ({"recompute": ("all",)}, "recompute must be of none, .*, got all"),
        ({"dtype": ("float16",)}, "dtype must be of float32, autocast, got float16"),
        ({"offload": ("host",)}, "offload must be of none, cpu, got host"),
        ({"offload": ("cpu",)}, "offload must be none on a CPU, .* got cpu"),
        ({"launch": ("graph",)}, "launch must be ops on a CPU, got graph"),
        ({"nearest": "all", "beside": True}, "nearest must be of none, .* got all"),
        ({"nearest": "none"}, "nearest must be of none, .* come with beside, got none"),
        ({"budgets": (1.5,)}, "budgets must be from 0 to 1, got 1.5"),
        ({"num_blocks": (0,)}, "num_blocks must be between 1 and the 12 layers, got 0"),
        ({"num_blocks": (13,)}, "num_blocks must be between 1 and the 12 layers, got 13"),
        ({"rounds": 5, "num_blocks": (3,)}, "rounds must be at least 6, two .*, got 5"),
        ({"preset": ("S/2",)}, "preset must be given together with family, got S/2"),
        ({"family": "vit", "preset": ("huge",)}, "preset of ViT must be one of .*, got huge"),
        ({"family": "cnn"}, "family must be of vit, dit, .*, got cnn"),
        ({"target": "tpu"}, "target must be one of cpu, a100, .*, got tpu"),
    ],
    "run": [
        ({"quick": True, "full": True}, "a run must be quick or full, got both"),
        ({"threads": -1}, "threads must be at least 0, got -1"),
    ],
}
CASES = [(program, *case) for program, cases in REFUSED.items() for case in cases]
CASES += [(p, {"device": "tpu"}, "device must be auto, cpu or cuda, got tpu") for p in REFUSED]


@pytest.mark.parametrize(("program", "options", "message"), CASES)
def test_options_are_refused_in_a_sentence(bench, program, options, message):
    kind = bench(program).Run if program == "run" else bench(program).Options
    with pytest.raises(ValueError, match=message):
        kind(**{"device": "cpu", **options})


def test_a_command_that_is_refused_ends_with_two_and_the_sentence():
    command = [sys.executable, "benchmarks/ops.py", "--dim", "96", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "dim must be a multiple of 64, got 96" in done.stderr + done.stdout
