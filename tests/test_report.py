import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import benchmark_rows as made
import pytest
from test_demo_report import read as read_html

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
OLDER = made.CPU | {"commit": "0000000"}
CIFAR = {"family": "vit", "preset": "cifar100", "saved": 1300 * made.MIB, "ms": 2500.0}
FEW = {"num_blocks": (1, 3)}


@pytest.fixture(scope="module")
def tool():
    """Import one of the report's files, which stand beside each other and are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module


def run(tool, capsys, *arguments):
    status = tool("report").main([str(word) for word in arguments])
    return status, capsys.readouterr().err.strip()


def a_row(**changes):
    return next(made.training_rows(made.CPU, **CIFAR)) | changes


@pytest.fixture(scope="module")
def page(tool, tmp_path_factory):
    """A page of every suite, two devices and two commits, and a prediction."""
    folder = tmp_path_factory.mktemp("results")
    older = made.training_rows(OLDER, **CIFAR | {"ms": 5000.0}, num_blocks=(3,))
    rows = [*older, *made.training_rows(made.CPU, **CIFAR, **FEW)]
    made.write(folder / "cpu" / "training.jsonl", rows)
    made.write(folder / "cpu" / "ops.jsonl", made.ops_rows())
    made.write(folder / "cpu" / "layer.jsonl", made.layer_rows())
    made.write(folder / "gpu" / "training.jsonl", made.training_rows(predicted=True, **FEW))
    assert tool("report").main([str(folder), "--out", str(folder / "new" / "page.html")]) == 0
    return (folder / "new" / "page.html").read_text(encoding="utf-8")


def part_of(page, heading):
    return re.split(r"<h3|</section>", page.split(f">{heading}</h3>")[1])[0]


def cells_of(part, *words):
    """Cells of the table's row that has all of the words."""
    row = next(row for row in part.split("<tr>") if all(word in row for word in words))
    return [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.split(r"<td[^>]*>", row)[1:]]


def test_page_needs_nothing_from_outside(page):
    reader = read_html(page)
    assert not reader.tags & {"script", "link", "iframe", "object", "base"}
    assert "http" not in page and "@import" not in page
    assert reader.links and all(link.startswith("#") for link in reader.links)
    named = re.findall(r"url\(#([^)]+)\)", page) + [link[1:] for link in reader.links]
    assert len(set(reader.ids)) == len(reader.ids)
    assert set(named) <= set(reader.ids)
    assert "prefers-color-scheme: dark" in page


def test_every_suite_and_case_has_a_section(page):
    for section in ("training", "layer", "ops", "settings"):
        assert page.count(f'<section id="{section}">') == 1
    for heading in (
        "ViT cifar100, batch 64, float32, on AMD EPYC",
        "DiT-S/2, batch 64, float32, on NVIDIA H100 80GB HBM3",
        "B = 4, T = 256, dim = 384, num_heads = 6, hidden = 1536, float32, on AMD EPYC",
        "4 x 256 x 384, float32, on AMD EPYC",
    ):
        assert f">{heading}</h3>" in page
        assert f">{heading}</a>" in page


def test_every_table_says_where_it_comes_from(page):
    for rest in page.split("</table></div>")[1:]:
        below = re.split(r"<table", rest)[0]
        assert "torch 2.13.0" in below and "triton 3.9.0" in below and "commit " in below
        assert re.search(r"printed by <code>python (-m dbkernels bench|benchmarks/\w+\.py)", below)
    gpu = part_of(page, "DiT-S/2, batch 64, float32, on NVIDIA H100 80GB HBM3")
    assert "NVIDIA H100 80GB HBM3, driver 570.86, 16 CPU threads" in gpu


def test_figures_of_a_way_are_beside_each_other(page):
    part = part_of(page, "ViT cifar100, batch 64, float32, on AMD EPYC").split("<details")[0]
    rows = {(r["method"], r["num_blocks"], r["recompute"], r["offload"]): r
            for r in made.training_rows(made.CPU, **CIFAR, **FEW)}  # fmt: skip
    row, base = rows["block_fused", 3, "qkv", "cpu"], rows["end_to_end", 1, None, "none"]
    blocks = part.split(">3 blocks</th>")[1]
    peak, sweep = row["peak_allocated_bytes"], row["sweep_ms"]
    assert cells_of(blocks, "fused layers", ">qkv<", ">one block<") == [
        ["qkv"],
        ["one", "block"],
        [f"{peak / made.MIB:.0f}", "MiB"],
        [f"{peak / base['peak_allocated_bytes']:.2f}"],
        [
            f"{row[name]:,.0f}" if name != "to" else name
            for name in ("step_ms", "p20_ms", "to", "p80_ms")
        ],
        [f"{sweep:,.0f}"],
        [f"{sweep / base['sweep_ms']:.2f}"],
        [f"{row['samples_per_second']:.1f}"],
        [f"{100 * row['share_of_matmul_rate']:.0f}", "%"],
    ]


def test_the_best_of_each_number_of_blocks_is_bold_and_losers_stay(page):
    part = part_of(page, "ViT cifar100, batch 64, float32, on AMD EPYC").split("<details")[0]
    table = part.split('<table class="figures">')[-1]
    whole, three = (group.split("</tbody>")[0] for group in table.split("<tbody>")[1:])
    assert "<b>" in cells_row(three, ">layer<", ">one block<")[3]
    assert "<b>" not in cells_row(three, ">layer<", ">all<")[3]
    fastest = cells_row(whole, "torch.compile", "budget 1<")
    assert ["<b>" in fastest[column] for column in (5, 6, 7, 8)] == [True, True, False, True]
    assert whole.count("<tr>") == 1 + 6 + 5
    assert three.count("<tr>") == 1 + 2 * (1 + 5)


def cells_row(part, *words):
    row = next(row for row in part.split("<tr>") if all(word in row for word in words))
    return re.split(r"(?=<td|<th)", row)[1:]


def test_overhead_is_a_sweep_against_eager_minus_one(page):
    rows = list(made.training_rows(made.CPU, **CIFAR, **FEW))
    base = rows[0]["sweep_ms"]
    fused = [
        row["sweep_ms"] for row in rows if (row["recompute"], row["offload"]) == ("none", "none")
    ]
    texts = [f"{100 * (ms / base - 1):+.1f}".replace("-", "−") for ms in fused]
    part = page.split("overhead of a sweep against the end-to-end eager step")[1]
    assert cells_of(part, "fused layers, recompute none") == [[text, "%"] for text in texts]
    assert "The paper puts it at 7.1 %" in part


def test_predictions_say_so(page):
    part = part_of(page, "DiT-S/2, batch 64, float32, on NVIDIA H100 80GB HBM3")
    assert "<b>Every peak here is predicted, no GPU has run it.</b> There are no times." in part
    assert "Time against memory" not in part and "overhead" not in part
    assert "predicted peak of a step, GiB" in part
    assert part.count("<small>predicted") == 18 + 5
    assert "6 fused" not in part and "1/3 fused, layer" in part
    measured = part_of(page, "ViT cifar100, batch 64, float32, on AMD EPYC")
    assert "predicted, no GPU" not in measured and "Time against memory" in measured


def test_every_point_has_a_tooltip(page):
    rows = list(made.training_rows(made.CPU, **CIFAR, **FEW))
    figure = page.split('aria-label="Time: ViT cifar100')[1].split("</svg>")[0]
    assert figure.count("<title>") == len(rows)
    assert "<title>3 blocks: fused layers, qkv\none block on the device\npeak " in figure
    assert "sweep of all blocks, ms" in figure and "peak of a step, " in figure
    for label in ("compiled", "checkpointed", "selective", "eager blocks", "fused blocks"):
        assert f">{label}</text>" in figure


def test_a_newer_commit_comes_first_and_the_older_is_folded(page):
    part = part_of(page, "ViT cifar100, batch 64, float32, on AMD EPYC")
    newer, older = part.split("<details>")
    assert "commit abc1234" in newer and "commit 0000000" not in newer
    assert "commit 0000000" in older and "commit abc1234" not in older


def test_the_same_case_is_compared_across_commits(page):
    part = page.split('<section id="settings">')[1]
    cells = cells_of(part, "3 blocks, fused layers, mlp, offload cpu")
    assert [cell[1:] for cell in cells] == [
        [], ["0.50", "of", "the", "first"], ["MiB"], ["MiB", "1.00", "of", "the", "first"],
    ]  # fmt: skip
    # one block was run at the newer commit alone, the model of the GPU on it alone
    assert "1 block, fused" not in part and "DiT" not in part
    assert "<b>A</b>: AMD EPYC" in part and "<b>B</b>: AMD EPYC" in part
    assert "<b>C</b>" not in part


def test_text_from_the_results_is_escaped(tool):
    hostile = '<script>&"\'--><b id="x">'
    about = made.CPU | dict.fromkeys(("device", "commit", "torch"), hostile)
    rows = [row | {"suite": "layer", "command": hostile} for row in made.layer_rows(about)]
    rows += [a_row(**about, preset=hostile, command=hostile, implementation=hostile)]
    text = tool("report_page").page(rows)
    reader = read_html(text)
    assert "<script" not in text and "x" not in reader.ids
    assert hostile in reader.text


def test_a_predicted_point_is_hollow(tool):
    rows = [a_row(memory="predicted"), a_row(method="selective")]
    svg = tool("report_tradeoff").tradeoff_figure(rows, "Time")
    marks = re.split(r'<g id="[^"]*-tip-\d">', svg)[1:]
    assert ["fill-opacity: 0" in mark.split("</g>")[0] for mark in marks] == [True, False]


def test_ways_with_the_optimizer_in_the_backward_stand_in_the_table_alone(tool):
    rows = list(made.training_rows(num_blocks=(1, 2)))
    inside = [row | {"optimizer_in_backward": True} for row in rows]
    peaks = tool("report_peaks")
    assert peaks.peaks_figure([*rows, *inside], "peaks") == peaks.peaks_figure(rows, "peaks")
    both = peaks.composition_figure([*rows, *inside], "parts")
    assert both == peaks.composition_figure(rows, "parts")
    lines = [
        line for _, group in tool("report_training").training_table(inside).groups for line in group
    ]
    assert all(line[0].note.endswith(", optimizer in backward") for line in lines)


def test_a_measured_peak_is_not_divided_by_a_predicted_one(tool):
    training = tool("report_training")
    rows = [a_row(memory="predicted"), a_row(method="selective")]
    table = training.training_table(rows)
    assert [line[4].text for line in table.groups[0][1]] == ["1.00", "–"]


def test_a_frontier_holds_what_nothing_beats(tool):
    points = [(3, 1), (1, 9), (2, 4), (2, 5), (4, 1), (1.5, 9)]
    rows = [{"sweep_ms": x, "peak_allocated_bytes": y} for x, y in points]
    best = tool("report_tradeoff").frontier(rows)
    assert [(row["sweep_ms"], row["peak_allocated_bytes"]) for row in best] == [
        (1, 9), (2, 4), (3, 1),
    ]  # fmt: skip


def test_labels_are_spread_in_their_order(tool):
    spread = tool("report_labels").spread
    assert spread([5, 5.5, 50], 10, 0, 100) == [5, 15, 50]
    assert spread([99, 98], 10, 0, 100) == [100, 90]
    assert spread([1, 2, 3], 10, 0, 12) == [0, 6, 12] or spread([1, 2, 3], 10, 0, 12)[-1] == 12


def test_results_without_eager_or_categories_still_make_a_page(tool):
    rows = [row | {"by_category": None} for row in made.training_rows(made.CPU, num_blocks=(2,))]
    text = tool("report_page").page([row for row in rows if row["method"] != "end_to_end"])
    assert "overhead" not in text and "What the peak is" not in text
    assert "Time against memory" in text


def test_the_committed_results_make_a_page(tmp_path):
    out = tmp_path / "report.html"
    words = [sys.executable, "tools/report.py", "benchmarks/results", "--out", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out)
    assert "one layer, forward and backward" in out.read_text()


def test_a_page_that_cannot_be_written_is_named(tool, tmp_path, capsys):
    file = made.write(tmp_path / "a.jsonl", made.layer_rows())
    for out in (tmp_path, file / "page.html"):
        status, error = run(tool, capsys, file, "--out", out)
        assert status == 1
        assert error.startswith(f"{out} must be a file that can be written, got ")
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert os.listdir(tmp_path.parent).count(tmp_path.name) == 1


def test_readme_takes_no_out(tool, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        tool("report").main([str(tmp_path), "--readme", "--out", "page.html"])
