import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from dbkernels.cli.profile import Profile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def every(bench):
    """Jobs on a GPU, and of a rehearsal."""
    module = bench("gpu_jobs")
    return [*module.jobs(module.GPU), *module.jobs(module.REHEARSAL)]


def test_every_program_takes_its_arguments(bench, every):
    """It refuses here, with its own checks, what it would refuse there."""
    for job in every:
        program, *arguments = job.command
        if program.startswith("benchmarks/"):
            options = bench(Path(program).stem).Options
            tyro.cli(options, args=[*arguments, "--device", "cpu"])
    profiles = [job.command for job in every if "profile" in job.command]
    assert [command[:3] for command in profiles] == [("-m", "dbkernels", "profile")] * 2
    for command in profiles:
        assert tyro.cli(Profile, args=list(command[3:])).measure


def test_a_rehearsal_runs_the_same_programs_in_the_same_order(bench):
    module = bench("gpu_jobs")
    there, here = module.jobs(module.GPU), module.jobs(module.REHEARSAL)
    for a, b in zip(there, here, strict=True):
        assert (a.part, a.file, a.command[0]) == (b.part, b.file, b.command[0])
        flags = [{word for word in job.command if word.startswith("--")} for job in (a, b)]
        extra = {"--device", "--threads", "--rehearse", "--samples"}
        assert flags[0] <= flags[1] <= flags[0] | extra


def test_the_limits_of_jobs_are_those_of_their_parts_and_of_eight_minutes(bench):
    module = bench("gpu_jobs")
    found = dict.fromkeys(module.LIMITS, 0)
    for job in module.jobs(module.GPU):
        found[job.part] += job.seconds
    assert found == module.LIMITS and sum(found.values()) <= 480
    assert list(found) == ["smoke", "headline", "kernels", "rest"]


def test_the_headline_has_every_way_with_the_largest_model_first(bench):
    module, training = bench("gpu_jobs"), bench("training")
    (job,) = [job for job in module.jobs(module.GPU) if job.part == "headline"]
    options = tyro.cli(training.Options, args=list(job.command[1:]))
    cases = options.cases()
    assert [(case.preset, case.batch, case.dtype) for case in cases] == [
        ("XL/2", 64, "autocast"),
        ("L/2", 64, "autocast"),
    ]
    ways = options.ways(cases[0])
    fused = [(way.num_blocks, way.recompute) for way in ways if way.method == "block_fused"]
    policies = ("none", "qkv", "layer")
    both = [(count, recompute) for count in (1, 2, 3, 4, 6) for recompute in policies]
    assert set(fused) == set(both) and len(fused) == len(both) + 3
    offload = {(way.num_blocks, way.recompute) for way in ways if way.offload == "cpu"}
    assert offload == {(3, recompute) for recompute in policies}
    others = [way.method for way in ways if way.method != "block_fused"]
    assert others == ["end_to_end", "checkpointed", "compiled"] and options.nearest == "none"
    assert ways[0].method == "end_to_end"


def test_a_part_that_is_unknown_is_refused():
    command = [sys.executable, "benchmarks/gpu_jobs.py", "smoke", "all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "a part must be one of smoke, headline, kernels, rest, got all\n"


def test_files_of_gpu_tests_are_found(bench):
    found = bench("gpu_jobs").marked()
    assert {"tests/ops/test_on_gpu.py", "tests/training/test_on_gpu.py"} <= set(found)
