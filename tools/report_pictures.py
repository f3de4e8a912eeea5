"""The pictures of the report, each with a panel for every case."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import Section
from palette import PALETTE
from report_names import FAMILIES, LONG, blocks_text, case_text, place_text, run_text
from report_rows import BLOCKWISE, METHODS, Row, is_plain, is_predicted, tables
from report_text import information_section

from dbkernels.memory.units import UNITS, in_words

NAMES = {"shakespeare": "Shakespeare"}  # of presets of the demo
GIB = UNITS["GiB"]
RATES = {"GB/s": ("achieved_gbps", "copy_gbps"), "TFLOP/s": ("achieved_tflops", "matmul_tflops")}
COLOURS = dict(zip(METHODS, PALETTE, strict=False))
IMPLS = {"eager": "black", "compiled": "#0072B2", "checkpointed": "#CC79A7", "fused": "#009E73"}


def pictures(rows: Sequence[Row]) -> list[Section]:
    """Draw what there are rows for.

    Args:
        rows:  of `report_rows.read`
    Returns:
        sections, each with one picture.
    """
    training, demo, steps = (tables(rows, suite) for suite in ("training", "demo", "timeline"))
    timed = [table for table in training if any(row["sweep_ms"] for row in table)]
    rates = tables(rows, "ops") + tables(rows, "layer")
    found = [
        Section(
            "Peak memory by number of blocks",
            "Lines across are end to end. A band spans the recompute policies of the fused layers.",
            picture=_by_case(_peaks, training),
        ),
        Section(
            "Peak memory against time",
            "Down and to the left is better. A digit is a number of blocks, a dot is end to end.",
            picture=_by_case(_tradeoff, timed),
        ),
        *(timeline_section(table) for table in steps[:1]),
        *(learning_section(table) for table in demo),
        *(information_section(table) for table in demo),
        Section(
            "Ops and a layer against what the device can do",
            "The dotted line is the rate at which the device copies, or multiplies matrices.",
            picture=_by_case(_rates, rates),
        ),
    ]
    return [section for section in found if section.picture]


def _by_case(paint: Callable[[Axes, list[Row]], None], found: Sequence[list[Row]]) -> Figure | None:
    if not found:
        return None
    columns = min(len(found), 2)
    lines = -(-len(found) // columns)
    figure = Figure((5.6 * columns, 3.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, table in zip(panels, found, strict=False):
        paint(axes, table)
        axes.set_title(f"{case_text(table[0])}\n{table[0]['device']}", fontsize=8)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    return figure


def _peaks(axes: Axes, rows: list[Row]) -> None:
    rows = [row for row in rows if is_plain(row)]
    counts = sorted({row["num_blocks"] for row in rows})
    bands: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        peak = row["peak_allocated_bytes"]
        if row["method"] in BLOCKWISE:
            band = bands.setdefault((row["method"], row["offload"]), {})
            band.setdefault(counts.index(row["num_blocks"]), []).append(peak)
        else:
            budget = "" if row["budget"] is None else f", budget {row['budget']:g}"
            style = "-" if row["budget"] in (None, 1) else "--" if row["budget"] >= 0.5 else ":"
            label = LONG[row["method"]] + budget
            axes.axhline(peak, color=COLOURS[row["method"]], ls=style, lw=1, label=label)
    for (method, offload), band in bands.items():
        low, high = ([pick(peaks) for peaks in band.values()] for pick in (min, max))
        style = {"color": COLOURS[method], "ls": "-" if offload == "none" else "--", "marker": "."}
        where = "" if offload == "none" else ", one block on the device"
        axes.plot(list(band), high, label=LONG[method] + where, **style)
        axes.plot(list(band), low, **style)
        axes.fill_between(list(band), low, high, color=COLOURS[method], alpha=0.12, lw=0)
    axes.set_xticks(range(len(counts)), counts)
    axes.set_xlabel("blocks")
    _bytes_axis(axes, rows)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _bytes_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Make y the peak, on a log scale with ticks at powers of two."""
    peaks = [row["peak_allocated_bytes"] for row in rows]
    axes.set_yscale("log", base=2)
    axes.set_ylim(min(peaks) / 1.3, max(peaks) * 1.3)
    axes.yaxis.set_major_formatter(lambda value, _: in_words(value))
    axes.set_ylabel("peak of a step, predicted" if is_predicted(rows[0]) else "peak of a step")
    axes.grid(alpha=0.2)


def _tradeoff(axes: Axes, rows: list[Row]) -> None:
    timed = [row for row in rows if row["sweep_ms"] is not None]
    labels = dict(LONG)  # of methods that are not drawn yet
    for row in timed:
        method = row["method"]
        marker = f"${row['num_blocks']}$" if method in BLOCKWISE else "o"
        style = {"marker": marker, "color": COLOURS[method], "ls": ""}
        label = labels.pop(method, None)
        axes.plot(row["sweep_ms"], row["peak_allocated_bytes"], label=label, **style)
    axes.set_xlabel("sweep of all blocks, ms")
    _bytes_axis(axes, timed)
    axes.legend(fontsize=7, frameon=False)


def _rates(axes: Axes, rows: list[Row]) -> None:
    is_op = rows[0]["suite"] == "ops"
    achieved, ceiling = RATES["GB/s" if is_op else "TFLOP/s"]
    colours = [IMPLS[row["impl"].removesuffix("_budget")] for row in rows]
    axes.barh(range(len(rows)), [row[achieved] for row in rows], color=colours)
    names = [f"{row['op']} {row['direction']}, " if is_op else "" for row in rows]
    labels = [name + run_text(row) for name, row in zip(names, rows, strict=True)]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(rows[0].get(ceiling) or 0, color="black", ls=":")
    axes.set_xlabel("GB/s" if is_op else "TFLOP/s")


def timeline_section(rows: Sequence[Row]) -> Section:
    """Draw what is alive in each step, on one axis, and the leanest step again on its own.

    Args:
        rows:  of one table of the suite timeline
    """
    drawn = [*rows, min(rows, key=lambda row: row["peak_allocated_bytes"])]
    figure = Figure((2.8 * len(drawn), 3.8), layout="constrained")
    highest = max(row["peak_allocated_bytes"] for row in rows)
    tops = [*[highest] * len(rows), drawn[-1]["peak_allocated_bytes"]]
    panels = figure.subplots(1, len(drawn))
    for axes, row, top in zip(panels, drawn, tops, strict=True):
        sizes = np.array(list(row["levels"].values())) / GIB
        axes.stackplot(row["starts"], sizes, labels=list(row["levels"]), colors=PALETTE[::-1], lw=0)
        for _, op in row["phases"][1:]:
            axes.axvline(op, color="black", lw=0.8, ls=":")
        place = f"{blocks_text(row['num_blocks'])}, on the device: {place_text(row)}"
        peak = f"peak {in_words(row['peak_allocated_bytes'])}"
        axes.set_title(f"{run_text(row)}\n{place}\n{peak}", fontsize=7)
        axes.set_xlim(0, row["starts"][-1])
        axes.set_ylim(0, 1.05 * top / GIB)
    figure.supylabel("GiB, predicted", fontsize=9)
    handles, names = axes.get_legend_handles_labels()
    names = [name.replace("_", " ") for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    text = (
        f"{case_text(rows[0])}, {rows[0]['device']}: live bytes from the first op of a step to its "
        "last. Dotted lines part the forward, the backward and the update. The last panel is the "
        "leanest step again, on an axis of its own."
    )
    return Section("Memory within one step", text, picture=figure)


def learning_section(rows: Sequence[Row]) -> Section:
    """Draw how models of the demo learned, and how well the classifier among them answers.

    Args:
        rows:  of one table of the suite demo
    """
    answers = any(row.get("accuracy") for row in rows)
    names = [*dict.fromkeys(row["family"] for row in rows), *["accuracy"] * answers]
    figure = Figure((3.7 * len(names), 3.6), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names)), strict=True))
    for row in rows:
        whole = row["num_blocks"] == 1
        colours = ("black",) if whole else PALETTE[1:]
        for block, (losses, colour) in enumerate(zip(row["loss"], colours, strict=False)):
            updates = np.linspace(0, row["updates"], len(losses) + 1)[1:]
            label = blocks_text(1) if whole else f"block {block} of {row['num_blocks']}"
            panels[row["family"]].plot(updates, losses, color=colour, label=label)
        if row.get("accuracy"):
            style = {"marker": "o", "color": colours[0], "label": blocks_text(row["num_blocks"])}
            steps = [str(step + 1) for step in range(len(row["accuracy"]))]
            panels["accuracy"].plot(steps, row["accuracy"], **style)
    if answers:
        lowest = min(share for row in rows for share in row.get("accuracy", ()))
        panels["accuracy"].set_ylim(min(0.9, lowest), 1)
    for name, axes in panels.items():
        is_loss = name in FAMILIES
        axes.set_yscale("log" if is_loss and answers else "linear")  # text spans no decade
        axes.set_title(f"{FAMILIES[name]}: loss in training" if is_loss else "ViT: accuracy")
        axes.set_xlabel("updates of each layer" if is_loss else "Euler step")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=7, frameon=False)
    text = (
        "Blocks work at different noise, so the height of one line of loss says little about "
        "another."
    )
    text += " The accuracy is on digits that no model has seen." * answers
    title = f"Learning on {NAMES.get(rows[0]['preset'], rows[0]['preset'])}"
    return Section(f"{title}, block by block and end to end", text, picture=figure)
