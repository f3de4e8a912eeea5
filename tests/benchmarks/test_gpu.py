"""The minutes of a GPU: their jobs, an estimate of them, what they found, and their rehearsal."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import benchmark_rows as made
import pytest
import torch
import tyro

from dbkernels.cli.profile import Profile

ROOT = Path(__file__).parents[2]
ABOUT = made.GPU | {"predicted_peak_allocated_bytes": 2**30, "swap_ms": None}


def ops_row(shape=(32, 256, 384), dtype="bfloat16", **changes):
    row = next(iter(made.ops_rows(made.GPU)))
    return row | {"shape": list(shape), "dtype": dtype, "share_of_copy": 0.9} | changes


@pytest.fixture
def every(bench):
    """Jobs on a GPU, and of a rehearsal."""
    module = bench("gpu_jobs")
    return [*module.jobs(module.GPU), *module.jobs(module.REHEARSAL)]


def test_every_program_takes_its_arguments(bench, every):
    """It refuses here, with its own checks, what it would refuse there."""
    for job in every:
        program, *arguments = shlex.split(job.command)
        if program.startswith("benchmarks/"):
            options = bench(Path(program).stem).Options
            tyro.cli(options, args=[*arguments, "--device", "cpu"])
    profiles = [shlex.split(job.command) for job in every if " profile " in job.command]
    assert [command[:3] for command in profiles] == [["-m", "dbkernels", "profile"]] * 2
    for command in profiles:
        assert tyro.cli(Profile, args=list(command[3:])).measure


def test_a_rehearsal_runs_the_same_programs_in_the_same_order(bench):
    module = bench("gpu_jobs")
    there, here = module.jobs(module.GPU), module.jobs(module.REHEARSAL)
    for a, b in zip(there, here, strict=True):
        words = [job.command.split() for job in (a, b)]
        assert (a.part, a.file, words[0][0]) == (b.part, b.file, words[1][0])
        flags = [{word for word in each if word.startswith("--")} for each in words]
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
    options = tyro.cli(training.Options, args=job.command.split()[1:])
    models = options.models()
    assert [(m.preset, m.batch_size, m.autocast) for m in models] == [
        ("XL/2", 64, True),
        ("L/2", 64, True),
    ]
    ways = options.ways(models[0])
    fused = [(way.num_blocks, way.recompute) for way in ways if way.method == "block_fused"]
    policies = ("none", "qkv", "layer")
    both = [(count, recompute) for count in (1, 2, 3, 4, 6) for recompute in policies]
    assert set(fused) == set(both) and len(fused) == len(both) + 3
    offload = {(way.num_blocks, way.recompute) for way in ways if way.offload == "cpu"}
    assert offload == {(3, recompute) for recompute in policies}
    others = [way.method for way in ways if way.method != "block_fused"]
    assert others == ["end_to_end", "checkpointed", "compiled"] and options.nearest == "none"
    assert ways[0].method == "end_to_end"


def test_files_of_gpu_tests_are_found(bench):
    found = bench("gpu_jobs").marked()
    assert {"tests/ops/test_on_gpu.py", "tests/training/test_on_gpu.py"} <= set(found)


# the estimate


def test_all_parts_together_take_less_than_eight_minutes_and_each_less_than_its_limit(bench):
    module = bench("gpu_jobs")
    found, limits = module.seconds(), module.LIMITS
    assert found.keys() == limits.keys()
    assert sum(found.values()) < 480
    for part, seconds in found.items():
        assert 0 < seconds < limits[part]


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("TRITON", 20.0, "kernels"),
        ("FLOPS", 1.0e13, "headline"),
        ("NVCC", 200.0, "smoke"),
        ("PREDICTION", 100.0, "rest"),
    ],
)
def test_what_takes_longer_makes_its_part_longer(bench, monkeypatch, name, value, part):
    module = bench("gpu_jobs")
    before = module.seconds()[part]
    monkeypatch.setattr(module, name, value)
    assert module.seconds()[part] > before + 10


def test_more_rounds_and_kernels_are_counted(bench, monkeypatch):
    module = bench("gpu_jobs")
    before = module.seconds()
    wider = replace(module.GPU, rounds=48, widths=(384, 768, 1024, 1152, 1536))
    monkeypatch.setattr(module, "GPU", wider)
    after = module.seconds()
    assert after["headline"] > before["headline"] and after["kernels"] > before["kernels"]
    assert after["smoke"] == before["smoke"]


def test_the_parts_asked_for_are_printed(bench, capsys):
    bench("gpu_jobs").main(["--estimate", "smoke"])
    printed = capsys.readouterr().out
    assert "smoke: about" in printed and "headline" not in printed and "estimated" in printed


# the table


@pytest.fixture
def folder(tmp_path):
    """Of a run that was cut off in the headline."""
    rows = [row | ABOUT for row in made.training_rows(made.GPU, num_blocks=(1, 3), preset="XL/2")]
    rows += [row | ABOUT for row in made.training_rows(made.GPU, num_blocks=(1,), preset="L/2")]
    made.write(tmp_path / "headline.jsonl", rows)
    with (tmp_path / "headline.jsonl").open("a") as file:
        file.write(json.dumps(rows[0])[:100])
    widths = (384, 1152)
    made.write(tmp_path / "kernels.jsonl", [ops_row((32, 256, D)) for D in widths])
    lines = ["[gw0] [ 50%] FAILED tests/a.py::test_x[1]", "tests/b.py::test_y ERROR  [100%]"]
    (tmp_path / "tests.txt").write_text("\n".join([*lines, "=== 1 failed, 1 error in 2.0s ==="]))
    return tmp_path


def test_names_what_ran_what_failed_and_where(bench, folder):
    lines = bench("gpu_table").table(folder, ["smoke/tests.txt\tfailed with 1 in 2 s"])
    assert lines[:4] == [
        "smoke/tests.txt\tfailed with 1 in 2 s",
        "tests: 2 failed; 1 failed, 1 error in 2.0s",
        "  tests/a.py::test_x[1]",
        "  tests/b.py::test_y",
    ]
    assert "NVIDIA H100 80GB HBM3, commit abc1234, copies 2900 GB/s" in lines[4]


def test_presets_and_widths_are_beside_each_other(bench, folder):
    lines = bench("gpu_table").table(folder, [])
    (way,) = [line for line in lines if line.startswith("fused qkv, 1 ")]
    assert way.count(" 1.00 ") == 2  # GiB that were predicted
    (alone,) = [line for line in lines if line.startswith("fused qkv offload cpu, 3")]
    assert alone.rstrip().endswith("–")
    (op,) = [line for line in lines if line.startswith("adaln_norm forward")]
    assert "384: " in op and "1152: " in op and op.count("90 %") == 2


def test_a_row_with_times_replaces_that_of_its_memory(bench, tmp_path):
    row = next(made.training_rows(made.GPU)) | ABOUT
    made.write(tmp_path / "headline.jsonl", [row | {"sweep_ms": None}, row | {"sweep_ms": 71.25}])
    lines = bench("gpu_table").table(tmp_path, [])
    assert sum("end to end" in line for line in lines) == 1
    assert any(" 71.2 " in line for line in lines)


def test_it_has_sixty_lines_at_most(bench, folder):
    ran = [f"job {number}" for number in range(70)]
    lines = bench("gpu_table").table(folder, ran)
    assert len(lines) == 60 and lines[-1].endswith(f"more lines are in {folder}")


def test_a_folder_with_nothing_is_a_table_too(bench, tmp_path):
    assert bench("gpu_table").table(tmp_path, ["ran"]) == ["ran"]


# the script


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs the script with a python that has other options, or answers a benchmark itself."""

    def run(*words, options="", stub=""):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/bash\n{stub}\nexec {sys.executable} {options} "$@"\n')
        python.chmod(0o755)
        env = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
        command = ["bash", str(ROOT / "tools" / "gpu.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    return run


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("-S", "gpu.sh needs packages that .* lacks, .* tools/gpu_wheels.sh fetches: .*tyro"),
        ("", "gpu.sh needs an NVIDIA GPU"),
    ],
)
def test_says_what_is_missing(gpu_sh, options, sentence):
    done = gpu_sh(options=options)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(sentence, done.stderr)


# in the benchmarks' place: one writes a row and fails, one takes too long, the others do nothing
STUB = """case "$*" in
*benchmarks/training.py*S/2*|*gpu_jobs.py*|*gpu_table.py*|-c*) ;;
*benchmarks/ops.py*) echo '{"half": 1}'; echo 'no such kernel' >&2; exit 3;;
*) exit 0;;
esac"""


def test_a_job_that_fails_is_named_and_the_others_run(gpu_sh):
    done = gpu_sh("--rehearse", "kernels", "rest", stub=STUB.replace("S/2", "none"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Failed: kernels/kernels.jsonl")
    assert "no such kernel" in done.stderr
    assert re.search(r"kernels/kernels.jsonl\tfailed with 3 in \d+ s", done.stdout)
    assert re.search(r"rest/profile.ndjson\tdone in \d+ s", done.stdout)
    assert "smoke/" not in done.stdout
    assert "about" in done.stdout.splitlines()[0]  # the estimate


@pytest.mark.parametrize(("patience", "limit"), [(None, 900), ("2", 1800)])
def test_whoever_has_more_minutes_says_so(gpu_sh, monkeypatch, patience, limit):
    if patience:
        monkeypatch.setenv("PATIENCE", patience)
    done = gpu_sh("--rehearse", "kernels", stub=STUB.replace("exit 3", "exit 124"))
    assert f"kernels/kernels.jsonl\tcut off at its limit of {limit} s" in done.stdout


def test_a_rehearsal_leaves_nothing_among_the_results(gpu_sh):
    before = sorted((ROOT / "benchmarks" / "results").rglob("*"))
    assert gpu_sh("--rehearse", "rest", stub=STUB.replace("S/2", "none")).returncode == 0
    assert sorted((ROOT / "benchmarks" / "results").rglob("*")) == before


def test_an_unknown_part_is_refused(gpu_sh):
    done = gpu_sh("--rehearse", "everything")
    assert done.returncode == 1 and "a part must be one of smoke" in done.stderr


def test_wheels_are_of_the_machines_python_and_from_no_named_host():
    text = (ROOT / "tools" / "gpu_wheels.sh").read_text()
    assert "--python-version 3.12" in text and "--no-deps" in text and "://" not in text
    assert ".whl/" in (ROOT / ".gitignore").read_text().split()


# tests marked gpu


def run_tests(*options):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_a_rehearsal_runs_what_it_can_and_names_and_counts_the_rest():
    chosen = ["tests/training/test_on_gpu.py", "-k", "locked_pages or survives_a_swap"]
    code, text = run_tests("--rehearse", "-m", "gpu", *chosen)
    assert code == 0 and "1 passed, 1 skipped" in text
    assert "needs a GPU: pages that CUDA locks" in text
    assert "needs a GPU, so not rehearsed: 1 tests" in text


def test_without_being_asked_no_test_marked_gpu_runs():
    code, text = run_tests("tests/training/test_on_gpu.py")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED and "deselected" in text
    assert "rehearsed" not in text
