"""What a report says of studies: means over seeds, what was expected, and pictures."""

import json

import benchmark_rows as made
import pytest
from checkout_tools import tool

RUN = {
    "suite": "study", "study": "families", "scale": "tiny", "data": "digits", "family": "vit",
    "batch": 32, "updates": 1200, "num_blocks": 1, "layers": [12], "train": "dbkernels train vit",
    "config": {}, "command": "python benchmarks/study.py families --scale tiny",
}  # fmt: skip
WHOLE, SHALLOW = "end to end", "end to end, as deep as a block"


def rows_of(arm, values, name="accuracy", **changes):
    """A row of each seed; a figure is a number or a list."""
    about = RUN | made.CPU | {"arm": arm} | changes
    return [about | {"seed": seed, name: value} for seed, value in enumerate(values)]


def cells_of(table):
    """Lines by arm, as dictionaries by heading."""
    headings, *lines = table
    return {line[0]: dict(zip(headings, line, strict=True)) for line in lines}


def study_table(rows):
    return cells_of(tool("report_study").study_table(rows))


def verdicts(rows, *claims):
    """What a table of claims says: by how much, and whether it is so."""
    module = tool("report_claims")
    table = module.verdicts(rows, claims) if claims else module.verdicts(rows)
    assert not table or table[0] == module.HEADINGS
    return [line[3:] for line in table[1:]]


def claim(*words, **changes):
    return tool("report_claims").Claim("families", "vit", "expected", *words, **changes)


def test_a_line_is_an_arm_with_its_mean_and_spread_over_seeds():
    rows = [
        *rows_of(WHOLE, [[0.9, 0.9], [0.92, 0.92], [0.94, 0.94]], layers=[12]),
        *rows_of("3 blocks", [[0.9, 0.95], [0.9, 0.96], [0.9, 0.97]], layers=[4, 4, 4]),
        *rows_of("alone", [[0.5, 0.8]], layers=[6, 6]),
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
    rows = [*rows_of("a", values[:1], name), *rows_of("b", values[1:], name)]
    cells = study_table(rows)
    assert cells["a"][title] == best
    assert other is None or cells["b"][title] == other
    assert "**" not in study_table(rows[:1])["a"][title]


def test_an_arm_without_a_figure_has_a_dash():
    rows = [*rows_of("a", [0.5]), *rows_of("b", [0.25], "calibration_error")]
    cells = study_table(rows)
    assert cells["b"]["accuracy after each step, %"] == "–"
    assert cells["a"]["calibration error, %"] == "–"


@pytest.mark.parametrize(
    ("blocks", "margin", "by", "so"),
    [
        ((0.960, 0.962), None, "+5.1 points", "yes"),
        ((0.905, 0.925), None, "+0.5 points", "within the spread"),
        ((0.912, 0.932), None, "+1.2 points", "within the spread"),
        ((0.912, 0.912), None, "+0.2 points", "within the spread"),
        ((0.80, 0.82), None, "-10.0 points", "**no**"),
        ((0.80, 0.82), 0.1, "-10.0 points", "yes"),
        ((0.80, 0.82), 0.099, "-10.0 points", "**no**"),
        ((0.905, 0.915), 0.0, "+0.0 points", "yes"),
        ((0.900, 0.918), 0.0, "-0.1 points", "within the spread"),
    ],
)
def test_a_claim_holds_beyond_the_spread_or_within_its_margin(blocks, margin, by, so):
    rows = [*rows_of("3 blocks", blocks), *rows_of(WHOLE, (0.905, 0.915))]
    assert verdicts(rows, claim("3 blocks", (WHOLE,), margin=margin)) == [[by, so]]


def test_a_lower_figure_is_better_where_it_is_a_distance_or_bits():
    rows = [
        *rows_of("3 blocks", (20.0, 22.0), "frechet", family="dit"),
        *rows_of(WHOLE, (20.0, 20.0), "frechet", family="dit"),
    ]
    told = claim("3 blocks", (WHOLE,), margin=0.05, relative=True)._replace(family="dit")
    assert verdicts(rows, told) == [["-1 (-5.0 %)", "yes"]]
    assert verdicts(rows, told._replace(margin=0.049)) == [["-1 (-5.0 %)", "within the spread"]]


def test_a_generator_is_compared_on_close_levels_too_where_it_was_drawn_on_them():
    def rows(name, levels, close):
        both = (levels, levels)
        return [
            row | {"frechet_close": close}
            for row in rows_of(name, both, "frechet", family="dit", study="more-data")
        ]

    both = [*rows("3 blocks", 30.0, 20.0), *rows(WHOLE, 20.0, 30.0)]
    [_, *lines] = tool("report_claims").verdicts(both)
    assert [(line[0], *line[3:]) for line in lines] == [
        ("within 5 % of end to end", "-10 (-50.0 %)", "**no**"),
        ("within 5 % of end to end, on close levels", "+10 (+33.3 %)", "yes"),
    ]
    del both[0]["frechet_close"]
    assert len(tool("report_claims").verdicts(both)) == 2


@pytest.mark.parametrize(
    ("recommended", "shallow", "whole", "so"),
    [
        (2.699, 2.6, 2.4, "yes"),
        (2.701, 2.6, 2.4, "**no**"),
        (2.601, 2.6, 2.8, "**no**"),  # a whole that is worse leaves no room
        (2.599, 2.6, 2.8, "yes"),
    ],
)
def test_half_the_distance_to_another_arm_may_be_a_margin(recommended, shallow, whole, so):
    def rows(name, bits):
        return rows_of(name, [bits, bits], "bits", family="ar", data="shakespeare")

    two = [*rows("3 blocks, recommended", recommended), *rows(SHALLOW, shallow)]
    [(_, said)] = verdicts([*two, *rows(WHOLE, whole)])
    assert said == so
    assert not verdicts(two)


@pytest.mark.parametrize(
    ("blocks", "limits", "so"),
    [
        (0.905, {"margin": 0.01, "near": True}, "yes"),
        (0.895, {"margin": 0.01, "near": True}, "yes"),
        (0.92, {"margin": 0.01, "near": True}, "**no**"),
        (0.88, {"margin": 0.01, "near": True}, "**no**"),
        (0.95, {"least": 0.04}, "yes"),
        (0.93, {"least": 0.04}, "**no**"),
    ],
)
def test_near_and_far_have_limits(blocks, limits, so):
    rows = [*rows_of("3 blocks", (blocks, blocks)), *rows_of(WHOLE, (0.9, 0.9))]
    [(_, said)] = verdicts(rows, claim("3 blocks", (WHOLE,), **limits))
    assert said == so


def test_one_seed_tells_nothing():
    rows = [*rows_of("3 blocks", (0.9, 0.9)), *rows_of(WHOLE, (0.8,))]
    assert verdicts(rows, claim("3 blocks", (WHOLE,))) == [
        ["+10.0 points", "one seed tells nothing"]
    ]


def test_claims_of_other_studies_families_and_arms_are_left_out():
    rows = [*rows_of("3 blocks", (0.9,)), *rows_of(WHOLE, (0.9,))]
    one = claim("3 blocks", (WHOLE,))
    others = [one._replace(study="blocks"), one._replace(family="dit"), one._replace(better="3")]
    assert len(verdicts(rows, one, *others)) == 1
    assert len(verdicts(rows, one._replace(better="3 bl*"))) == 1
    assert verdicts(rows, *others) == []


def test_every_claim_is_of_arms_that_its_study_has():
    claims, studies = tool("report_claims").CLAIMS, tool("studies")
    for each in claims:
        study = studies.STUDIES[each.study]
        names = [arm.name for arm in study.arms("tiny") if arm.family == each.family]
        # arms of a second stage depend on what the first one found
        better = [] if each.better.endswith("*") else [each.better]
        wanted = {*better, *each.worse, *filter(None, [each.halfway])}
        assert wanted <= set(names), each


def test_claims_that_name_the_paper_are_of_these_arms_the_better_one_first():
    even, nets = "equal probability, [4, 4, 4]", "diffusion blocks, CNN"
    said = [
        ("families", "vit", "better than with the paper's prior", "3 blocks",
         ("3 blocks, the paper's prior",)),
        ("families", "ar", "better than the paper's mode", "3 blocks, recommended",
         ("3 blocks, the paper's",)),
        ("blocks", "dit", "the paper: two blocks are best", "2 blocks",
         ("1 block", "3 blocks", "4 blocks", "6 blocks")),
        ("partition", "dit", "the paper: equal probability is best", even,
         ("log uniform, [4, 4, 4]", "linear, [4, 4, 4]")),
        ("partition", "dit", "the paper: an even split is best", even,
         ("equal probability, [3, 6, 3]", "equal probability, [6, 4, 2]",
          "equal probability, [2, 4, 6]")),
        ("overlap", "dit", "the paper: overlap is not worse than none", "overlap 0.05",
         ("overlap 0",)),
        ("baselines", "vit", "the paper: Forward-Forward is 25 points behind or more",
         "diffusion blocks, ViT", ("forward-forward, ViT",)),
        ("baselines", "vit", "the paper: NoProp-DT is within a point", nets, ("noprop-dt, CNN",)),
        ("baselines", "vit", "the paper: NoProp's continuous forms are behind", nets,
         ("noprop-ct, CNN", "noprop-fm, CNN")),
    ]  # fmt: skip
    claims = tool("report_claims").CLAIMS
    assert [each[:5] for each in claims if "the paper" in each.text] == said


def test_the_sections_of_a_report_have_every_study_its_tables_and_claims(tmp_path):
    rows = [*rows_of("3 blocks", (0.9, 0.92)), *rows_of(WHOLE, (0.9, 0.9))]
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
    rows = rows_of("3 blocks", (0.9, 0.92), scale="small")
    path = made.write(tmp_path / "rows.jsonl", [*rows, *rows_of("3 blocks", (0.8,))])
    sections = tool("report_studies").study_sections(tool("report_rows").read([path]))
    pictures = [(each.title.split(", ")[-1], bool(each.file)) for each in sections if each.picture]
    assert pictures == [("tiny)", True), ("small)", False)]


def test_a_picture_has_a_dot_for_each_seed_and_a_mark_at_the_mean():
    rows = [*rows_of("3 blocks", (0.9, 0.92)), *rows_of(WHOLE, (0.8, 0.9))]
    [axes] = tool("report_study").study_picture([rows]).axes
    dots, means = axes.lines[::2], axes.lines[1::2]
    assert [[round(x, 6) for x in line.get_xdata()] for line in dots] == [[90, 92], [80, 90]]
    assert [round(line.get_xdata()[0], 6) for line in means] == [91, 85]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["3 blocks", WHOLE]
    best, other = (line.get_color() for line in means)
    assert best != other


def test_rows_of_a_study_are_printed_with_what_was_expected(tmp_path, capsys):
    rows = [*rows_of("3 blocks", (0.9, 0.92)), *rows_of(WHOLE, (0.9, 0.9))]
    tool("show").main((made.write(tmp_path / "rows.jsonl", rows),))
    said = capsys.readouterr().out
    assert "families, tiny: vit, digits" in said and "91.0 ± 1.4" in said
    assert "within a point of end to end" in said and "+1.0 points" in said


def test_a_row_of_a_study_must_have_its_whole_configuration(tmp_path):
    [row] = rows_of("3 blocks", [0.9])
    del row["config"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="a row of study must have config, which it lacks"):
        tool("report_rows").read([path])


def test_a_picture_has_a_panel_for_all_that_a_family_is_compared_by():
    drawn = rows_of(WHOLE, (20.0, 22.0), "frechet", family="dit")
    both = [row | {"frechet_close": 30.0} for row in drawn]
    picture_of = tool("report_studies").picture_of
    titles = [axes.get_title() for axes in picture_of([drawn]).axes]
    assert titles == ["DiT, digits"]
    titles = [axes.get_title() for axes in picture_of([rows_of(WHOLE, (0.9,)), both]).axes]
    assert titles == ["ViT, digits", "DiT, digits", "DiT, digits, on close levels"]


def test_a_picture_of_layers_has_a_panel_for_each_data_and_arm():
    sweep = {"layers": [0, 1], "block": [0, 0], "r": [0.0, 0.5], "null_low": [0.0, -0.3]}
    sweep |= {"null_high": [0.0, 0.3], "null_median": [0.0, 0.0], "p": [1.0, 0.1]}
    about = {"study": "layer-sweep", "sweeps": {"trajectory": sweep}}
    some = [rows_of(WHOLE, (0.9,), data=data, **about) for data in ("digits", "fashion")]
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
    [row] = rows_of("3 blocks", (0.9,))
    path = made.write(tmp_path / "rows.jsonl", [row | changes])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: {message}"):
        tool("report_rows").read([path])


def test_seeds_with_lists_of_other_lengths_and_studies_without_a_title_are_refused():
    with pytest.raises(ValueError, match="accuracy of a must have as many numbers for each seed"):
        study_table(rows_of("a", ([0.9], [0.9, 0.8])))
    with pytest.raises(ValueError, match=r"study must be one of families, .*, got no"):
        tool("report_studies").study_sections(rows_of("a", (0.9,), study="no"))


def test_a_difference_from_zero_has_no_share():
    both = [rows_of(name, (value,) * 2, "bits") for name, value in (("3 blocks", 1.0), (WHOLE, 0))]
    rows = [row | {"family": "mdm"} for rows in both for row in rows]
    told = claim("3 blocks", (WHOLE,))._replace(family="mdm")
    assert verdicts(rows, told) == [["-1", "**no**"]]


def test_seeds_that_ran_under_another_torch_stay_in_the_table():
    rows = rows_of("a", (0.9, 0.8, 0.7))
    rows[1] |= {"torch": "2.14.0", "commit": "def5678"}
    [table] = tool("report_rows").tables(rows, "study")
    assert [row["accuracy"] for row in table] == [0.9, 0.8, 0.7]
    said = tool("report_names").about(table)
    assert "torch 2.13.0" in said and "torch 2.14.0" in said and "def5678" in said
