import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.budget import (
    Budget,
    bytes_from,
    in_words,
    read_budgets,
    require_within,
    write_budgets,
)
from dbkernels.memory.trace import CATEGORIES

PARTS = {name: i for i, name in enumerate(CATEGORIES, 1)}
ROW = {
    "settings": {"preset": "S/2", "recompute": None},
    "peak_allocated_bytes": sum(PARTS.values()),
    "by_category": PARTS,
}


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GiB", 24 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        (" .5MiB ", 2**19),
        ("1KiB", 1024),
        ("2TiB", 2**41),
    ],
)
def test_a_number_and_its_unit_are_bytes(text, size):
    assert bytes_from(text) == size


@pytest.mark.parametrize(
    "text", ["24GB", "24G", "24", "0", "0GiB", "-1GiB", "a lot", "", "infGiB", "1e3GiB", "٣GiB"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError) as refused:
        bytes_from(text, name="ceiling")
    assert str(refused.value) == (
        "ceiling must be a positive number and one of KiB, MiB, GiB, TiB, such as 24GiB, "
        f"got {text}"
    )


@pytest.mark.parametrize(
    "size, words",
    [
        (2**30, "1.00 GiB"),
        (2**30 - 1, "1024 MiB"),
        (15 * 2**20, "15.0 MiB"),
        (3 * 2**41, "6.00 TiB"),
        (100, "0.10 KiB"),
        (-(2**20), "-1.00 MiB"),
    ],
)
def test_bytes_in_words_have_three_digits(size, words):
    assert in_words(size) == words


def test_growth_is_a_share_of_the_budget():
    budget, now = Budget({}, 200, {}), Budget({}, 203, {})
    assert budget.growth(now) == pytest.approx(0.015)
    assert now.growth(budget) < 0


def test_what_is_written_is_read_again(tmp_path):
    budgets = [Budget(**ROW), Budget({"preset": "XL/2"}, **{k: ROW[k] for k in list(ROW)[1:]})]
    write_budgets(tmp_path / "budgets.json", budgets)
    assert read_budgets(tmp_path / "budgets.json") == budgets
    assert [path.name for path in tmp_path.iterdir()] == ["budgets.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "file must be JSON, got Expecting"),
        ("[]", "file must hold a list of budgets, got []"),
        ('{"a": 1}', 'file must hold a list of budgets, got {"a": 1}'),
        ([3], "row 1 of file must have settings, peak_allocated_bytes, by_category and no more"),
        ([ROW, {**ROW, "more": 1}], "row 2 of file must have .* by_category, more"),
        ([{"settings": {}}], "row 1 of file must have .* got settings"),
        ([{**ROW, "settings": 1}], "settings in row 1 of file must be by name, got 1"),
        ([{**ROW, "by_category": {"head": 1}}], "by_category in row 1 .* workspaces, got head"),
        ([{**ROW, "by_category": [1]}], r"by_category in row 1 .* got \[1\]"),
        (
            [{**ROW, "by_category": {**PARTS, "inputs": "4"}}],
            "bytes in row 1 of file must be whole numbers",
        ),
        ([{**ROW, "peak_allocated_bytes": True}], "bytes in row 1 of file must be whole"),
        (
            [{**ROW, "by_category": {**PARTS, "inputs": -4}}],
            "bytes in row 1 of file must be whole numbers",
        ),
        ([{**ROW, "peak_allocated_bytes": 29}], "row 1 of file must be .* got 29 and 28"),
        (
            [{**ROW, "peak_allocated_bytes": 0, "by_category": dict.fromkeys(PARTS, 0)}],
            "row 1 of file must be what by_category adds up to, got 0 and 0",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = type(tmp_path)("file")
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=message.replace("[]", r"\[\]")):
        read_budgets(path)


def test_a_missing_file_is_told_by_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_budgets(tmp_path / "none.json")


def training(width=64, batch=256):
    """A step of a network of somebody's own."""
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.zeros(batch, width)

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, {"model": model, "optimizers": [optimizer], "inputs": [x]}


def test_a_step_within_its_ceiling_passes_up_to_the_byte():
    step, parts = training()
    found = require_within(step, **parts, ceiling="1 MiB")
    assert found.by_category["inputs"] == 256 * 64 * 4
    peak = found.peak_allocated_bytes
    assert require_within(step, **parts, ceiling=peak) == found
    with pytest.raises(AssertionError, match=f"more than the ceiling of {in_words(peak - 1)}"):
        require_within(step, **parts, ceiling=peak - 1)


def test_an_excess_names_the_categories_at_the_peak_the_largest_first():
    step, parts = training()
    with pytest.raises(AssertionError) as excess:
        require_within(step, **parts, ceiling="100 KiB")
    first, *lines = str(excess.value).splitlines()
    peak = require_within(step, **parts, ceiling="1 MiB")
    assert first == (
        f"the step needs {in_words(peak.peak_allocated_bytes)} at its peak ({peak.at}), "
        f"{in_words(peak.peak_allocated_bytes - 100 * 1024)} more than the ceiling of 100 KiB:"
    )
    sizes = sorted((size for size in peak.by_category.values() if size), reverse=True)
    assert [line.split()[-3] for line in lines] == [in_words(size).split()[0] for size in sizes]
    assert any(line.startswith("  saved activations  ") for line in lines)


def test_the_step_that_is_followed_finds_the_optimizers_state():
    step, parts = training()
    found = require_within(step, **parts, ceiling="1 MiB")
    moments = 2 * sum(p.nbytes for p in parts["model"].parameters())
    assert found.at.startswith(("forward", "backward"))
    assert found.by_category["optimizer"] >= moments


def test_fake_tensors_need_no_memory():
    with FakeTensorMode():
        step, parts = training(width=2**15, batch=2**15)
        with pytest.raises(AssertionError, match=r"GiB more than the ceiling of 1\.00 GiB"):
            require_within(step, **parts, ceiling="1 GiB")


def test_a_target_adds_its_workspaces():
    step, parts = training()
    found = require_within(step, **parts, ceiling="1 GiB", target="h100")
    assert found.by_category["workspaces"] >= 2 * 2**25


def test_rejects():
    step, parts = training()
    with pytest.raises(ValueError, match="ceiling must be a positive number"):
        require_within(step, **parts, ceiling="2 GB")
    with pytest.raises(ValueError, match=r"target must be one of cpu, .* got tpu"):
        require_within(step, **parts, ceiling=1, target="tpu")
    parts["model"].to("meta")
    with pytest.raises(ValueError, match="model must be on the CPU, got one on meta"):
        require_within(step, **parts, ceiling=1)
    with pytest.raises(ValueError, match="model must be on the CPU, got one on nothing"):
        require_within(step, model=nn.GELU(), ceiling=1)
