"""The peak of a step by the number of blocks, and what it is made of."""

from collections.abc import Callable, Sequence

from demo_drawing import INK, draw
from demo_figures import bytes_figure
from matplotlib.axes import Axes
from report_labels import FONT_SIZE, spread, with_tips
from report_marks import STYLES, bytes_axis, mark, tip
from report_rows import METHODS, Row, is_plain
from report_text import SHORT, blocks_text, count_text
from report_training import BLOCKWISE, eager, shortened

LEADER = {
    "arrowstyle": "-", "lw": 0.4, "color": INK, "alpha": 0.5, "shrinkB": 4, "relpos": (0, 0.5),
}  # fmt: skip


def peaks_figure(rows: Sequence[Row], alt: str) -> str:
    """Draw the peak of every way to train: end to end by method, then by the number of blocks.

    Ways with the optimizer in the backward or with CUDA graphs are in the table alone: here they
    would lie on those without.

    Args:
        rows:  of one table
        alt:   what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG; what is predicted is hollow.
    """
    rows = _plain(rows)
    whole = [m for m in METHODS if any(r["method"] == m for r in rows) and m not in BLOCKWISE]
    counts = sorted({row["num_blocks"] for row in rows if row["method"] in BLOCKWISE})
    ticks = [SHORT[method] for method in whole] + [blocks_text(count) for count in counts]

    def column(row: Row) -> int:
        if row["method"] in BLOCKWISE:
            return len(whole) + counts.index(row["num_blocks"])
        return whole.index(row["method"])

    def paint(axes: Axes) -> None:
        for number, row in enumerate(rows):
            mark(axes, column(row), row["peak_allocated_bytes"], row, number)
        ends = _series(axes, rows, column)
        base = eager(rows)
        if base is not None:
            axes.axhline(base["peak_allocated_bytes"], color=INK, lw=0.6, ls=":", zorder=0)
        axes.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(ticks) - 0.5)
        axes.margins(y=0.08)
        bytes_axis(axes, rows)
        _name_ends(axes, ends)

    tips = [tip(row, eager(rows)) for row in rows]
    return with_tips(draw(paint, alt, height=4.2), tips)


def _series(
    axes: Axes, rows: Sequence[Row], column: Callable[[Row], int]
) -> list[tuple[float, float, str]]:
    """Join the same way over numbers of blocks; where each line ends, and its name."""
    series: dict[tuple, list[Row]] = {}
    for row in (row for row in rows if row["method"] in BLOCKWISE):
        name = (row["method"], row["recompute"], row["offload"], row.get("implementation"))
        series.setdefault(name, []).append(row)
    ends = []
    for (method, recompute, offload, _), same in series.items():
        same = sorted(same, key=column)
        xs, ys = [column(row) for row in same], [row["peak_allocated_bytes"] for row in same]
        style = "--" if offload == "cpu" else "-"
        axes.plot(xs, ys, style, color=STYLES[method][0], lw=1, zorder=1)
        one = ", offload cpu" if offload == "cpu" else ""
        ends.append((xs[-1], ys[-1], f"{recompute or 'eager layers'}{one}"))
    return ends


def _plain(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if is_plain(row)] or list(rows)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    axes.figure.draw_without_rendering()
    points = 72 / axes.figure.dpi
    panel = axes.get_window_extent()
    heights = [axes.transData.transform((x, y))[1] * points for x, y, _ in ends]
    placed = spread(heights, FONT_SIZE * 1.15, panel.y0 * points, panel.y1 * points)
    for (x, y, text), height, at in zip(ends, heights, placed, strict=True):
        axes.annotate(
            text,
            (x, y),
            (1.02, at - height),
            textcoords=("axes fraction", "offset points"),
            va="center",
            fontsize=FONT_SIZE,
            arrowprops=LEADER,
        )


def composition_figure(rows: Sequence[Row], alt: str) -> str | None:
    """Draw what the peak is made of: end to end in eager, and the most blocks there are.

    Args:
        rows:  of one table
        alt:   what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG, or None without categories. Workspaces are temporaries here.
    """
    rows = _plain(rows)
    most = max(row["num_blocks"] for row in rows)
    shown = [
        row for row in shortened(rows) if row["method"] == "end_to_end" or row["num_blocks"] == most
    ]
    runs = [{"name": _name(row), "by_category": _categories(row)} for row in shown]
    return bytes_figure(runs, alt)


def _name(row: Row) -> str:
    if row["method"] not in BLOCKWISE:
        return SHORT[row["method"]]
    kind = f"fused, {row['recompute']}" if row["recompute"] else "eager"
    return f"{count_text(row)} {kind}"


def _categories(row: Row) -> dict[str, float]:
    parts = dict(row.get("by_category") or {})
    workspaces = parts.pop("workspaces", 0)
    if parts:
        parts["temporaries"] = parts.get("temporaries", 0) + workspaces
    return parts
