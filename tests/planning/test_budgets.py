import json
from dataclasses import replace
from pathlib import Path

import pytest

from dbkernels.memory.tracker import CATEGORIES
from dbkernels.planning.budgets import Budget, Held, add, hold, read, write
from dbkernels.planning.recipe import of_preset

OURS = Path(__file__).parents[2] / "benchmarks" / "budgets.json"
RECIPE = replace(of_preset("vit", "digits"), batch_size=2, num_blocks=6)
PARTS = {name: i for i, name in enumerate(CATEGORIES, 1)}
NOTHING = dict.fromkeys(CATEGORIES, 0)
BUDGET = Budget(RECIPE, sum(PARTS.values()), PARTS)
SETTINGS = RECIPE.settings()
ROW = {"settings": SETTINGS, "peak_allocated_bytes": 28, "by_category": PARTS}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path("file")


# the project's own: a change that makes a preset need more must say so in the file


def test_every_preset_needs_its_budget_to_a_hundredth():
    growths = {str(each.budget.recipe): each.growth for each in hold(OURS)}
    changed = {name: growth for name, growth in growths.items() if not -0.01 < growth <= 0.01}
    assert not changed, "python -m dbkernels profile --check benchmarks/budgets.json says what grew"


# files


def test_what_is_written_is_read_again(path):
    budgets = [BUDGET, replace(BUDGET, recipe=replace(RECIPE, offload="cpu"))]
    write(path, budgets)
    assert json.loads(path.read_text())[0] == ROW
    assert read(path) == budgets
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_adding_replaces_those_of_the_same_recipe_alone(path):
    other = replace(BUDGET, recipe=replace(RECIPE, optimizer_in_backward=True))
    more = {**PARTS, "inputs": PARTS["inputs"] + 1}
    grown = Budget(RECIPE, 29, more)
    add(path, [BUDGET, other])
    add(path, [grown])
    assert read(path) == [grown, other]


def test_only_what_can_be_held_is_added(path):
    compiled = replace(RECIPE, method="compiled", num_blocks=1, recompute=None)
    with pytest.raises(ValueError, match=r"methods to write must be of end_to_end, .* got none"):
        add(path, [replace(BUDGET, recipe=compiled)])
    unnamed = replace(RECIPE, device=replace(RECIPE.device, name="a card"))
    with pytest.raises(ValueError, match=r"target must be one of cpu, .* got a card"):
        add(path, [replace(BUDGET, recipe=unnamed)])
    assert not path.exists()


COMPILED = {"method": "compiled", "num_blocks": 1, "recompute": None}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "file must be JSON, got Expecting"),
        ("[]", r"file must hold a list of budgets, got \[\]"),
        ('{"a": 1}', 'file must hold a list of budgets, got {"a": 1}'),
        ("[3]", "row 1 of file: a budget must have settings, .*, by_category and no more, got 3"),
        ('[{"settings": {}}]', "row 1 of file: .* got settings"),
    ],
)
def test_a_file_of_something_else_is_refused(path, content, message):
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize(
    "changes, message",
    [
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
        (
            {"settings": SETTINGS | {"optimizer_in_backward": "both"}},
            'optimizer_in_backward must be bool, got "both"',
        ),
        ({"settings": SETTINGS | {"target": "tpu"}}, "target must be one of cpu, .*, got tpu"),
        ({"settings": SETTINGS | {"batch": True}}, "batch must be int, got true"),
        ({"settings": SETTINGS | {"recompute": 1}}, r"recompute must be str \| None, got 1"),
        ({"settings": SETTINGS | {"depth": 1}}, "settings must have .* and no more, got .* depth"),
    ],
)
def test_a_row_that_cannot_be_held_is_named(path, changes, message):
    path.write_text(json.dumps([ROW, {**ROW, **changes}]))
    with pytest.raises(ValueError, match=f"row 2 of file: .*{message}"):
        read(path)


# growth


@pytest.mark.parametrize("share, fails", [(-0.5, False), (0.0099, False), (0.0102, True)])
def test_the_limit_is_a_hundredth(share, fails):
    budget, now = Budget(RECIPE, 100_000, {}), Budget(RECIPE, int(100_000 * (1 + share)), {})
    held = Held(budget, now)
    assert held.growth == pytest.approx(share) and held.exceeded is fails
