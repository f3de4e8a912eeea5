import base64
import json
import os
import re
from xml.etree import ElementTree

import benchmark_rows as made
import numpy as np
import pytest
from checkout_tools import ROOT, tool

from dbkernels.memory.units import in_words
from dbkernels.ops import POLICIES

STORED = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def stored():
    """The rows of the repository."""
    return tool("report_rows").read([STORED])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page and the tables of those rows."""
    folder = tmp_path_factory.mktemp("report") / "new"
    page, tables = folder / "report.html", folder / "tables.md"
    assert tool("report").main([str(STORED), "--page", str(page), "--tables", str(tables)]) == 0
    return page.read_text(encoding="utf-8"), tables.read_text(encoding="utf-8")


def read(path, *rows):
    return tool("report_rows").read([made.write(path / "rows.jsonl", rows)])


def a_row(**changes):
    return next(made.training_rows(made.CPU)) | changes


def part_of(text, heading):
    return text.split(f"### {heading}\n")[1].split("\n### ")[0]


def lines_of(text, *words):
    """Cells of the lines of a table that hold all words, without what makes a cell bold."""
    lines = [line for line in text.splitlines() if all(word in line for word in words)]
    return [re.split(r" *\| *", line.replace("**", ""))[1:-1] for line in lines]


def elements_of(page):
    """The elements of a page, whose tags must nest."""
    closed = re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", page.removeprefix("<!DOCTYPE html>"))
    return list(ElementTree.fromstring(closed).iter())


def test_the_results_page_of_the_repository_is_what_its_rows_give(written):
    assert written[1] == (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside_and_has_every_line_of_the_tables(written):
    page, tables = written
    elements = elements_of(page)
    tags = [element.tag for element in elements]
    assert not {"script", "link", "iframe", "object", "base", "svg"} & set(tags)
    links = [link for each in elements for link in (each.get("src"), each.get("href")) if link]
    pictures = [base64.b64decode(link.partition(",")[2]) for link in links]
    of_studies = tables.count("](../docs/pictures/study-")
    assert len(pictures) == 5 + of_studies and all(b"<svg" in picture for picture in pictures)
    assert "@import" not in page and "http" not in page
    lines = [line for line in tables.splitlines() if line.startswith("| ") and "---" not in line]
    assert tags.count("tr") == len(lines)
    assert "<b>256 MiB</b>" in page and "<code>python benchmarks/layer.py" in page


def test_the_figures_of_a_way_stand_beside_each_other(stored, written):
    wanted = {"suite": "training", "family": "vit", "preset": "digits"}
    rows = [row for row in stored if wanted.items() <= row.items()]
    eager = next(row for row in rows if row["method"] == "end_to_end")
    way = {"method": "block_fused", "num_blocks": 3, "recompute": "qkv"}
    row = next(row for row in rows if way.items() <= row.items())
    part = part_of(written[1], "ViT digits, batch 64, float32, AMD EPYC")
    peak, sweep = row["peak_allocated_bytes"], row["sweep_ms"]
    assert lines_of(part, "| 3 |", "fused layers, qkv (cpp)") == [[
        "3", "fused layers, qkv (cpp)", "all", f"{peak / 2**20:.1f} MiB",
        f"{peak / eager['peak_allocated_bytes']:.2f}", f"{row['saved_bytes'] / 2**20:.2f} MiB",
        f"{row['step_ms']:.1f}", f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}", f"{sweep:.1f}",
        f"{sweep / eager['sweep_ms']:.2f}", f"{row['samples_per_second']:,.0f}",
        f"{100 * row['share_of_matmul_rate']:.0f} %",
    ]]  # fmt: skip
    assert sum(line.startswith(("| 1 |", "| 3 |")) for line in part.splitlines()) == len(rows)


def test_what_no_device_has_run_says_so(stored, written):
    part = part_of(written[1], "DiT-XL/2, batch 128, autocast, H100")
    lines = lines_of(part, "(triton") + lines_of(part, "(torch") + lines_of(part, "(inductor)")
    case = {"suite": "training", "device": "H100", "family": "dit"}
    assert len(lines) == sum(case.items() <= row.items() for row in stored)
    assert all("(predicted)" in line[3] for line in lines)
    assert "No H100 has run what is predicted." in part and "ms" not in part.split("\n")[2]
    assert "predicted" not in part_of(written[1], "DiT digits, batch 64, float32, AMD EPYC")


def test_two_commands_that_fill_one_table_are_both_named():
    rows = [a_row(suite="training"), a_row(suite="training", command="bash again.sh")]
    text = tool("report_names").about(rows)
    assert text.endswith("`python benchmarks/training.py --family dit` and `bash again.sh`.")
    assert "The device copies 68.9 GB/s and multiplies 0.178 TFLOP/s." in text
    assert "Times are medians of 15 rounds by wall clock." in text


def test_a_measured_peak_is_not_divided_by_a_predicted_one():
    rows = [a_row(memory="predicted"), a_row(method="selective")]
    table = tool("report_tables").table_of(rows)
    assert [line[4] for line in table] == ["of eager", "1.00", "–"]


def test_a_row_measured_again_replaces_the_earlier_one_and_a_prediction_never(tmp_path):
    rows = [a_row(sweep_ms=1.0), a_row(sweep_ms=2.0), a_row(sweep_ms=None, memory="predicted")]
    [table] = tool("report_rows").tables(read(tmp_path, *rows), "training")
    assert [row["sweep_ms"] for row in table] == [2.0]


def test_layers_of_each_kind_have_a_table_of_their_own(stored):
    found = tool("report_rows").tables(stored, "layer")
    assert [{row.get("layer") for row in table} for table in found] == [
        {None}, {"joint"}, {"parallel"},
    ]  # fmt: skip
    names = [tool("report_names").case_text(table[0]) for table in found]
    assert [name.split(",")[0] for name in names] == ["B = 4", "joint layer", "parallel layer"]


def test_the_setting_of_the_last_row_is_shown_alone():
    rows = [a_row(commit=commit, budget=n / 4) for n, commit in enumerate("abca")]
    rows.append(a_row(device="another"))
    [newest, other] = tool("report_rows").tables(rows, "training")
    assert [row["commit"] for row in newest] == ["a", "a"]
    assert [row["budget"] for row in newest] == [0.75, 0.0]
    assert other[0]["device"] == "another"


def test_ways_go_from_most_memory_to_least():
    rows = list(made.training_rows(made.CPU, num_blocks=(1, 3)))
    [table] = tool("report_rows").tables(rows[::-1], "training")
    assert table == rows[:1] + sorted(rows[1:], key=rows.index)[2:5] + rows[1:3] + [
        row for count in (1, 3) for method in ("block_stock", "block_fused")
        for policy in (None, *made.POLICIES) for offload in ("none", "cpu") for row in rows
        if (count, method, policy, offload)
        == (row["num_blocks"], row["method"], row["recompute"], row["offload"])
    ]  # fmt: skip


def test_methods_and_policies_are_those_of_the_package():
    assert tuple(POLICIES) == tool("report_rows").POLICIES
    names = set(tool("report_rows").METHODS)
    assert set(tool("report_names").LONG) == set(tool("report_pictures").COLOURS) == names


def test_text_from_the_results_is_escaped(tmp_path):
    hostile = '<script>&"\'--><b id="x">|'
    rows = [row | {"device": hostile, "implementation": hostile} for row in made.ops_rows()]
    file = made.write(tmp_path / "rows.jsonl", rows)
    page, tables = tmp_path / "a.html", tmp_path / "a.md"
    assert tool("report").main([str(file), "--page", str(page), "--tables", str(tables)]) == 0
    elements = elements_of(page.read_text())
    assert "script" not in [each.tag for each in elements]
    assert hostile in "".join(elements[0].itertext())
    assert hostile.replace("|", "\\|") in tables.read_text()


def test_peaks_and_times_are_drawn_where_the_rows_say():
    rows = list(made.training_rows(made.CPU, num_blocks=(1, 3)))
    titles, figures = zip(*((each.title, each.picture) for each in
                            tool("report_pictures").pictures(rows)), strict=True)  # fmt: skip
    assert titles == ("Peak memory by number of blocks", "Peak memory against time")
    peaks, times = (figure.axes[0] for figure in figures)
    lines = {line.get_label(): line for line in peaks.lines}
    whole = {row["method"]: row["peak_allocated_bytes"] for row in rows[:3]}
    assert set(lines["eager"].get_ydata()) == {whole["end_to_end"]}
    assert set(lines["checkpointed, every layer"].get_ydata()) == {whole["checkpointed"]}
    fused = [row for row in rows if (row["method"], row["offload"]) == ("block_fused", "none")]
    most = [max(row["peak_allocated_bytes"] for row in fused if row["num_blocks"] == count)
            for count in (1, 3)]  # fmt: skip
    assert list(lines["fused layers"].get_ydata()) == most
    drawn = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in times.lines}
    assert drawn == {(row["sweep_ms"], row["peak_allocated_bytes"]) for row in rows}


def test_a_picture_of_predictions_says_so_and_has_no_times():
    rows = list(made.training_rows(predicted=True, num_blocks=(1, 3)))
    [peaks] = tool("report_pictures").pictures(rows)
    assert peaks.picture.axes[0].get_ylabel() == "peak of a step, predicted"


def test_steps_share_an_axis_and_the_leanest_has_one_of_its_own(stored):
    [rows] = tool("report_rows").tables(stored, "timeline")
    section = tool("report_pictures").timeline_section(rows)
    *shared, alone = section.picture.axes
    assert len(shared) == len(rows)
    assert len({axes.get_ylim() for axes in shared}) == 1
    assert alone.get_ylim()[1] == pytest.approx(1.05 * rows[-1]["peak_allocated_bytes"] / 2**30)
    for axes, row in zip(shared, rows, strict=True):
        top = max(area.get_paths()[0].vertices[:, 1].max() for area in axes.collections)
        assert top == pytest.approx(row["peak_allocated_bytes"] / 2**30)
        assert in_words(row["peak_allocated_bytes"]) in axes.get_title()


def test_bars_stand_beside_the_ceiling_of_the_device(stored):
    *_, section = tool("report_pictures").pictures(stored)
    *_, layer = tool("report_rows").tables(stored, "layer")
    axes = section.picture.axes[-1]
    assert [bar.get_width() for bar in axes.patches] == [row["achieved_tflops"] for row in layer]
    assert set(axes.lines[0].get_xdata()) == {layer[0]["matmul_tflops"]}


def test_learning_is_drawn_over_the_updates_of_a_layer():
    rows = list(made.demo_rows())
    [section] = tool("report_pictures").pictures(rows)
    vit, _, accuracy = section.picture.axes
    assert [line.get_label() for line in vit.lines] == [
        "end to end", "block 0 of 3", "block 1 of 3", "block 2 of 3",
    ]  # fmt: skip
    assert np.allclose(vit.lines[2].get_xdata(), [500 / 3, 1000 / 3, 500])
    assert list(vit.lines[2].get_ydata()) == rows[1]["loss"][1]
    assert [list(line.get_ydata()) for line in accuracy.lines] == [
        row["accuracy"] for row in rows[:2]
    ]


def test_models_of_text_have_a_table_pictures_and_texts_of_their_own(tmp_path):
    rows = [*made.demo_rows(), *made.text_demo_rows()]
    file = made.write(tmp_path / "rows.jsonl", rows)
    page, tables = tmp_path / "a.html", tmp_path / "a.md"
    assert tool("report").main([str(file), "--page", str(page), "--tables", str(tables)]) == 0
    assert page.read_text().count("<img") == 3
    text = tables.read_text().split("Two models trained on Shakespeare")[1]
    assert lines_of(text, "| AR |", "3 blocks")[0][2:4] == ["2.800", "1.500, 0.900, 0.400"]
    assert "the ar 3" in text and "let us sit upon the ground" in text


def test_the_density_of_information_is_drawn_in_bits_with_those_of_each_block():
    *_, row = rows = list(made.text_demo_rows())
    density, entropy, masked = tool("report_text").information_picture(rows).axes
    curve = row["curves"][1]
    levels, errors = np.array(curve["levels"]), np.array(curve["errors"])
    assert np.allclose(density.lines[1].get_xdata(), levels)
    assert np.allclose(density.lines[1].get_ydata(), errors / levels**2 / np.log(2))
    assert np.allclose(entropy.lines[1].get_ydata(), np.array(curve["cross_entropy"]) / np.log(2))
    bits = ["1.50 bits", "0.90 bits", "0.40 bits"]
    of_blocks = [f"block {block}: {each}" for block, each in enumerate(bits)]
    assert [each.get_text() for each in density.get_legend().get_texts()] == of_blocks
    assert [each.get_text() for each in masked.texts] == [" end to end\n 2.60 bits", *bits]
    areas = [bar.get_width() * bar.get_height() for bar in masked.patches]
    assert np.allclose(areas, [2.6, 1.5, 0.9, 0.4])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a line must be one JSON object, got '{'"),
        ("[1]", r"a line must be one JSON object, got '\[1\]'"),
        (a_row(suite="speed"), "suite must be one of demo, .*, layer, ops, got 'speed'"),
        ({"a": 1}, "suite must be one of demo, answers, .*, ops, got None"),
        ({"suite": ["a"]}, r"suite must be one of demo, .*, got \['a'\]"),
        ({"op": "gelu"}, "a row of ops must have shape, dtype, direction"),
        (a_row(method="magic"), "method must be one of end_to_end, .*, got 'magic'"),
        (a_row(offload="some"), "offload must be one of none, cpu, got 'some'"),
        (a_row(launch="late"), "launch must be one of ops, graph, got 'late'"),
        (a_row(sweep_ms=-1), "sweep_ms must be a finite number from 0 on, got -1"),
        (a_row(step_ms="fast"), "step_ms must be a finite number from 0 on, got 'fast'"),
        (a_row(sweep_ms=float("nan")), "sweep_ms must be a finite number from 0 on, got nan"),
        (a_row(peak_allocated_bytes=True), "peak_allocated_bytes must be a finite number"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, capsys, line, message):
    text = line if isinstance(line, str) else json.dumps(line)
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{json.dumps(a_row())}\n\n{text}\n")
    assert tool("report").main([str(file), "--page", str(tmp_path / "page.html")]) == 1
    assert re.fullmatch(rf"{file}:3: {message}.*\n", capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_a_path_without_results_is_named(tmp_path, capsys):
    (tmp_path / "rows.json").write_text("{}")
    assert tool("report").main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"{tmp_path} must hold results as *.jsonl, got none\n"
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    for path in (tmp_path / "absent.jsonl", tmp_path):
        assert tool("report").main([str(path)]) == 1
        assert ".jsonl must be a file of JSON lines, got " in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_named_and_an_older_one_stays(
    tmp_path, capsys, monkeypatch
):
    file = made.write(tmp_path / "a.jsonl", made.ops_rows())
    assert tool("report").main([str(file), "--page", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path} must be a file that can be written, got ")
    (tmp_path / "page.html").write_text("older")

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert tool("report").main([str(file), "--page", str(tmp_path / "page.html")]) == 1
    assert "no space left" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text() == "older"
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "page.html"]
