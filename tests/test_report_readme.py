import importlib
import re
from pathlib import Path

import benchmark_rows as made
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = """# Title

<!-- table: training S/2 -->
an old table
<!-- end -->

Between, | with | bars |.

<!-- table: layer -->
<!-- end -->
After.
"""


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module


def rows_of(tool, tmp_path, *rows):
    return tool("report_rows").read([made.write(tmp_path / "rows.jsonl", rows)])


@pytest.fixture
def results(tool, tmp_path):
    training = (*made.training_rows(num_blocks=(1, 2)), *made.training_rows(preset="L/2"))
    return rows_of(tool, tmp_path, *training, *made.layer_rows())


def test_the_readme_holds_what_the_results_give(tool):
    suites = {words[0] for words in tool("report_readme").marked(README)}
    rows = tool("report_rows").read([ROOT / "benchmarks" / "results"])
    asked = [row for row in rows if row["suite"] in suites]
    assert suites == {row["suite"] for row in asked}
    assert tool("report_readme").rewritten(README, asked) == README


def test_only_what_is_between_markers_changes(tool, results):
    text = tool("report_readme").rewritten(TEXT, results)
    assert "an old table" not in text
    cut = re.sub(r"(<!-- table: [^>]*-->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)
    assert cut == TEXT.replace("an old table\n", "")
    assert tool("report_readme").rewritten(text, results) == text


def test_the_newest_commit_is_shown(tool, tmp_path):
    older = made.layer_rows(made.CPU | {"commit": "0000000"}, speed=2.0)
    rows = rows_of(tool, tmp_path, *older, *made.layer_rows())
    text = tool("report_readme").rewritten("<!-- table: layer -->\n<!-- end -->", rows)
    assert "commit abc1234" in text and "0000000" not in text
    assert "| fused, none (torch) | 10.40 | 30 MiB | 0.78 | **77.6** | 0.97 | **0.155** |" in text


def test_a_marker_chooses_presets(tool, results):
    text = tool("report_readme").rewritten(TEXT, results)
    assert "DiT-S/2, batch 64, float32:" in text and "DiT-L/2" not in text
    both = tool("report_readme").rewritten(TEXT.replace("S/2", "S/2 L/2"), results)
    assert "DiT-S/2" in both and "DiT-L/2" in both
    everything = tool("report_readme").rewritten(TEXT.replace(" S/2", ""), results)
    assert everything.split("# Title")[1].count("fused layers, recompute none") == 2


def test_policies_are_left_out_by_a_rule_and_competitors_never(tool, results):
    text = tool("report_readme").rewritten(TEXT, results)
    blocks = [line for line in text.splitlines() if line.startswith("| 2 blocks")]
    assert [re.split(r" *\| *", line)[2:5] for line in blocks] == [
        ["eager layers (torch)", "–", "all"],
        ["eager layers (torch)", "–", "one block"],
        ["fused layers (triton)", "none", "all"],
        *(["fused layers (triton)", recompute, "one block"] for recompute in made.POLICIES),
    ]
    assert text.count("| 1 block, end to end |") == 3 + 3 + 2
    assert "overhead of a sweep against the end-to-end eager step (7.1 % in the paper):" in text
    assert "NVIDIA H100 80GB HBM3, driver 570.86" in text
    assert "`python -m dbkernels bench --full`" in " ".join(text.split())


def test_predictions_say_so(tool, tmp_path):
    rows = rows_of(tool, tmp_path, *made.training_rows(predicted=True, num_blocks=(1, 2)))
    text = tool("report_readme").rewritten("<!-- table: training -->\n<!-- end -->", rows)
    lines = [line for line in text.splitlines() if line.startswith(("| 1", "| 2"))]
    assert lines and all("(predicted)" in line for line in lines)
    assert "predicted, no GPU has run it" in " ".join(text.split())
    assert "overhead" not in text


def test_a_bar_in_the_results_stays_in_its_cell(tool, tmp_path):
    rows = rows_of(tool, tmp_path, *(row | {"impl": "a|b"} for row in made.layer_rows()))
    text = tool("report_readme").rewritten("<!-- table: layer -->\n<!-- end -->", rows)
    assert "a\\|b" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker", "the README must have the marker <!-- table: layer -->, got none"),
        (TEXT.replace("table: layer", "table: ops"), "must have the marker <!-- table: layer -->"),
        (TEXT.replace("table: layer", "table: speed"), "must name one of .*, ops, got 'speed'"),
        (TEXT.replace("table: layer", "table:"), "must name one of .*, ops, got ''"),
        (TEXT.replace("<!-- end -->\nAfter", "After"), "layer --> must be followed by <!-- end"),
        (TEXT.replace("<!-- end -->", "", 1), "S/2 --> must be followed by <!-- end -->, got none"),
        (TEXT.replace("S/2", "XL/2"), "must have rows of training for XL/2, got none"),
    ],
)
def test_rejects(tool, results, text, message):
    with pytest.raises(ValueError, match=message):
        tool("report_readme").rewritten(text, results)


def test_a_marker_that_is_missing_leaves_the_readme_alone(tool, tmp_path, capsys, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("no marker", encoding="utf-8")
    monkeypatch.setattr(tool("report"), "README", path)
    file = made.write(tmp_path / "rows.jsonl", made.layer_rows())
    assert tool("report").main(["--readme", str(file)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_text(encoding="utf-8") == "no marker"
    path.write_text("<!-- table: layer -->\n<!-- end -->\n", encoding="utf-8")
    assert tool("report").main(["--readme", str(file)]) == 0
    assert "| fused, qkv (torch) |" in path.read_text(encoding="utf-8")
