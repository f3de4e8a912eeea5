import importlib
import re
from pathlib import Path

import benchmark_rows as made
import pytest
from test_demo_report import read as read_html

TOOLS = Path(__file__).parents[1] / "tools"
H100 = made.GPU | {"device": "H100", "driver": None}


@pytest.fixture(scope="module")
def tool():
    """Import one of the report's files, which stand beside each other and are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def page(tool, tmp_path_factory):
    """A page of steps at two commits, with rows of the other suites."""
    folder = tmp_path_factory.mktemp("results")
    command = {"command": "python benchmarks/timeline.py --device cpu"}
    older = made.timeline_rows(H100 | {"commit": "0000000"})
    made.write(folder / "a.jsonl", older)
    made.write(folder / "b.jsonl", (row | command for row in made.timeline_rows(H100)))
    made.write(folder / "c.jsonl", made.ops_rows())
    assert tool("report").main([str(folder), "--out", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def section(page):
    """Of the newest commit."""
    return page.split('<section id="timeline">')[1].split("<details")[0]


def heights(svg, tool, name):
    """Height of an area of one category over its width, at each of its corners, in points."""
    colour = tool("demo_figures").CATEGORIES[name][1].lower()
    areas = []
    for path in re.findall(rf'<path d="([^"]*)"[^>]*style="fill: {colour}"', svg):
        corners = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]
        xs = sorted({x for x, _ in corners})
        ys = {x: [y for at, y in corners if at == x] for x in xs}
        # the legend's patch has two corners above each other
        if len(xs) > 2:
            areas.append([max(ys[x]) - min(ys[x]) for x in xs])
    return areas


def test_the_picture_stands_in_the_page_which_needs_no_other_file(page, section):
    reader = read_html(page)
    assert not reader.tags & {"script", "link", "iframe", "object", "base", "img"}
    assert "http" not in page and len(set(reader.ids)) == len(reader.ids)
    assert section.count("<svg ") == 2 and page.count("<svg ") == 4
    assert ">DiT-XL/2, batch 128, autocast, on H100, op after op</h3>" in section
    assert ">DiT-XL/2, batch 128, autocast, on H100, op after op</a>" in page


def test_the_picture_says_that_it_is_predicted_for_what_and_by_which_command(section):
    assert "<b>Every peak here is predicted, no GPU has run it.</b>" in section
    assert section.count("predicted, MiB allocated") == 2
    below = section.split("</table></div>")[1]
    assert "H100, 16 CPU threads, torch 2.13.0" in below and "commit abc1234" in below
    assert "printed by <code>python benchmarks/timeline.py --device cpu</code>" in below
    for figure in re.findall(r'aria-label="([^"]*)"', section):
        assert "on H100" in figure and "commit abc1234" in figure


def test_an_older_commit_is_folded_up(page):
    older = page.split('<section id="timeline">')[1].split("<details")[1]
    assert "commit 0000000" in older and older.split("</section>")[0].count("<svg ") == 2


def test_steps_share_one_axis_of_bytes(tool):
    svg = tool("report_timeline").together_figure(list(made.timeline_rows()), "Steps")
    eager, checkpointed, fused = heights(svg, tool, "saved_activations")
    assert eager.index(max(eager)) == 2
    assert max(eager) == pytest.approx(5 * max(checkpointed), rel=1e-3)
    assert max(eager) == pytest.approx(20 * max(fused), rel=1e-3)
    first = [area[0] for area in heights(svg, tool, "optimizer")]
    assert first[0] == pytest.approx(4 * first[2], rel=1e-3)
    # workspaces are among them
    for area in heights(svg, tool, "temporaries"):
        assert area == pytest.approx([2 * max(eager) / 40] * 5, rel=1e-3)


def test_the_leanest_step_has_an_axis_of_its_own(tool):
    timeline, rows = tool("report_timeline"), list(made.timeline_rows())
    assert timeline.leanest(rows) is rows[2]
    [alone] = heights(timeline.alone_figure(rows[2], "One"), tool, "saved_activations")
    together = heights(timeline.together_figure(rows, "Steps"), tool, "saved_activations")
    assert max(alone) > 5 * max(together[2])


def test_steps_are_named_with_their_peaks(tool):
    timeline, rows = tool("report_timeline"), list(made.timeline_rows())
    svg = timeline.together_figure(rows, "Steps")
    for text in ("eager", "checkpointed", "fused blocks", "recompute layer", "1 of 4 on device"):
        assert f">{text}<" in svg
    for peak in ("48 MiB", "16 MiB", "5.5 MiB"):
        assert f">{peak}<" in svg
    assert svg.count("<title>") == 3
    last = "fused layers, layer, 1 of 4 blocks on the device\npeak 5.5 MiB\nat backward: aten::mm"
    assert f"<title>{last}</title>" in svg
    assert ">inputs<" not in svg and ">saved activations<" in svg


def test_phases_with_room_are_named(tool):
    svg = tool("report_timeline").alone_figure(next(made.timeline_rows()), "One")
    assert ">forward<" in svg and ">backward<" in svg and ">update<" not in svg


def test_the_table_has_what_is_alive_at_each_peak(tool):
    table = tool("report_timeline").timeline_table(list(made.timeline_rows()))
    ((_, (eager, _, fused)),) = table.groups
    assert [cell.text for cell in eager] == [
        "eager", "48 MiB", "1.00", "2 MiB", "4 MiB", "40 MiB", "0 bytes", "2 MiB", "backward: mm",
    ]  # fmt: skip
    assert (fused[0].note, fused[2].text) == ("1 of 4 blocks on the device", "0.11")
    assert fused[1].best and fused[1].predicted and not eager[1].best


def test_gradients_that_are_freed_are_named(tool):
    rows = [
        *made.timeline_rows(),
        *(row | {"optimizer_in_backward": True} for row in made.timeline_rows()),
    ]
    timeline = tool("report_timeline")
    svg = timeline.together_figure(rows, "Steps")
    assert svg.count(">optimizer in backward<") == 3
    lines = timeline.timeline_table(rows).groups[0][1]
    assert lines[3][0].text == "eager, optimizer in backward" and lines[3][2].text == "1.00"


def test_the_readme_has_no_table_of_it(tool, tmp_path):
    rows = tool("report_rows").read([made.write(tmp_path / "a.jsonl", made.timeline_rows())])
    assert tool("report_readme").rewritten("# Title\n", rows) == "# Title\n"
    with pytest.raises(ValueError, match="must name one of training, layer, ops, got 'timeline'"):
        tool("report_readme").rewritten("<!-- table: timeline -->\n<!-- end -->", rows)


def test_the_committed_results_have_a_picture(tool):
    folder = TOOLS.parent / "benchmarks" / "results"
    rows = tool("report_rows").read([folder])
    [steps] = tool("report_rows").tables(rows, "timeline")
    assert {(row["device"], row["preset"], row["batch"]) for row in steps} == {
        ("H100", "XL/2", 128)
    }
    methods = [row["method"] for row in steps]
    assert methods[0] == "end_to_end" and methods[-1] == "block_fused"
    assert all(row["command"].startswith("python benchmarks/timeline.py") for row in steps)
    for file in folder.rglob("timeline.jsonl"):
        assert file.stat().st_size < 200_000
