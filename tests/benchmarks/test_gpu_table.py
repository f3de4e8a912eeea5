import json

import benchmark_rows as made
import pytest

ABOUT = made.GPU | {"predicted_peak_allocated_bytes": 2**30, "swap_ms": None}


def ops_row(shape=(32, 256, 384), dtype="bfloat16", **changes):
    row = next(iter(made.ops_rows(made.GPU)))
    return row | {"shape": list(shape), "dtype": dtype, "share_of_copy": 0.9} | changes


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
    assert sum("end_to_end" in line for line in lines) == 1
    assert any(" 71.2 " in line for line in lines)


def test_it_has_sixty_lines_at_most(bench, folder):
    ran = [f"job {number}" for number in range(70)]
    lines = bench("gpu_table").table(folder, ran)
    assert len(lines) == 60 and lines[-1].endswith(f"more lines are in {folder}")


def test_a_folder_with_nothing_is_a_table_too(bench, tmp_path):
    assert bench("gpu_table").table(tmp_path, ["ran"]) == ["ran"]
