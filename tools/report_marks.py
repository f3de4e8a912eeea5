"""What the figures of training share: a mark for each method, its tooltip, the axis of bytes."""

from collections.abc import Sequence

import numpy as np
from demo_drawing import INK, byte_unit, bytes_text
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from report_rows import Row, is_predicted
from report_text import NOT_RUN, blocks_text, number_text, ratio_text, way_text

# Okabe and Ito's palette; a marker of its own for who sees no colours
STYLES = {
    "end_to_end": (INK, "*"),
    "compiled": ("#0072B2", "s"),
    "checkpointed": ("#CC79A7", "^"),
    "selective": ("#E69F00", "v"),
    "block_stock": ("#D55E00", "D"),
    "block_fused": ("#009E73", "o"),
}


def mark(axes: Axes, x: float, y: float, row: Row, number: int, *, faint: bool = False) -> None:
    """Draw a row's point; hollow where its peak is predicted.

    Args:
        axes:    the panel
        x:       in data, as is y
        y:       its peak
        row:     of training
        number:  of its tooltip
        faint:   for what another row of its method beats
    """
    colour, marker = STYLES[row["method"]]
    axes.plot(
        x,
        y,
        marker,
        color=colour,
        markerfacecolor="none" if is_predicted(row) else colour,
        alpha=0.35 if faint else 1,
        ms=9 if marker == "*" else 5,
        zorder=2,
        gid=f"tip-{number}",
    )


def bytes_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Make y the peak, on a log scale that is labelled in one binary unit.

    Args:
        axes:  the panel
        rows:  that it shows
    """
    peaks = [row["peak_allocated_bytes"] for row in rows]
    size, unit = byte_unit(max(peaks))
    axes.set_yscale("log")
    ratio = max(peaks) / min(peaks)
    labelled = (1, 2, 3, 5, 7) if ratio < 12 else (1, 2, 5) if ratio < 150 else (1,)
    # in units: decades of bytes are not decades of MiB
    axes.yaxis.set_major_locator(_UnitLocator(size, labelled))
    axes.yaxis.set_minor_locator(_UnitLocator(size, range(1, 10)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / size:,.4g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    predicted = "predicted " if all(map(is_predicted, rows)) else ""
    axes.set_ylabel(f"{predicted}peak of a step, {unit}")


class _UnitLocator(LogLocator):
    """Ticks at multiples of powers of ten of a unit."""

    def __init__(self, unit: float, multiples: Sequence[float]):
        super().__init__(subs=tuple(multiples), numticks=20)
        self.unit = unit

    def tick_values(self, low: float, high: float) -> np.ndarray:
        return super().tick_values(low / self.unit, high / self.unit) * self.unit


def tip(row: Row, base: Row | None) -> str:
    """Write out a point.

    Args:
        row:   of training
        base:  what ratios are to, or None
    Returns:
        plain text on several lines.
    """
    lines = [f"{blocks_text(row['num_blocks'])}: {way_text(row)}"]
    if row["offload"] == "cpu":
        lines.append("one block on the device")
    peak = f"peak {bytes_text(row['peak_allocated_bytes'])}"
    lines.append(f"{peak}, {NOT_RUN}" if is_predicted(row) else peak)
    if row["sweep_ms"] is not None:
        ratio = f", {ratio_text(row['sweep_ms'], base['sweep_ms'])} of eager" if base else ""
        lines.append(f"sweep {number_text(row['sweep_ms'])} ms{ratio}")
    return "\n".join(lines)
