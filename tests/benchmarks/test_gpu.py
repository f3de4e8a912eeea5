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


@pytest.fixture
def jobs(bench):
    """Jobs on a GPU, and of a rehearsal."""
    module = bench("gpu_jobs")
    return module.jobs(module.GPU), module.jobs(module.REHEARSAL)


def test_every_program_takes_its_arguments(bench, jobs):
    """It refuses here, with its own checks, what it would refuse there."""
    measured = []
    for job in [*jobs[0], *jobs[1]]:
        program, *arguments = shlex.split(job.command)
        if program.startswith("benchmarks/"):
            options = bench(Path(program).stem).Options
            tyro.cli(options, args=[*arguments, "--device", "cpu"])
        elif arguments[:2] == ["dbkernels", "profile"]:
            measured.append(tyro.cli(Profile, args=arguments[2:]).measure)
    assert measured == [True, True]


def test_a_rehearsal_runs_the_same_programs_in_the_same_order(jobs):
    extra = {"--device", "--threads", "--rehearse", "--samples"}
    for a, b in zip(*jobs, strict=True):
        there, here = a.command.split(), b.command.split()
        assert (a.part, a.file, there[0]) == (b.part, b.file, here[0])
        there, here = ({word for word in words if word[:2] == "--"} for words in (there, here))
        assert there <= here <= there | extra


def test_the_limits_of_jobs_are_those_of_their_parts_and_of_eight_minutes(bench, jobs):
    module = bench("gpu_jobs")
    found = dict.fromkeys(module.LIMITS, 0)
    for job in jobs[0]:
        found[job.part] += job.seconds
    assert found == module.LIMITS and sum(found.values()) <= 480
    assert list(found) == ["smoke", "headline", "kernels", "rest"]


def test_the_headline_has_every_way_of_the_largest_model_and_a_language_model(bench, jobs):
    job, text = [job for job in jobs[0] if job.part == "headline"]
    options = tyro.cli(bench("training").Options, args=job.command.split()[1:])
    models = options.models()
    about = [(model.preset, model.batch_size, model.autocast) for model in models]
    assert about == [("XL/2", 64, True)]
    ends = ("eager", "checkpointed, every layer", "torch.compile, budget 1")
    eager, checkpointed, compiled = (f"XL/2, {end}, end to end" for end in ends)
    cuts = ("end to end", "2 blocks", "3 blocks", "3 blocks, offload", "4 blocks", "6 blocks")
    fused = [f"XL/2, fused layers, {p}, {cut}" for cut in cuts for p in ("none", "qkv", "layer")]
    named = [bench("training_step").named(way) for way in options.ways(models[0])]
    assert named == [eager, checkpointed, *fused, compiled] and options.nearest == "none"
    # and the ordinary language model beside a block of one
    options = tyro.cli(bench("training").Options, args=text.command.split()[1:])
    (model,) = options.models()
    ways = [(way.method, way.num_blocks, way.objective) for way in options.ways(model)]
    assert ways == [
        *((method, 1, "conventional") for method in ("end_to_end", "checkpointed")),
        ("block_fused", 4, "blocks"),
        ("compiled", 1, "conventional"),
    ]


def test_files_of_gpu_tests_are_found(bench):
    found = bench("gpu_jobs").marked()
    assert {"tests/ops/test_on_gpu.py", "tests/training/test_on_gpu.py"} <= set(found)


def test_an_unknown_part_is_refused(bench):
    with pytest.raises(SystemExit, match=r"a part must be one of smoke, .*, got everything"):
        bench("gpu_jobs").main(["--rehearse", "everything"])


# the estimate


def test_all_parts_together_take_less_than_eight_minutes_and_each_less_than_its_limit(bench):
    found, limits = bench("gpu_jobs").seconds(), bench("gpu_jobs").LIMITS
    assert found.keys() == limits.keys() and sum(found.values()) < 480
    assert all(0 < seconds < limits[part] for part, seconds in found.items())


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [("TRITON", 20.0, "kernels"), ("FLOPS", 1.0e13, "headline"), ("NVCC", 200.0, "smoke"),
     ("PREDICTION", 100.0, "rest")],
)  # fmt: skip
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
    longer = {part for part, seconds in module.seconds().items() if seconds > before[part]}
    assert longer == {"headline", "kernels", "rest"}


def test_the_parts_asked_for_are_printed(bench, capsys):
    bench("gpu_jobs").main(["--estimate", "smoke"])
    printed = capsys.readouterr().out
    assert "smoke: about" in printed and "headline" not in printed and "estimated" in printed


# the table


@pytest.fixture
def table(bench, tmp_path):
    """The table of a run that was cut off in the headline, or of rows of it."""

    def lines(*ran, headline=None):
        about = {"num_blocks": (1, 3), "preset": "XL/2"}, {"num_blocks": (1,), "preset": "L/2"}
        rows = [row | ABOUT for more in about for row in made.training_rows(made.GPU, **more)]
        path = made.write(tmp_path / "headline.jsonl", headline or rows)
        path.write_text(path.read_text() + json.dumps(rows[0])[:100])
        if headline is None:
            op = next(made.ops_rows(made.GPU)) | {"share_of_copy": 0.9}
            ops = [op | {"shape": [32, 256, D]} for D in (384, 1152)]
            made.write(tmp_path / "kernels.jsonl", ops)
        failed = "[gw0] [ 50%] FAILED tests/a.py::test_x[1]\ntests/b.py::test_y ERROR  [100%]"
        (tmp_path / "tests.txt").write_text(f"{failed}\n=== 1 failed, 1 error in 2.0s ===\n")
        return bench("gpu_table").table(tmp_path, ran)

    return lines


def test_names_what_ran_what_failed_and_where(table):
    ran = "smoke/tests.txt\tfailed with 1 in 2 s"
    *lines, where = table(ran)[:5]
    tests = ["tests: 2 failed; 1 failed, 1 error in 2.0s", "  tests/a.py::test_x[1]"]
    assert lines == [ran, *tests, "  tests/b.py::test_y"]
    assert "NVIDIA H100 80GB HBM3, commit abc1234, copies 2900 GB/s" in where


def test_presets_and_widths_are_beside_each_other(table):
    lines = table()
    (way,) = [line for line in lines if line.startswith("fused layers, qkv, end to end ")]
    assert way.count(" 1.00 ") == 2  # GiB that were predicted
    (alone,) = [line for line in lines if line.startswith("fused layers, qkv, 3 blocks, offload")]
    assert alone.rstrip().endswith("–")
    (op,) = [line for line in lines if line.startswith("adaln_norm forward")]
    assert "384: " in op and "1152: " in op and op.count("90 %") == 2


def test_a_row_with_times_replaces_that_of_its_memory(table):
    row = next(made.training_rows(made.GPU)) | ABOUT
    lines = table(headline=[row | {"sweep_ms": None}, row | {"sweep_ms": 71.25}])
    (line,) = [line for line in lines if line.startswith("eager, end to end")]
    assert " 71.2 " in line


def test_it_has_sixty_lines_at_most_and_may_have_one(bench, table, tmp_path):
    lines = table(*(f"job {number}" for number in range(70)))
    assert len(lines) == 60 and lines[-1].endswith(f"more lines are in {tmp_path}")
    assert bench("gpu_table").table(tmp_path / "none", ["ran"]) == ["ran"]


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
*gpu_jobs.py*|*gpu_table.py*|-c*) ;;
*benchmarks/ops.py*) echo '{"half": 1}'; echo 'no such kernel' >&2; exit 3;;
*profile*) exit 124;;
*) exit 0;;
esac"""
# and in place of the list of jobs, which takes seconds
JOB = r"*gpu_jobs.py*) printf 'rest\tprofile.ndjson\t250\tprofile\n'; exit 0;;"
ONE_JOB = STUB.replace("*gpu_jobs.py*|*gpu_table.py*|-c*) ;;", JOB)


def test_jobs_that_fail_are_named_and_the_others_run(gpu_sh):
    done = gpu_sh("--rehearse", "kernels", "rest", stub=STUB)
    assert done.returncode == 1 and "no such kernel" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Failed:") and "smoke/" not in done.stdout
    assert {"kernels/kernels.jsonl", "rest/profile.ndjson"} <= set(last.split())
    assert re.search(r"kernels/kernels.jsonl\tfailed with 3 in \d+ s", done.stdout)
    assert re.search(r"rest/graphs.jsonl\tdone in \d+ s", done.stdout)
    assert "rest/profile.ndjson\tcut off at its limit of 250 s" in done.stdout
    assert "about" in done.stdout.splitlines()[0]  # the estimate


def test_whoever_has_more_minutes_says_so(gpu_sh, monkeypatch):
    monkeypatch.setenv("PATIENCE", "2")
    done = gpu_sh("--rehearse", "rest", stub=ONE_JOB)
    assert "rest/profile.ndjson\tcut off at its limit of 500 s" in done.stdout


def test_a_rehearsal_leaves_nothing_among_the_results(gpu_sh):
    before = sorted((ROOT / "benchmarks" / "results").rglob("*"))
    assert gpu_sh("--rehearse", "rest", stub=ONE_JOB.replace("exit 124", "exit 0")).returncode == 0
    assert sorted((ROOT / "benchmarks" / "results").rglob("*")) == before


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
    chosen = ["tests/training/test_on_gpu.py", "-k", "locked_pages or captured_again"]
    code, text = run_tests("--rehearse", "-m", "gpu", *chosen)
    assert code == 0 and "1 passed, 1 skipped" in text
    assert "needs a GPU: pages that CUDA locks" in text
    assert "needs a GPU, so not rehearsed: 1 tests" in text


def test_without_being_asked_no_test_marked_gpu_runs():
    code, text = run_tests("tests/training/test_on_gpu.py")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED and "deselected" in text
    assert "rehearsed" not in text
