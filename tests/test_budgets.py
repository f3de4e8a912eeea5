"""The project's own budgets: a change that makes a preset need more must say so in the file."""

from pathlib import Path

import pytest

from dbkernels.cli.budgets import held

PATH = Path(__file__).parents[1] / "benchmarks" / "budgets.json"


@pytest.fixture(scope="module")
def budgets():
    return held(PATH)


def test_no_preset_has_grown_by_more_than_a_hundredth(budgets):
    grown = {str(each.budget.settings): each.growth for each in budgets if each.exceeded}
    assert not grown, "python -m dbkernels profile --check benchmarks/budgets.json says what grew"


def test_no_budget_is_larger_than_it_must_be(budgets):
    assert min(each.growth for each in budgets) > -0.01, "lower it: add --update"
