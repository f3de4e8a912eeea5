"""A user's strings stay as they are on every screen: brackets are no markup, colons no emoji."""

import ast
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli.runs import SIZES, write_npz
from PIL import Image

ROOT = Path(__file__).parents[2]
# no closing tag without an opening one, a tag of each kind, an emoji, and what escapes a bracket
NAMES = ["a[/]b", "[bold]x[red]", "[link=x]y[/link]", "a:smile:b", "x\\[b"]


def calls():
    for folder in ("dbkernels", "benchmarks", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    name = ast.unparse(node.func).rpartition(".")[2]
                    yield path.relative_to(ROOT), node.lineno, name, words


def test_every_console_is_plain_and_no_text_is_read_as_markup():
    consoles = []
    for path, line, name, words in calls():
        where = f"{path}:{line}"
        consoles += [str(path)] if name == "Console" else []
        assert name not in ("from_markup", "print_markup") and words.get("markup") != "True", where
        assert name != "TextColumn" or words["markup"] == "False", where
    assert consoles == ["dbkernels/cli/table.py"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_printed_as_it_is_by_every_verb(cli, runs, tmp_path, name):
    place = tmp_path / name
    (place / "folder/[b]cat").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(place / "folder/[b]cat/0.png")
    (place / "folder/[b]cat/more").mkdir()
    write_npz(place / "data.npz")
    for run in ("vit", "dit", "vit --seed 1"):
        shutil.copytree(runs(run), place / run.replace(" ", ""))
    sizes = " ".join(SIZES)
    one = "--batch 2 --methods block_fused --num-blocks 1 --recompute none --offload none"
    for line, code in [
        (f"train vit --out {name}/new --data {name}/data.npz {sizes}", 0),
        (f"train vit --out {name}/vit --data {name}/data.npz {sizes}", 1),
        (f"train dit --out {name}/other --data {name}/folder {sizes}", 0),
        (f"train vit --out {name}/x --data {name}/none.npz {sizes}", 1),
        (f"evaluate {name}/vit {name}/vit--seed1 --device cpu", 0),
        (f"evaluate {name}/vit --checkpoint {name}/none", 1),
        (f"sample {name}/dit --out {name}/x.png --per-class 1 --levels 2 --device cpu", 0),
        (f"sample {name}/dit --out {name}/none/x.png", 1),
        (f"profile {one} --device cpu --check {name}/none.json", 1),
    ]:
        ended = cli(line)
        assert ended.code == code, (line, ended)
        # lines are folded at the width of a terminal
        assert name in re.sub(r"\s+", "", ended.out + ended.err), (line, ended)
