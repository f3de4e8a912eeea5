import importlib
import re
from pathlib import Path

import pytest

MIB = 2**20
TOOLS = Path(__file__).parents[1] / "tools"
WHOLE = {
    "name": "end to end",
    "num_blocks": 1,
    "updates_per_layer": 1600,
    "peak_bytes": 50 * MIB,
    "saved_bytes": 40 * MIB,
    "seconds_per_step": 0.08,
    "seconds_per_sweep": 0.08,
    "accuracy": [0.97, 0.955],
    "frechet": 12.3,
}
PARTS = WHOLE | {
    "name": "2 blocks",
    "num_blocks": 2,
    "peak_bytes": 30 * MIB,
    "saved_bytes": 20 * MIB,
    "seconds_per_step": 0.05,
    "seconds_per_sweep": 0.1,
    "accuracy": [0.99, 0.92],
    "frechet": 11.0,
}


@pytest.fixture(scope="module")
def summary():
    """The module, whose file stands beside the report's others in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("demo_summary")


def rows_of(table):
    """The words of each cell, by the title of the row."""
    rows = {}
    for row in re.findall(r"<tr><th scope=.row.>(.*?)</tr>", table, flags=re.S):
        title, *cells = row.split("<td>")
        rows[title.split("<")[0]] = [re.sub(r"<[^>]+>", " ", cell).split() for cell in cells]
    return rows


def test_marks_what_wins_and_what_loses(summary):
    costs = {
        "Peak memory of a step": [["50", "MiB"], ["30", "MiB", "✓", "better"]],
        "Saved activations": [["40", "MiB"], ["20", "MiB", "✓", "better"]],
        "Saved activations, ratio to end to end": [["1.00×"], ["0.50×", "✓", "better"]],
        "Time per step": [["80", "ms"], ["50", "ms", "✓", "better"]],
        "Time per sweep": [["80", "ms"], ["100", "ms", "✗", "worse"]],
        "Updates per layer": [["1,600"], ["1,600"]],
    }
    accuracy = {"Accuracy after the last step": [["95.5", "%"], ["92.0", "%", "✗", "worse"]]}
    distance = {"Fréchet distance": [["12.3"], ["11", "✓", "better"]]}
    runs = [WHOLE, PARTS]
    assert rows_of(summary.summary_table("classification", runs)) == accuracy | costs
    assert rows_of(summary.summary_table("generation", runs)) == distance | costs


def test_compares_with_end_to_end_wherever_it_stands(summary):
    rows = rows_of(summary.summary_table("generation", [PARTS, WHOLE]))
    assert rows["Fréchet distance"] == [["11", "✓", "better"], ["12.3"]]


def test_difference_too_small_to_write_is_the_same(summary):
    rows = rows_of(summary.summary_table("generation", [WHOLE, PARTS | {"frechet": 12.30001}]))
    assert rows["Fréchet distance"][1] == ["12.3", "same"]


def test_nothing_is_marked_without_a_run_to_compare_with(summary):
    rows = rows_of(summary.summary_table("generation", [PARTS]))
    assert rows["Fréchet distance"] == [["11"]]
    assert rows["Saved activations, ratio to end to end"] == [["not", "measured"]]


def test_a_last_step_without_a_number_is_not_replaced_by_an_earlier_one(summary):
    runs = [WHOLE, PARTS | {"accuracy": [0.99, None]}]
    rows = rows_of(summary.summary_table("classification", runs))
    assert rows["Accuracy after the last step"][1] == ["not", "measured"]


def test_no_runs_are_not_measured(summary):
    assert summary.summary_table("generation", []) == summary.MISSING


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (1.0, "1 s"), (59.4, "59.4 s"), (59.6, "1 min 0 s"), (431, "7 min 11 s")],
)
def test_durations_read_well(summary, seconds, text):
    assert summary.seconds_text(seconds) == text
