import json
import subprocess
import sys

import pytest
from checkout_tools import ROOT, tool

count = tool("count")
KEYS = ["package", "tools_benchmarks", "tests", "longest_file", "step_files"]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("", 0),
        ("# reason\n\n   \n", 0),
        ('"""Module."""\n\n\ndef f():\n    """One.\n\n    Two.\n    """\n    return 1  # why\n', 2),
        ('class A:\n    x: int = 0\n    """Of a field."""\n', 2),
        ('text = """\nall of it\n\nis code"""\n', 4),
        ("f(\n    1,\n\n    # reason\n    2,\n)\n", 4),
        ("x = 1; y = 2\n", 1),
        ('f"{x}"\n', 1),
    ],
)
def test_a_code_line_is_not_blank_nor_comment_nor_docstring(source, lines):
    assert count.code_lines(source) == lines


def test_folders_are_added_up_and_tests_are_in_no_longest_file(tmp_path):
    sizes = {"dbkernels/a.py": 3, "dbkernels/deep/b.py": 4, "tools/c.py": 5, "tools/d.sh": 90}
    sizes |= {"benchmarks/e.py": 6, "tests/f.py": 50, "tests/deep/g.py": 1, "setup.py": 2}
    for name, lines in sizes.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" * lines + "# no code\n")
    assert count.count(tmp_path) == {
        "package": 7,
        "tools_benchmarks": 11,
        "tests": 51,
        "longest_file": ["benchmarks/e.py", 7],
    }


def test_files_run_are_those_of_the_folder_whose_functions_run(tmp_path):
    scopes = {}
    for name in ("in/called", "in/imported", "out/outside"):
        path, scopes[name] = tmp_path / f"{name}.py", {}
        exec(compile("def f():\n    return 1\n", str(path), "exec"), scopes[name])
    before = sys.getprofile()
    run = (scopes["in/called"]["f"], scopes["out/outside"]["f"])
    files = count.files_run(lambda: [function() for function in run], tmp_path / "in")
    assert files == {tmp_path / "in" / "called.py"}
    assert sys.getprofile() is before


def test_the_tool_prints_its_keys():
    tool = [sys.executable, str(ROOT / "tools" / "count.py")]
    printed = json.loads(subprocess.check_output([*tool, "--json"], text=True))
    assert list(printed) == KEYS
    name, lines = printed["longest_file"]
    assert len((ROOT / name).read_text().splitlines()) == lines
    # a step runs at least the trainer, the objective, the model, its layers and their ops
    assert 5 < printed["step_files"] < printed["package"]
