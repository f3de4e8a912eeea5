import importlib
import json
import os
import re
from pathlib import Path

import benchmark_rows as made
import pytest

from dbkernels.ops import POLICIES

TOOLS = Path(__file__).parents[1] / "tools"
CIFAR = {"family": "vit", "preset": "cifar100", "saved": 1300 * made.MIB, "ms": 2500.0}


@pytest.fixture(scope="module")
def tool():
    """Import one of the report's files, which stand beside each other and are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module


def run(tool, capsys, *arguments):
    status = tool("report").main([str(word) for word in arguments])
    return status, capsys.readouterr().err.strip()


def a_row(**changes):
    return next(made.training_rows(made.CPU, **CIFAR)) | changes


def a_step(**changes):
    return next(made.timeline_rows()) | changes


def test_a_row_of_an_older_program_updates_after_the_backward_and_launches_ops(tool, tmp_path):
    older = {
        name: value
        for name, value in a_row().items()
        if name not in ("optimizer_in_backward", "launch")
    }
    inside = a_row(optimizer_in_backward=True, sweep_ms=1.0)
    [row, *_] = found = tool("report_rows").read(
        [made.write(tmp_path / "a.jsonl", [older, inside])]
    )
    assert (row["optimizer_in_backward"], row["launch"]) == (False, "ops")
    # another way, which replaces nothing
    [table] = tool("report_rows").tables(found, "training")
    assert [row["optimizer_in_backward"] for row in table] == [False, True]


def test_a_row_without_a_command_has_its_programs_name(tool, tmp_path):
    rows = [*made.ops_rows(), *made.layer_rows(made.CPU | {"command": "python benchmarks/x.py"})]
    found = tool("report_rows").read([made.write(tmp_path / "a.jsonl", rows)])
    assert {row["command"] for row in found} == {
        "python benchmarks/ops.py",
        "python benchmarks/x.py",
    }


def test_a_row_measured_again_replaces_the_earlier_one(tool, tmp_path):
    rows = [a_row(sweep_ms=1.0), a_row(sweep_ms=2.0), a_row(sweep_ms=None, memory="predicted")]
    found = tool("report_rows").read([made.write(tmp_path / "a.jsonl", rows)])
    tables = tool("report_rows").tables(found, "training")
    assert [[row["sweep_ms"] for row in table] for table in tables] == [[2.0]]


def test_the_setting_of_the_last_row_is_the_newest(tool):
    rows = tool("report_rows")
    found = [a_row(commit=commit, budget=n / 4) for n, commit in enumerate("abca")]
    [(newest, older)] = rows.newest(rows.tables(found, "training"), "training")
    assert [row["commit"] for row in newest] == ["a", "a"]
    assert [table[0]["commit"] for table in older] == ["c", "b"]


def test_policies_and_methods_are_those_of_the_package(tool):
    rows = tool("report_rows")
    assert tuple(POLICIES) == rows.POLICIES
    assert set(tool("report_text").LONG) == set(rows.METHODS) == set(tool("report_marks").STYLES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a line must be one JSON object, got '{'"),
        ("[1]", r"a line must be one JSON object, got '\[1\]'"),
        (a_row(suite="speed"), "suite must be one of training, timeline, layer, ops, got 'speed'"),
        ({"a": 1}, "suite must be one of training, timeline, layer, ops, got None"),
        ({"suite": []}, "suite must be one of training, timeline, layer, ops, got None"),
        ({"suite": ["a"]}, r"suite must be one of training, timeline, layer, ops, got \['a'\]"),
        ({"op": "gelu"}, "a row of ops must have shape, dtype, direction"),
        (a_row(method="magic"), "method must be one of end_to_end, .*, got 'magic'"),
        (a_row(offload="some"), "offload must be one of none, cpu, got 'some'"),
        (a_row(sweep_ms=0), "sweep_ms must be a positive number, got 0"),
        (a_row(step_ms="fast"), "step_ms must be a positive number, got 'fast'"),
        (a_row(sweep_ms=float("nan")), "sweep_ms must be a positive number, got nan"),
        (a_row(sweep_ms=10**400), "sweep_ms must be a positive number, got 1000"),
        (a_row(peak_allocated_bytes=None), "peak_allocated_bytes must be a number, got null"),
        (a_row(num_blocks=1.5), "num_blocks must be an integer, got 1.5"),
        (a_row(by_category=[3]), r"by_category must be bytes by name, got \[3\]"),
        (next(made.ops_rows()) | {"shape": 4}, "shape must be a list of sizes, got 4"),
        (
            a_row(optimizer_in_backward="lost"),
            "optimizer_in_backward must be one of False, True, got 'lost'",
        ),
        (a_row(launch="late"), "launch must be one of ops, graph, got 'late'"),
        (a_step(starts=[0]), r"starts must be ops in rising order, two or more, got \[0\]"),
        (a_step(starts=[0, 3, 3, 4, 5]), "starts must be ops in rising order"),
        (a_step(starts=[-1, 0]), "starts must be ops in rising order"),
        (a_step(starts=[0, True]), "starts must be ops in rising order"),
        (a_step(levels=[]), r"levels must be bytes by category, got \[\]"),
        (a_step(levels={}), "levels must be bytes by category, got {}"),
        (a_step(levels={"inputs": 3}), "levels must be lists of bytes, got 3 for inputs"),
        (a_step(levels={"inputs": [-1] * 5}), "levels must be lists of bytes, got .* for inputs"),
        (
            a_step(levels={"inputs": [1] * 4}),
            "levels must have a number for each of 5 starts, got 4 for inputs",
        ),
        (a_step(phases=["forward"]), "phases must be pairs of a name and its first op, got"),
        (a_step(phases=[[1, 1]]), "phases must be pairs of a name and its first op, got"),
        (a_step(phases=[["a", 9], ["b", 1]]), "phases must begin at ops in rising order, got"),
        (a_step(at=None), "at must be a number, got null"),
        (a_step(levels=None), "levels must be a number, got null"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tool, tmp_path, capsys, line, message):
    text = line if isinstance(line, str) else json.dumps(line)
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{json.dumps(a_row())}\n\n{text}\n")
    status, error = run(tool, capsys, file, "--out", tmp_path / "page.html")
    assert status == 1
    assert re.fullmatch(rf"{file}:3: {message}.*", error)
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_a_path_without_results_is_named(tool, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "rows.json").write_text("{}")
    assert run(tool, capsys, empty) == (1, f"{empty} must hold results as *.jsonl, got none")
    absent = tmp_path / "absent.jsonl"
    status, error = run(tool, capsys, absent)
    assert status == 1 and error.startswith(f"{absent} must be a file of JSON lines, got ")
    (empty / "bytes.jsonl").write_bytes(b"\xff")
    status, error = run(tool, capsys, empty)
    assert status == 1 and "bytes.jsonl must be a file of JSON lines" in error
