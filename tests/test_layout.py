"""The floors of the package: an import may only point to a lower floor, or to its own room."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from dbkernels.models import FAMILIES

PACKAGE = Path(__file__).parents[1] / "dbkernels"
FLOOR = {
    "settings": -1,
    "pool": -1,
    "whole_file": -1,
    "with_parent": -2,
    "metrics": 0,
    "ops": 0,
    "memory": 0,
    "diffusion": 1,
    "data": 1,
    "models": 2,
    "training": 3,
    "convert": 4,
    "planning": 4,
    "cli": 5,
    "__main__": 6,
}


def rooms_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the full module name"
            names = [node.module]
            if node.module == PACKAGE.name:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE.name and rest:
                yield rest.partition(".")[0], node.lineno


def test_imports_point_down():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        floor = FLOOR.get(room, 9)  # dbkernels/__init__.py may import every room
        for other, line in rooms_imported(path):
            assert other == room or FLOOR[other] < floor, f"{path}:{line}: {room} imports {other}"


def test_every_room_has_a_floor():
    rooms = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")
    }
    assert rooms == {*FLOOR, "__init__"}


def test_no_room_but_those_of_models_names_a_family():
    names = re.compile(rf"\b({'|'.join(FAMILIES)})(config)?\b", re.IGNORECASE)
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room in ("models", "convert", "__init__.py"):  # the last one exports the models
            continue
        found = names.search(path.read_text())
        assert not found, f"{path.relative_to(PACKAGE)} names {found[0]}"


def test_no_tensor_has_the_dtype_that_is_the_default_at_the_time():
    makers = {"empty", "empty_strided", "zeros", "ones", "full", "eye", "tensor", "as_tensor"}
    makers |= {"linspace", "rand", "randn", "normal", "scalar_tensor"}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                f"torch.{m}" for m in makers
            }:
                assert any(word.arg == "dtype" for word in node.keywords), f"{path}:{node.lineno}"


def test_importing_changes_no_setting_of_torch():
    code = """if True:
        import torch
        read = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())
        before = read()
        import dbkernels.cli.main
        assert read() == before
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
