"""The page of the report of benchmarks: sections of training, one layer, the ops, comparisons."""

from collections.abc import Callable, Sequence
from html import escape

from page import document
from report_benchmarks import comparison, layer_table, ops_table, settings
from report_peaks import composition_figure, peaks_figure
from report_rows import SETTING, SUITES, Row, is_predicted, key, newest, tables
from report_tables import Table, html_table, inline_html
from report_text import NOT_RUN, about, case_text
from report_timeline import (
    alone_figure,
    leanest,
    step_text,
    timeline_table,
    together_figure,
)
from report_tradeoff import tradeoff_figure
from report_training import OVERHEAD, PAPER_OVERHEAD, overhead_table, training_table

TITLE = "What training block by block needs and takes"
INTRODUCTION = """A network of residual layers is trained end to end, or cut into blocks of which
each is trained alone (DiffusionBlocks, arXiv:2506.14202). A step updates one block; a sweep is one
step of every block, so that every layer is updated once. Every ratio is to the same network trained
end to end in eager torch, on the same device and at the same precision. The best figure of a group
is bold; what loses stays in."""
TRADEOFF = """Down and to the left is better. A line joins what no other point of its method beats;
a fainter point is beaten. Beside a point: the number of blocks and the recompute policy, with
1/6 where one block of six is on the device; or a budget of activation memory. Hollow: the peak is
predicted."""
PEAKS = """End to end at the left; then block by block, with a line for each policy. Dashed: one
block's parameters and optimizer state on the device, the others' in host memory. Hollow:
predicted."""
COMPOSITION = """Of a step, by category: end to end, and at the largest number of blocks. With 1/6,
one block of six is on the device."""
TOGETHER = """From the first op of a step to its last, at the highest moment of each part of it; all
steps on one axis of bytes, and as wide as each other. Dotted: the backward begins."""
PAPER = f"The paper puts it at {100 * PAPER_OVERHEAD:.1f} %; below zero, a sweep is faster."


def page(rows: Sequence[Row]) -> str:
    """Lay out everything that was read.

    Args:
        rows:  of `report_rows.read`
    Returns:
        HTML that refers to no other file.
    """
    groups = {suite: tables(rows, suite) for suite in SUITES}
    sections = [
        _section("training", "Training", groups["training"], _training),
        _section("timeline", "Memory of one step", groups["timeline"], _timeline),
        _section("layer", "One layer", groups["layer"], _of(layer_table)),
        _section("ops", "Ops", groups["ops"], _of(ops_table)),
        _comparisons({suite: groups[suite] for suite, of in SUITES.items() if of.ms}),
    ]
    devices = ", ".join(dict.fromkeys(str(row["device"]) for row in rows))
    return document(
        TITLE,
        ["demo_report.css", "report.css"],
        header=f"<h1>{TITLE}</h1>\n<p>{INTRODUCTION}</p>\n{_contents(groups)}",
        main="\n".join(filter(None, sections)),
        footer=f'<p class="measured">{len(rows)} rows of results, from {escape(devices)}.</p>',
    )


def _anchor(group: Sequence[Row]) -> str:
    words = f"{group[0]['suite']} {_heading(group)}".lower()
    return "".join(letter if letter.isalnum() else "-" for letter in words)


def _heading(group: Sequence[Row]) -> str:
    followed = ", op after op" if group[0]["suite"] == "timeline" else ""
    return f"{case_text(group[0])}, on {group[0]['device']}{followed}"


def _contents(groups: dict[str, list[list[Row]]]) -> str:
    items = ""
    for suite, of_suite in groups.items():
        for group, _ in newest(of_suite, suite):
            items += f'<li><a href="#{_anchor(group)}">{escape(_heading(group))}</a></li>'
    return f"<nav><ul>{items}</ul></nav>"


def _section(
    name: str, title: str, groups: list[list[Row]], body: Callable[[list[Row]], str]
) -> str | None:
    """The newest setting of each case, and older ones folded up."""
    if not groups:
        return None
    parts = []
    for group, older in newest(groups, name):
        parts.append(f'<h3 id="{_anchor(group)}">{escape(_heading(group))}</h3>{body(group)}')
        for other in older:
            parts.append(f"<details><summary>Before: {inline_html(about(other))}</summary>")
            parts.append(f"{body(other)}</details>")
    return f'<section id="{name}"><h2>{title}</h2>\n{"".join(parts)}</section>'


def _shown(table: Table, rows: Sequence[Row]) -> str:
    return f'{html_table(table)}\n<p class="measured">{inline_html(about(rows))}</p>\n'


def _of(table: Callable[[Sequence[Row]], Table]) -> Callable[[list[Row]], str]:
    return lambda rows: _shown(table(rows), rows)


def _training(rows: list[Row]) -> str:
    # the same case has a figure in each setting
    name = f"{_heading(rows)}, {about(rows)}"
    tag = ", predicted" if all(map(is_predicted, rows)) else ""
    cells = [
        _figure("Time against memory", tradeoff_figure(rows, f"Time: {name}"), TRADEOFF),
        _figure(f"Peak of a step{tag}", peaks_figure(rows, f"Peak: {name}"), PEAKS),
        _figure(f"What the peak is{tag}", composition_figure(rows, f"Parts: {name}"), COMPOSITION),
    ]
    overhead = overhead_table(rows)
    if overhead:
        cells.append(_figure(OVERHEAD, _shown(overhead, rows), PAPER))
    columns = f'<div class="columns">{"".join(cells)}</div>\n'
    return _warning(rows) + columns + _shown(training_table(rows), rows)


def _timeline(rows: list[Row]) -> str:
    # the same case has a figure in each setting
    name = f"{_heading(rows)}, {about(rows)}"
    least = leanest(rows)
    alone = f"{step_text(least).capitalize()}, on an axis of bytes of its own."
    cells = [
        _figure(
            "Live bytes of a step, predicted", together_figure(rows, f"Steps: {name}"), TOGETHER
        ),
        _figure("The leanest step, predicted", alone_figure(least, f"One: {name}"), alone),
    ]
    columns = f'<div class="columns">{"".join(cells)}</div>\n'
    return _warning(rows) + columns + _shown(timeline_table(rows), rows)


def _warning(rows: Sequence[Row]) -> str:
    peaks = sum(map(is_predicted, rows))
    if not peaks:
        return ""
    which = "Every peak here is" if peaks == len(rows) else f"{peaks} of {len(rows)} peaks are"
    times = "" if any(row.get("sweep_ms") for row in rows) else " There are no times."
    return f'<p class="predicted"><b>{which} {NOT_RUN}.</b>{times}</p>'


def _figure(title: str, content: str | None, caption: str) -> str:
    if content is None:
        return ""
    words = f'<figcaption>{title}</figcaption><p class="measured">{caption}</p>'
    return f"<figure>{words}{content}</figure>"


def _comparisons(groups: dict[str, list[list[Row]]]) -> str | None:
    everything = [group for of_suite in groups.values() for group in of_suite]
    letters = settings(everything)
    found = {suite: comparison(of_suite, suite, letters) for suite, of_suite in groups.items()}
    if not any(found.values()):
        return None
    parts = ""
    for suite, table in found.items():
        if table:
            used = {column.title.rpartition(", ")[2] for column in table.columns}
            where = "".join(
                f"<li><b>{letters[place]}</b>: {inline_html(about(rows))}</li>"
                for place, rows in _by_setting(groups[suite]).items()
                if letters[place] in used
            )
            parts += f'<h3>{suite.capitalize()}</h3>{html_table(table)}<ul class="measured">'
            parts += f"{where}</ul>"
    return f'<section id="settings"><h2>Devices and commits</h2>{parts}</section>'


def _by_setting(groups: Sequence[list[Row]]) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for group in groups:
        found.setdefault(key(group[0], SETTING), []).extend(group)
    return found
