import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")


def test_a_device_names_its_folder(bench, monkeypatch):
    machine = bench("machine")
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert machine.folder_name(CPU) == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(
    ("status", "expected"), [("", "abc"), (" M x", "abc+dirty"), (None, "abc")]
)
def test_a_commit_says_that_files_differ_from_it(bench, monkeypatch, status, expected):
    machine = bench("machine")
    git = {"--show-toplevel": str(ROOT), "--short": "abc", "--porcelain": status}
    monkeypatch.setattr(machine, "_output", lambda *command: git[command[4]])
    monkeypatch.setenv("DBKERNELS_COMMIT", "0000000")
    assert machine.commit() == expected


@pytest.mark.parametrize("top", [None, "/"])
@pytest.mark.parametrize("told", ["1a2b3c4", "1a2b3c4+dirty", None])
def test_where_no_git_is_a_commit_is_told(bench, monkeypatch, top, told):
    machine = bench("machine")
    monkeypatch.setattr(machine, "_output", lambda *command: top)
    monkeypatch.setenv("DBKERNELS_COMMIT", told or "")
    assert machine.commit() == told


def test_what_is_told_must_be_a_commit(bench, monkeypatch):
    machine = bench("machine")
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    monkeypatch.setenv("DBKERNELS_COMMIT", "main")
    with pytest.raises(ValueError, match="must be a commit such as 1a2b3c4, got 'main'"):
        machine.commit()


def test_a_program_that_is_missing_or_fails_says_nothing(bench):
    machine = bench("machine")
    assert machine._output("no-such-program") is None
    assert machine._output("false") is None
    assert machine._output("echo", "a") == "a"


def test_a_table_has_a_row_for_each_competitor_and_its_ratio_to_eager(bench, layer_rows, capsys):
    rows = [dict(row) for row in layer_rows]
    rows[0] |= {"median_ms": 2.0, "peak_bytes": 2**20}
    rows[1] |= {"median_ms": 3.0, "peak_bytes": 2**19, "timing": "cuda events"}
    bench("show").show(rows)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "fused none" in line)
    assert "fused none (cuda events)" in line and " 1.50 " in line
    assert " 0.5 │" in line and " 0.50 │" in line
    assert sum(line.startswith("│ fused") for line in lines) == 5
    assert any(rows[0]["device"] in line for line in lines)
    bench("show").show(rows[1:2])
    assert " – " in capsys.readouterr().out


def test_a_file_of_results_is_shown_case_by_case(bench, layer_rows, tmp_path, capsys):
    path = tmp_path / "layer.jsonl"
    rows = [*layer_rows, *({**row, "dim": 65} for row in layer_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench("show").main([str(path)])
    out = capsys.readouterr().out
    assert out.count("dim = 64") == out.count("dim = 65") == 1


def test_the_folder_of_results_is_told_to_other_programs(bench):
    command = [sys.executable, "benchmarks/machine.py", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    machine = bench("machine")
    expected = {"device": machine.folder_name(CPU), "commit": machine.commit()}
    assert json.loads(done.stdout) == expected


def test_a_ceiling_is_the_higher_of_two_measurements(bench):
    Ceilings = bench("machine").Ceilings
    assert bench("machine").faster(Ceilings(1, 4), Ceilings(2, 3)) == Ceilings(2, 4)
