import pytest
from memory.steps import training
from torch import nn

from dbkernels.memory.budget import require_within
from dbkernels.memory.units import bytes_from, in_words

SIZES = {"24GiB": 24 * 2**30, "1.5 GiB": 3 * 2**29, " .5MiB ": 2**19, "1KiB": 1024, "2TiB": 2**41}


@pytest.mark.parametrize("text", SIZES)
def test_a_number_and_its_unit_are_bytes(text):
    assert bytes_from(text) == SIZES[text]


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


# a ceiling


def test_a_step_within_its_ceiling_passes_up_to_the_byte():
    step, parts = training()
    found = require_within(step, **parts, ceiling="1 MiB")
    assert found.by_category["inputs"] == 256 * 64 * 4
    peak = found.peak_allocated_bytes
    assert require_within(step, **parts, ceiling=peak) == found
    # the step that is followed finds the optimizer's state
    assert found.at.startswith(("forward", "backward"))
    assert found.by_category["optimizer"] >= 2 * sum(p.nbytes for p in parts["model"].parameters())
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


def test_a_target_adds_its_workspaces():
    step, parts = training()
    found = require_within(step, **parts, ceiling="1 GiB", target="h100")
    assert found.by_category["workspaces"] >= 2 * 2**25


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ceiling": "2 GB"}, "ceiling must be a positive number"),
        ({"target": "tpu"}, r"target must be one of cpu, a100, .*, got tpu"),
        ({"model": nn.Linear(1, 1, device="meta")}, "model must be on the CPU, got one on meta"),
        ({"model": nn.GELU()}, "model must be on the CPU, got one on nothing"),
    ],
)
def test_rejects(changes, message):
    step, parts = training()
    with pytest.raises(ValueError, match=message):
        require_within(step, **{**parts, "ceiling": 1, **changes})


# as a fixture

TESTS = """
from memory.steps import training

def test_small(memory_budget):
    step, parts = training()
    memory_budget(step, **parts, ceiling="1 MiB")
    memory_budget(step, **parts, ceiling="20 KiB")  # the line at fault
"""


def test_a_suite_that_asks_for_it_fails_with_the_categories(tmp_path, capsys):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["dbkernels.memory.plugin"]\n')
    (tmp_path / "test_memory.py").write_text(TESTS)
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(tmp_path), str(tmp_path)]
    )
    out = capsys.readouterr().out
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "# the line at fault" in out and "bytes_from" not in out
    assert "AssertionError: the step needs" in out
    for name in ("parameters", "gradients", "inputs"):
        assert f"E         {name} " in out
