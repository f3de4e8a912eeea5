import base64
import copy
import importlib
import io
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

TOOLS = Path(__file__).parents[1] / "tools"
SECTIONS = ("summary", "loss", "accuracy", "cross-entropy", "noise", "memory", "digits")
VOID = {"meta", "img", "br"}
MIB = 2**20
BLOCKS = {
    1: [(0, [0, 1, 2, 3], 0.002, 80.0, 0.002, 80.0)],
    2: [(0, [0, 1], 0.3, 80.0, 0.25, 80.0), (1, [2, 3], 0.002, 0.3, 0.002, 0.35)],
}


@pytest.fixture(scope="module")
def tool():
    """Import one of the report's files, which stand beside each other and are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module


def make_run(num_blocks, **changes):
    keys = ("index", "layers", "low", "high", "trained_low", "trained_high")
    saved = 40 * MIB // num_blocks
    run = {
        "name": "end to end" if num_blocks == 1 else f"{num_blocks} blocks",
        "num_blocks": num_blocks,
        "updates_per_layer": 600,
        "prior": [-1.2, 1.2],
        "blocks": [dict(zip(keys, block, strict=True)) for block in BLOCKS[num_blocks]],
        "loss": [[step, step % num_blocks, 2.0 / (step + 1)] for step in range(40)],
        "by_category": {"parameters": 10 * MIB, "saved_activations": saved, "temporaries": 0},
        "peak_bytes": 10 * MIB + saved,
        "saved_bytes": saved,
        "seconds_per_step": 0.08 / num_blocks,
        "seconds_per_sweep": 0.08 + 0.01 * num_blocks,
    }
    return run | changes


def make_results():
    answers = {"levels": [80.0, 0.3, 0.002], "ce_at_sigma_max": 0.12}
    image = [[16 * i + j for j in range(8)] for i in range(8)]
    drawn = {"images": [image] * 5, "image_labels": [0, 0, 0, 7, 7]}
    return {
        "device": "CPU, 2 cores",
        "torch": "2.13.0",
        "commit": "abc123",
        "command": "bash tools/demo.sh",
        "seconds": 431.0,
        "classification": [
            make_run(1, **answers, accuracy=[0.97, 0.96, 0.955], ce_by_block=[0.1]),
            make_run(2, **answers, accuracy=[0.9, 0.91, 0.92], ce_by_block=[0.1, 0.01]),
        ],
        "generation": [make_run(1, frechet=12.3, **drawn), make_run(2, frechet=11.0, **drawn)],
        "real_images": [image] * 4,
    }


def render(tool, results, tmp_path):
    path = tmp_path / "report.html"
    tool("demo_report").write_report(results, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tool, tmp_path_factory):
    """The page of make_results(), made once for the tests that only read it."""
    return render(tool, make_results(), tmp_path_factory.mktemp("page"))


class Reader(HTMLParser):
    """Collect what a page refers to, and fail where its tags do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], set(), [], [], ""

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        for key, value in attrs:
            self.ids += [value] if key == "id" else []
            self.links += [value] if key in ("src", "href", "xlink:href", "srcset") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text += data


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def row_of(page, title, task):
    table = page.split("<table>")[1 + ("classification", "generation").index(task)]
    row = next(line for line in table.splitlines() if f">{title}<" in line)
    return [re.sub(r"<[^>]+>", " ", cell).split() for cell in row.split("<td>")[1:]]


def test_page_needs_nothing_from_outside(page, tmp_path):
    reader = read(page)
    assert not reader.tags & {"script", "link", "iframe", "object", "base"}
    assert "http" not in page and "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert reader.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in reader.links)


def test_every_reference_in_a_figure_names_one_element(page):
    reader = read(page)
    assert len(set(reader.ids)) == len(reader.ids)
    named = re.findall(r"url\(#([^)]+)\)", page) + [k[1:] for k in reader.links if k[0] == "#"]
    assert named and set(named) <= set(reader.ids)


def test_every_section_and_run_is_shown(page):
    for section in SECTIONS:
        assert page.count(f'<section id="{section}">') == 1
    assert page.count("<svg") == 4 + 1 + 2 + 2 + 2
    assert page.count("<img") == 3
    assert "not measured" not in page
    for words in ("CPU, 2 cores", "2.13.0", "abc123", "7 min 11 s", "block 1, layers 2–3"):
        assert words in page


def test_each_section_says_how_it_was_measured(page):
    for section in page.split("<section")[1:]:
        assert "CPU, 2 cores; <code>bash tools/demo.sh</code>" in section


def test_distance_is_called_by_its_name(page):
    words = "Fréchet distance in the features of a small classifier trained on the digits"
    assert words in page
    assert not re.search(r"\bFID\b", read(page).text)


def test_text_from_the_results_is_escaped(tool, tmp_path):
    fields = ("device", "torch", "commit", "command")
    hostile = {field: f'<script src="{field}">&$\\"\'--><b id="x">' for field in fields}
    name = hostile["device"].replace("device", "name")
    results = make_results() | hostile
    results["classification"][1]["name"] = results["generation"][1]["name"] = name
    page = render(tool, results, tmp_path)
    reader = read(page)
    assert "<script" not in page and "x" not in reader.ids
    assert all(text in reader.text for text in (name, *hostile.values()))


@pytest.mark.parametrize("hole", [math.nan, math.inf, None, "absent"])
def test_what_was_not_measured_says_so(tool, tmp_path, hole):
    results = make_results()
    numbers = ("peak_bytes", "saved_bytes", "seconds_per_step", "frechet", "ce_at_sigma_max")
    lists = ("accuracy", "ce_by_block", "levels")
    for run in results["classification"] + results["generation"]:
        run |= {key: hole for key in numbers} | {
            key: [hole] * len(run.get(key, ())) for key in lists
        }
        run |= {"loss": [[0, 0, hole]], "by_category": {"parameters": hole}}
        for key in (*numbers, *lists, "loss", "by_category") if hole == "absent" else ():
            del run[key]
    page = render(tool, results, tmp_path)
    text = read(page).text
    assert not re.search(r"\b(nan|inf|None)\b", text)
    for title in ("Peak memory of a step", "Saved activations", "Time per step"):
        assert row_of(page, title, "generation") == [["not", "measured"]] * 2
    for section in ("loss", "accuracy", "cross-entropy", "memory"):
        part = page.split(f'<section id="{section}">')[1].split("</section>")[0]
        assert "not measured" in part and "<svg" not in part


def test_one_hole_leaves_the_rest_of_a_figure(tool, tmp_path):
    results = make_results()
    results["classification"][1] |= {"ce_at_sigma_max": None, "accuracy": [0.9, math.nan, 0.92]}
    results["classification"][1]["by_category"] = None
    results["classification"][0]["loss"][3][2] = math.nan
    page = render(tool, results, tmp_path)
    assert page.count("<svg") == 11
    cells = page.split('<section id="accuracy">')[1].split("step 2")[1].split("</tr>")[0]
    assert "96.0 %" in cells and "not measured" in cells
    for section in ("cross-entropy", "memory"):
        part = page.split(f'<section id="{section}">')[1].split("</section>")[0]
        assert part.count("not measured") == 1


def test_a_demo_without_runs_still_makes_a_page(tool, tmp_path):
    results = make_results() | {"classification": [], "generation": []}
    del results["real_images"], results["seconds"]
    reader = read(render(tool, results, tmp_path))
    assert reader.text.count("not measured") >= len(SECTIONS)


def test_losses_below_zero_are_drawn(tool, tmp_path):
    results = make_results()
    results["generation"][0]["loss"] = [[0, 0, -1.0], [1, 0, 0.0], [2, 0, 1.0]]
    page = render(tool, results, tmp_path)
    figure = page.split('aria-label="Training loss: Generation, end to end"')[1].split("</svg>")[0]
    assert "−1.0" in figure


def test_a_block_has_one_colour_and_end_to_end_follows_the_page(page, tool):
    drawing = tool("demo_drawing")
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert not any(drawing.INK in figure for figure in figures)
    assert all("currentColor" in figure for figure in figures)
    for title in ("Training loss: Generation, 2 blocks", "Accuracy after each Euler step",
                  "Cross-entropy by block", "Noise of Classification, 2 blocks"):  # fmt: skip
        figure = next(figure for figure in figures if f'"{title}"' in figure).lower()
        assert drawing.BLOCK_COLOURS[0].lower() in figure
        assert drawing.BLOCK_COLOURS[1].lower() in figure
    alone = next(
        figure for figure in figures if '"Training loss: Generation, end to end"' in figure
    )
    assert not any(colour.lower() in alone.lower() for colour in drawing.BLOCK_COLOURS)


def test_generated_digits_stand_in_the_row_of_their_class(tool, tmp_path):
    results = make_results()
    results["generation"][0]["image_labels"] = [7, 0, 7, 0, 7]
    page = render(tool, results, tmp_path).split("Generated, end to end")[1]
    assert "<span>0</span><span>7</span></div><img" in page
    data = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert Image.open(io.BytesIO(data)).size == (3 * 9 + 1, 2 * 9 + 1)


def test_same_bytes_every_run(page, tool, tmp_path):
    results = make_results()
    before = copy.deepcopy(results)
    assert render(tool, results, tmp_path) == page
    assert results == before


def test_leaves_matplotlib_as_it_was(tool, tmp_path):
    # a size of its own: what an earlier page left behind would look like no change
    with matplotlib.rc_context({"font.size": 17, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        render(tool, make_results(), tmp_path)
        assert dict(matplotlib.rcParams) == before


def test_a_failed_write_keeps_the_older_page(tool, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("older")

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        render(tool, make_results() | {"device": "another"}, tmp_path)
    assert (tmp_path / "report.html").read_text() == "older"
    assert os.listdir(tmp_path) == ["report.html"]


def test_makes_the_folder(tool, tmp_path):
    assert render(tool, make_results(), tmp_path / "new" / "folder").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("device"), "results must have device, got only torch"),
        (lambda r: r["generation"][0].pop("blocks"), "each run of generation must have blocks"),
        (lambda r: r["generation"][0]["blocks"].clear(), "'end to end' of generation must have a"),
        (lambda r: r["generation"][1]["blocks"][0].pop("low"), "each block of '2 blocks' must"),
        (lambda r: r["generation"][1].update(name="end to end"), "must have different names, got"),
    ],
)  # fmt: skip
def test_rejects(tool, tmp_path, change, message):
    results = make_results()
    change(results)
    with pytest.raises(ValueError, match=message):
        render(tool, results, tmp_path)
    assert os.listdir(tmp_path) == []
