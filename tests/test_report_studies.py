"""What a report says of studies: means over seeds, tables and pictures."""

import json

import benchmark_rows as made
import pytest
from benchmark_rows import WHOLE, of_study
from checkout_tools import tool


def cells_of(table):
    """Lines by arm, as dictionaries by heading."""
    headings, *lines = table
    return {line[0]: dict(zip(headings, line, strict=True)) for line in lines}


def study_table(rows):
    return cells_of(tool("report_study").study_table(rows))


def test_a_line_is_an_arm_with_its_mean_and_spread_over_seeds():
    rows = [
        *of_study(WHOLE, [[0.9, 0.9], [0.92, 0.92], [0.94, 0.94]], layers=[12]),
        *of_study("3 blocks", [[0.9, 0.95], [0.9, 0.96], [0.9, 0.97]], layers=[4, 4, 4]),
        *of_study("alone", [[0.5, 0.8]], layers=[6, 6]),
    ]
    cells = study_table(rows)
    accuracy = "accuracy after each step, %"
    assert cells[WHOLE][accuracy] == "92.0 ± 2.0"  # steps that are alike are one
    assert cells["3 blocks"][accuracy] == "**90.0 ± 0.0, 96.0 ± 1.0**"
    assert cells["alone"][accuracy] == "50.0, 80.0"
    assert [line["layers"] for line in cells.values()] == ["12", "4+4+4", "6+6"]
    assert [line["seeds"] for line in cells.values()] == ["3", "3", "1"]
    assert {line["updates"] for line in cells.values()} == {"1,200"}


@pytest.mark.parametrize(
    ("name", "values", "title", "best", "other"),
    [
        ("frechet", (20.0, 30.0), "Fréchet distance", "**20.0**", "30.0"),
        ("bits", (2.5, 2.4), "bits", "2.500", "**2.400**"),
        ("frechet_close", (20.0, 30.0), "Fréchet distance, close levels", "**20.0**", "30.0"),
        ("precision", (0.5, 0.6), "precision, %", "50.0", "**60.0**"),
        ("recall", (0.5, 0.6), "recall, %", "50.0", "**60.0**"),
        ("sweep_ms", (20.0, 30.0), "a step of every block, ms", "**20.0**", "30.0"),
        ("bits_of_blocks", ([1.0, 2.0], [1.5, 1.0]), "bits of each block", "1.000, 2.000", None),
        ("cross_entropy", ([0.5, 0.25], [0.1, 0.2]), "cross-entropy", "0.250", "0.200"),
    ],
)
def test_the_best_of_a_figure_is_bold_where_one_is_best(name, values, title, best, other):
    rows = [*of_study("a", values[:1], name), *of_study("b", values[1:], name)]
    cells = study_table(rows)
    assert cells["a"][title] == best
    assert other is None or cells["b"][title] == other
    assert "**" not in study_table(rows[:1])["a"][title]


def test_an_arm_without_a_figure_has_a_dash():
    rows = [*of_study("a", [0.5]), *of_study("b", [0.25], "calibration_error")]
    cells = study_table(rows)
    assert cells["b"]["accuracy after each step, %"] == "–"
    assert cells["a"]["calibration error, %"] == "–"


def test_the_sections_of_a_report_have_every_study_its_tables_and_claims(tmp_path):
    rows = [*of_study("3 blocks", (0.9, 0.92)), *of_study(WHOLE, (0.9, 0.9))]
    other = [row | {"data": "fashion", "commit": "def5678"} for row in rows]
    # a commit that came meanwhile makes no other table, and the newest row of a run counts
    rows[1] |= {"commit": "def5678"}
    rows.append(rows[0] | {"accuracy": 0.94})
    path = made.write(tmp_path / "rows.jsonl", [*rows, *other])
    read = tool("report_rows").read([path])
    sections = tool("report_studies").study_sections(read)
    assert [each.title for each in sections] == [
        "Studies", "Every family (`families`, tiny)", "ViT, digits", "As expected?",
        "ViT, fashion", "As expected?",
    ]  # fmt: skip
    [_, first, table, claims, *_] = sections
    assert first.file == "../docs/pictures/study-families.svg"
    text = tool("page").markdown("Results", sections)
    assert f"![{first.title}]({first.file})" in text and text.count("![") == 1
    assert len(first.picture.axes) == 2
    assert "commits abc1234, def5678" in table.note
    assert cells_of(table.table)["3 blocks"]["accuracy after each step, %"] == "**93.0 ± 1.4**"
    assert claims.table[1][3:] == ["+3.0 points", "yes"]
    assert tool("report_studies").study_sections([]) == []


def test_each_scale_has_its_own_tables_and_the_smallest_the_picture_of_the_pages(tmp_path):
    rows = of_study("3 blocks", (0.9, 0.92), scale="small")
    path = made.write(tmp_path / "rows.jsonl", [*rows, *of_study("3 blocks", (0.8,))])
    sections = tool("report_studies").study_sections(tool("report_rows").read([path]))
    pictures = [(each.title.split(", ")[-1], bool(each.file)) for each in sections if each.picture]
    assert pictures == [("tiny)", True), ("small)", False)]


def test_a_picture_has_a_dot_for_each_seed_and_a_mark_at_the_mean():
    rows = [*of_study("3 blocks", (0.9, 0.92)), *of_study(WHOLE, (0.8, 0.9))]
    [axes] = tool("report_study").study_picture([rows]).axes
    dots, means = axes.lines[::2], axes.lines[1::2]
    assert [[round(x, 6) for x in line.get_xdata()] for line in dots] == [[90, 92], [80, 90]]
    assert [round(line.get_xdata()[0], 6) for line in means] == [91, 85]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["3 blocks", WHOLE]
    best, other = (line.get_color() for line in means)
    assert best != other


def test_rows_of_a_study_are_printed_with_what_was_expected(tmp_path, capsys):
    rows = [*of_study("3 blocks", (0.9, 0.92)), *of_study(WHOLE, (0.9, 0.9))]
    tool("show").main((made.write(tmp_path / "rows.jsonl", rows),))
    said = capsys.readouterr().out
    assert "families, tiny: vit, digits" in said and "91.0 ± 1.4" in said
    assert "within a point of end to end" in said and "+1.0 points" in said


def test_a_row_of_a_study_must_have_its_whole_configuration(tmp_path):
    [row] = of_study("3 blocks", [0.9])
    del row["config"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="a row of study must have config, which it lacks"):
        tool("report_rows").read([path])


def test_a_picture_has_a_panel_for_all_that_a_family_is_compared_by():
    drawn = of_study(WHOLE, (20.0, 22.0), "frechet", family="dit")
    both = [row | {"frechet_close": 30.0} for row in drawn]
    picture_of = tool("report_studies").picture_of
    titles = [axes.get_title() for axes in picture_of([drawn]).axes]
    assert titles == ["DiT, digits"]
    titles = [axes.get_title() for axes in picture_of([of_study(WHOLE, (0.9,)), both]).axes]
    assert titles == ["ViT, digits", "DiT, digits", "DiT, digits, on close levels"]


def test_a_picture_of_layers_has_a_panel_for_each_data_and_arm():
    sweep = {"layers": [0, 1], "block": [0, 0], "r": [0.0, 0.5], "null_low": [0.0, -0.3]}
    sweep |= {"null_high": [0.0, 0.3], "null_median": [0.0, 0.0], "p": [1.0, 0.1]}
    about = {"study": "layer-sweep", "sweeps": {"trajectory": sweep}}
    some = [of_study(WHOLE, (0.9,), data=data, **about) for data in ("digits", "fashion")]
    picture = tool("report_studies").picture_of(some)
    titles = [axes.get_title() for axes in picture.axes]
    assert titles == ["digits, end to end", "fashion, end to end"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": None}, "accuracy must be a number, or a list of some, got None"),
        ({"accuracy": []}, "accuracy must be a number, or a list of some"),
        ({"accuracy": ["0.9"]}, "accuracy must be a number, or a list of some"),
        ({"layers": 3}, "layers must be of the kind list, got 3"),
        ({"layers": []}, "layers must be a number, or a list of some"),
        ({"arm": None}, "arm must be of the kind str, got None"),
        ({"updates": "many"}, "updates must be of the kind int, got 'many'"),
        ({"scale": "giant"}, "scale must be one of tiny, small, paper, got 'giant'"),
    ],
)
def test_a_row_that_no_table_can_show_is_refused_with_its_place(changes, message, tmp_path):
    [row] = of_study("3 blocks", (0.9,))
    path = made.write(tmp_path / "rows.jsonl", [row | changes])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: {message}"):
        tool("report_rows").read([path])


def test_seeds_with_lists_of_other_lengths_and_studies_without_a_title_are_refused():
    with pytest.raises(ValueError, match="accuracy of a must have as many numbers for each seed"):
        study_table(of_study("a", ([0.9], [0.9, 0.8])))
    with pytest.raises(ValueError, match=r"study must be one of families, .*, got no"):
        tool("report_studies").study_sections(of_study("a", (0.9,), study="no"))


def test_seeds_that_ran_under_another_torch_stay_in_the_table():
    rows = of_study("a", (0.9, 0.8, 0.7))
    rows[1] |= {"torch": "2.14.0", "commit": "def5678"}
    [table] = tool("report_rows").tables(rows, "study")
    assert [row["accuracy"] for row in table] == [0.9, 0.8, 0.7]
    said = tool("report_names").about(table)
    assert "torch 2.13.0" in said and "torch 2.14.0" in said and "def5678" in said
