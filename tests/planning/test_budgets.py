import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dbkernels.memory.tracker import CATEGORIES
from dbkernels.planning import dry_run
from dbkernels.planning.budgets import Held, add, hold, read, write
from dbkernels.planning.recipe import of_preset

OURS = Path(__file__).parents[2] / "benchmarks" / "budgets.json"
RECIPE = replace(of_preset("vit", "digits"), batch_size=2, num_blocks=6)
PARTS = {name: i for i, name in enumerate(CATEGORIES, 1)}
NOTHING = dict.fromkeys(CATEGORIES, 0)
SETTINGS = RECIPE.settings()
ROW = {"settings": SETTINGS, "peak_allocated_bytes": 28, "by_category": PARTS}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path("file")


# the project's own: a change that makes a preset need more must say so in the file


def test_every_preset_needs_its_budget_to_a_hundredth(monkeypatch):
    # of several processes each finds what one alone does
    monkeypatch.setattr(dry_run, "ALONE", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    growths = {str(each.recipe): each.growth for each in hold(read(OURS))}
    changed = {name: growth for name, growth in growths.items() if not -0.01 < growth <= 0.01}
    assert not changed, "python -m dbkernels profile --check benchmarks/budgets.json says what grew"


# files


def test_what_is_written_is_read_again(path):
    budgets = {RECIPE: PARTS, replace(RECIPE, offload="cpu"): {**PARTS, "inputs": 0}}
    write(path, budgets)
    assert json.loads(path.read_text())[0] == ROW
    assert read(path) == budgets
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_adding_replaces_those_of_the_same_recipe_alone(path):
    other, more = replace(RECIPE, optimizer_in_backward=True), {**PARTS, "inputs": 5}
    add(path, {RECIPE: PARTS, other: PARTS})
    add(path, {RECIPE: more})
    assert read(path) == {RECIPE: more, other: PARTS}


def test_only_what_can_be_held_is_added(path):
    compiled = replace(RECIPE, method="compiled", num_blocks=1, recompute=None)
    with pytest.raises(ValueError, match=r"methods to write must be of end_to_end, .* got none"):
        add(path, {compiled: PARTS})
    unnamed = replace(RECIPE, device=replace(RECIPE.device, name="a card"))
    with pytest.raises(ValueError, match=r"target must be one of cpu, .* got a card"):
        add(path, {unnamed: PARTS})
    assert not path.exists()


COMPILED = {"method": "compiled", "num_blocks": 1, "recompute": None}


@pytest.mark.parametrize(
    "written, message",
    [
        ("{", "file must be JSON, got Expecting"),
        ("[" * 10**5, "file must be JSON, got maximum recursion depth"),
        ("[]", r"file must hold a list of budgets, got \[\]"),
        ('{"a": 1}', 'file must hold a list of budgets, got {"a": 1}'),
        ("[3]", "row 1 of file: a budget must have settings, .*, by_category and no more, got 3"),
        ('[{"settings": {}}]', "row 1 of file: .* got settings"),
        # changes of the second of two rows
        ({}, "settings must be those of no other row, got .*"),
        ({"more": 1}, "a budget must have .* by_category, more"),
        ({"settings": 1}, "settings must have family, preset, .* got 1"),
        ({"by_category": {"head": 1}}, "by_category must have .* workspaces and no more, got head"),
        ({"by_category": [1]}, r"by_category must have .* got \[1\]"),
        ({"by_category": {**PARTS, "inputs": "4"}}, "bytes must be whole numbers"),
        ({"peak_allocated_bytes": True}, "bytes must be whole numbers"),
        ({"by_category": {**PARTS, "inputs": -4}}, "bytes must be whole numbers"),
        ({"peak_allocated_bytes": 29}, "what by_category adds up to, got 29 and 28"),
        ({"peak_allocated_bytes": 0, "by_category": NOTHING}, "adds up to, got 0 and 0"),
        ({"settings": SETTINGS | {"preset": "huge"}}, "preset of ViT must be .*, got huge"),
        ({"settings": SETTINGS | COMPILED}, "method must be of end_to_end, .* got compiled"),
        ({"settings": SETTINGS | {"autocast": "both"}}, 'autocast must be bool, got "both"'),
        ({"settings": SETTINGS | {"target": "tpu"}}, "target must be one of cpu, .*, got tpu"),
        ({"settings": SETTINGS | {"batch": True}}, "batch must be int, got true"),
        ({"settings": SETTINGS | {"recompute": 1}}, r"recompute must be str \| None, got 1"),
        ({"settings": SETTINGS | {"optimizer": "lion"}}, "optimizer must be one of .* got lion"),
        ({"settings": SETTINGS | {"optimizer": None}}, "optimizer must be str, got null"),
        ({"settings": SETTINGS | {"depth": 1}}, "settings must have .* and no more, got .* depth"),
    ],
)
def test_what_cannot_be_held_is_refused_and_its_row_is_named(path, written, message):
    if isinstance(written, dict):
        written, message = json.dumps([ROW, {**ROW, **written}]), f"row 2 of file: .*{message}"
    path.write_text(written)
    with pytest.raises(ValueError, match=message):
        read(path)


# growth


@pytest.mark.parametrize("share, fails", [(-0.5, False), (0.0099, False), (0.0102, True)])
def test_the_limit_is_a_hundredth(share, fails):
    held = Held(RECIPE, {"inputs": 100_000}, {"inputs": int(100_000 * (1 + share))})
    assert held.growth == pytest.approx(share) and held.exceeded is fails
