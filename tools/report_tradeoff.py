"""Time against peak memory: every way to train, and each method's frontier."""

from collections.abc import Iterator, Sequence

import numpy as np
from demo_drawing import INK, draw
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from report_labels import Label, place_labels, with_tips
from report_marks import STYLES, bytes_axis, mark, tip
from report_rows import METHODS, Row
from report_text import SHORT, count_text
from report_training import BLOCKWISE, eager


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Keep the rows that no other is as fast and as small as.

    Args:
        rows:  of one method, with times
    Returns:
        them by their time, each with a lower peak than those before it.
    """
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["sweep_ms"], row["peak_allocated_bytes"])):
        if not best or row["peak_allocated_bytes"] < best[-1]["peak_allocated_bytes"]:
            best.append(row)
    return best


def tradeoff_figure(rows: Sequence[Row], alt: str) -> str | None:
    """Draw the time of a sweep against the peak of a step, and each method's frontier.

    Args:
        rows:  of one table
        alt:   what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG, or None without a time.
    """
    timed = [row for row in rows if row["sweep_ms"] is not None]
    if not timed:
        return None
    base = eager(timed)

    def paint(axes: Axes) -> None:
        labels, obstacles = [], []
        for method in METHODS:
            same = [row for row in timed if row["method"] == method]
            if same:
                line = frontier(same)
                xs, ys = zip(*map(_place, line), strict=True)
                axes.plot(xs, ys, color=STYLES[method][0], lw=1.4, zorder=1)
                obstacles += list(map(_place, same)) + _between(xs, ys)
                labels += _labels(method, line)
                for row in same:
                    mark(axes, *_place(row), row, timed.index(row), faint=row not in line)
        _tradeoff_axes(axes, timed, base)
        labels.sort(key=lambda label: not label.needed)
        place_labels(axes, labels, obstacles)

    return with_tips(draw(paint, alt, height=3.9), [tip(row, base) for row in timed])


def _place(row: Row) -> tuple[float, float]:
    return row["sweep_ms"], row["peak_allocated_bytes"]


def _between(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """Places along a line, on which no label should lie."""
    parts = np.linspace(0, len(xs) - 1, 20 * len(xs)) if len(xs) > 1 else []
    logs = np.interp(parts, range(len(xs)), np.log(ys))
    return list(zip(np.interp(parts, range(len(xs)), xs), np.exp(logs), strict=True))


def _labels(method: str, line: Sequence[Row]) -> Iterator[Label]:
    yield Label(*_place(line[-1]), SHORT[method], True)
    for row in line:
        if method == "compiled" and row["budget"] is not None:
            yield Label(*_place(row), f"{row['budget']:g}", False)
        if method in BLOCKWISE:
            recompute = f" {row['recompute']}" if row["recompute"] else ""
            yield Label(*_place(row), f"{count_text(row)}{recompute}", False)


def _tradeoff_axes(axes: Axes, rows: Sequence[Row], base: Row | None) -> None:
    axes.margins(x=0.14, y=0.1)
    bytes_axis(axes, rows)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.set_xlabel("sweep of all blocks, ms")
    if base is not None:
        unit = base["sweep_ms"]
        axes.axvline(unit, color=INK, lw=0.6, ls=":", zorder=0)
        above = axes.secondary_xaxis(
            "top", functions=(lambda x: np.asarray(x) / unit, lambda x: np.asarray(x) * unit)
        )
        above.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        above.set_xlabel("of a step end to end, eager")
