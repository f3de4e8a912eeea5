"""Rows of benchmarks: where they were measured, and how they are written, read and shown."""

import json
from pathlib import Path

import pytest
import torch

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
GELU = "--op gelu --dim 64 --rounds 2 --device cpu --threads 1 --impls"


def test_a_file_is_gone_on_with_and_what_it_has_is_not_measured_again(
    bench, run_main, monkeypatch, tmp_path
):
    out = tmp_path / "new" / "ops.jsonl"
    monkeypatch.setattr(bench("machine"), "commit", lambda: "abc1234")
    monkeypatch.setattr(bench("op_case"), "T", 8)
    assert "gelu fwd" in run_main("ops", f"{GELU} eager --out {out}")
    first = out.read_text()
    with out.open("a") as file:
        file.write(first[:30])  # a run was stopped while it wrote
    printed = run_main("ops", f"{GELU} eager fused --json --out {out}").splitlines()
    rows = [json.loads(line) for line in printed]
    assert [row["impl"] for row in rows] == ["fused", "fused"]
    assert {row["command"] for row in rows} == {f"python benchmarks/ops.py {GELU} eager fused"}
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert out.read_text() == first + "".join(line + "\n" for line in printed)
    assert run_main("ops", f"{GELU} eager fused --out {out}") == ""
    # of another commit a row is another row
    monkeypatch.setattr(bench("machine"), "commit", lambda: "abc1235")
    assert len(run_main("ops", f"{GELU} eager --json --out {out}").splitlines()) == 2


def test_a_row_counts_for_its_case_commit_and_device_and_once_it_has_its_times(bench, tmp_path):
    key = {"shape": (2, 8), "budget": 1 / 3, "device": "EPYC"}
    row = {"shape": [2, 8], "budget": 0.333333, "device": "EPYC", "commit": "abc"}
    path, known = tmp_path / "rows.jsonl", bench("program").Known

    def lacks(row, key=key, commit="abc"):
        path.write_text(json.dumps(row) + "\n")
        return known(path, commit).lacks(key)

    assert not lacks(row)
    assert lacks(row, commit="abd") and lacks(row, key | {"device": "H100"})
    assert lacks(row, key | {"shape": (2, 9)}) and lacks(row, key | {"launch": "ops"})
    assert lacks(row | {"memory": "measured", "step_ms": None})
    assert not lacks(row | {"memory": "measured", "step_ms": 1.0})
    assert not lacks(row | {"memory": "predicted", "step_ms": None})


@pytest.mark.parametrize("line", ["half a r", "[1]", '"row"'])
def test_a_file_that_holds_no_rows_is_refused_with_its_line(run_main, tmp_path, line):
    out = tmp_path / "rows.jsonl"
    out.write_text(f'{{"row": 1}}\n{line}\n')
    with pytest.raises(SystemExit, match=r"rows.jsonl:2: a line must be one JSON object, got '"):
        run_main("ops", f"{GELU} eager --out {out}")
    assert out.read_text() == f'{{"row": 1}}\n{line}\n'


@pytest.mark.parametrize(
    "words",
    ["--family vit", "--json --family vit", "--family vit --out a.jsonl", "--out=a --family vit"],
)
def test_the_command_of_a_row_prints_a_table_when_it_is_repeated(bench, monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["/a/b/training.py", *words.split()])
    assert bench("program").called() == "python benchmarks/training.py --family vit"


def test_results_of_older_programs_can_be_shown(bench, capsys):
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.jsonl")):
        bench("show").main((path,))
        assert "─" in capsys.readouterr().out


def test_a_table_has_a_row_for_each_competitor_and_its_ratio_to_eager(bench, layer_rows, capsys):
    rows = [dict(row) for row in layer_rows]
    rows[0] |= {"median_ms": 2.0, "peak_bytes": 2**20, "launches_forward": None}
    rows[1] |= {"median_ms": 3.0, "peak_bytes": 2**19, "timing": "cuda events"}
    rows[1] |= {"launches_forward": 9, "launches_backward": 24}
    del rows[2]["launches_forward"]  # as in rows of older programs
    bench("show").show(rows)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "fused, none" in line)
    assert " 1.50 " in line and " 512 KiB " in line and " 0.50 " in line
    assert " 9 + 24 " in line
    assert sum(line.rstrip(" │").endswith("–") for line in lines) == 2  # are not known
    assert "rounds by cuda events or 2 rounds by wall clock" in " ".join(" ".join(lines).split())
    assert sum(line.startswith("│ fused") for line in lines) == 5
    assert any(rows[0]["device"] in line for line in lines)
    bench("show").show(rows[1:2])
    assert "of eager" not in capsys.readouterr().out


def test_a_file_of_results_is_shown_case_by_case(bench, layer_rows, tmp_path, capsys):
    path = tmp_path / "layer.jsonl"
    rows = [*layer_rows, *({**row, "dim": 65} for row in layer_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench("show").main((path,))
    out = capsys.readouterr().out
    assert out.count("dim = 64") == out.count("dim = 65") == 1


# of the machine


def test_a_device_names_its_folder(bench, monkeypatch):
    machine = bench("machine")
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert machine.folder_name(CPU) == "nvidia-h100-80gb-hbm3"


HERE, OTHER = str(ROOT), "1a2b3c4"


@pytest.mark.parametrize(
    ("top", "status", "told", "expected"),
    [
        # a commit says that files differ from it
        (HERE, "", "0000000", "abc"),
        (HERE, " M x", "0000000", "abc+dirty"),
        (HERE, None, "0000000", "abc"),
        # where no git is, or only that of another checkout, it is told
        *((top, "", told, told or None) for top in (None, "/") for told in (OTHER, "")),
        (None, "", f"{OTHER}+dirty", f"{OTHER}+dirty"),
    ],
)
def test_a_commit_is_the_checkouts_or_what_is_told(bench, monkeypatch, top, status, told, expected):
    git = {"--show-toplevel": top, "--short": "abc", "--porcelain": status}
    monkeypatch.setattr(bench("machine"), "_output", lambda *command: git[command[4]])
    monkeypatch.setenv("DBKERNELS_COMMIT", told)
    assert bench("machine").commit() == expected


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


def test_a_ceiling_is_the_higher_of_two_measurements(bench):
    faster = bench("machine").faster
    assert faster({"a": 1, "b": 4}, {"a": 2, "b": 3}) == {"a": 2, "b": 4}
