"""What is alive op after op in a predicted step: steps beside each other, and the leanest alone."""

from collections.abc import Sequence

from demo_drawing import INK, byte_unit, bytes_text, draw, legend_above
from demo_figures import CATEGORIES
from matplotlib.axes import Axes
from report_labels import FONT_SIZE, with_tips
from report_rows import Row
from report_tables import Cell, Column, Table
from report_text import SHORT, blocks_text, ratio_text, way_text
from report_training import eager

# from the bottom: what is always there first, then what comes and goes
STACK = ("parameters", "optimizer", "inputs", "saved_activations", "gradients", "temporaries")
GAP = 0.04  # at either side of a step that stands beside others
SEEN = 1e-3  # of the highest: what is less has no height
ROOM = 1.22  # of the highest, for what is written above it
PARTS = ("parameters", "optimizer", "saved_activations", "gradients", "temporaries")
COLUMNS = (
    Column("at the peak", left=True),
    Column("in all", "min"),
    Column("of eager"),
    *(Column(name.replace("_", " "), "min") for name in PARTS),
    Column("op", left=True),
)


def together_figure(rows: Sequence[Row], alt: str) -> str:
    """Draw steps beside each other, on one axis of bytes.

    Args:
        rows:  of one table
        alt:   what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG.
    """
    highest, names = max(max(_totals(row)) for row in rows), _there(rows)

    def paint(axes: Axes) -> None:
        for number, row in enumerate(rows):
            width = (1 - 2 * GAP) / row["starts"][-1]
            xs = [number + GAP + width * op for op in row["starts"]]
            _stack(axes, xs, row, highest, names, labelled=number == 0)
            for op in _backward(row):
                axes.axvline(number + GAP + width * op, color=INK, lw=0.6, ls=":")
            _mark_peak(axes, xs, row, highest, number)
        places = [number + 0.5 for number in range(len(rows))]
        # more than three have no room beside each other
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(rows) > 3 else {}
        axes.set_xticks(places, [_name(row) for row in rows], **turned)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(0, len(rows))
        _finish(axes, highest)

    return with_tips(draw(paint, alt, height=3.6), [_tip(row) for row in rows])


def alone_figure(row: Row, alt: str) -> str:
    """Draw one step on an axis of bytes of its own.

    Args:
        row:  of the suite timeline
        alt:  what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG.
    """
    highest, last, names = max(_totals(row)), row["starts"][-1], _there([row])

    def paint(axes: Axes) -> None:
        _stack(axes, row["starts"], row, highest, names, labelled=True)
        ends = [op for _, op in row["phases"][1:]] + [last]
        for (phase, op), end in zip(row["phases"], ends, strict=True):
            axes.axvline(op, color=INK, lw=0.6, ls=":")
            # what is so narrow has no room for its name
            if end - op > 0.1 * last:
                place = axes.get_xaxis_transform()
                axes.annotate(
                    phase, (op, 1), (3, -2), place, "offset points", va="top", fontsize=FONT_SIZE
                )
        _mark_peak(axes, row["starts"], row, highest, 0)
        axes.set_xlabel("ops that allocate or free, in order")
        axes.set_xlim(0, last)
        _finish(axes, highest)

    return with_tips(draw(paint, alt, height=3.6), [_tip(row)])


def leanest(rows: Sequence[Row]) -> Row:
    """Find the step with the lowest peak.

    Args:
        rows:  of one table
    Returns:
        the first of them.
    """
    return min(rows, key=lambda row: row["peak_allocated_bytes"])


def step_text(row: Row) -> str:
    """Name a step in a sentence.

    Args:
        row:  of the suite timeline
    Returns:
        such as "fused layers, layer, 1 of 4 blocks on the device".
    """
    return ", ".join(filter(None, [way_text(row), _blocks(row)]))


def _blocks(row: Row) -> str:
    """Nothing where the net is trained end to end."""
    if row["num_blocks"] == 1:
        return ""
    if row["offload"] == "cpu":
        return f"1 of {row['num_blocks']} blocks on the device"
    return blocks_text(row["num_blocks"])


def timeline_table(rows: Sequence[Row]) -> Table:
    """Lay out what is alive at the peak of each step.

    Args:
        rows:  of one table
    Returns:
        the table, its best figures marked.
    """
    base = eager(rows)
    return Table(COLUMNS, (("", tuple(_line(row, base) for row in rows)),)).marked()


def _line(row: Row, base: Row | None) -> tuple[Cell, ...]:
    peak, sizes = row["peak_allocated_bytes"], _merged(row["by_category"])
    return (
        Cell(way_text(row), _blocks(row)),
        Cell(bytes_text(peak), "", peak, predicted=True),
        Cell(ratio_text(peak, base and base["peak_allocated_bytes"])),
        *(Cell(bytes_text(sizes.get(name, 0)), "", sizes.get(name, 0)) for name in PARTS),
        Cell(str(row["at"]).replace("aten::", "")),
    )


def _merged(sizes: dict[str, float]) -> dict[str, float]:
    """Workspaces are temporaries, as in the figures of peaks."""
    parts = dict(sizes)
    parts["temporaries"] = parts.get("temporaries", 0) + parts.pop("workspaces", 0)
    return parts


def _columns(row: Row) -> list[dict[str, float]]:
    """Bytes by category of each part of a step."""
    parts = zip(*row["levels"].values(), strict=True)
    return [_merged(dict(zip(row["levels"], part, strict=True))) for part in parts]


def _there(rows: Sequence[Row]) -> list[str]:
    """Categories that can be seen somewhere."""
    parts = [part for row in rows for part in _columns(row)]
    least = SEEN * max(sum(part.values()) for part in parts)
    return [name for name in STACK if any(part.get(name, 0) > least for part in parts)]


def _stack(
    axes: Axes,
    xs: Sequence[float],
    row: Row,
    highest: float,
    names: Sequence[str],
    *,
    labelled: bool,
) -> None:
    size, _ = byte_unit(highest)
    parts = _columns(row)
    lines = [[part.get(name, 0) / size for part in parts] for name in names]
    labels, colours = zip(*(CATEGORIES[name] for name in names), strict=True)
    labels = labels if labelled else [f"_{label}" for label in labels]
    axes.stackplot(xs, lines, labels=labels, colors=colours, lw=0)


def _totals(row: Row) -> list[float]:
    return [sum(part) for part in zip(*row["levels"].values(), strict=True)]


def _backward(row: Row) -> list[int]:
    return [op for name, op in row["phases"] if name == "backward"]


def _mark_peak(axes: Axes, xs: Sequence[float], row: Row, highest: float, number: int) -> None:
    size, _ = byte_unit(highest)
    totals = _totals(row)
    part = max(range(len(totals)), key=totals.__getitem__)
    place = xs[part], totals[part] / size
    axes.plot(*place, "v", color=INK, ms=4, gid=f"tip-{number}")
    side = ("left", "center", "right")[3 * part // len(totals)]
    text = bytes_text(row["peak_allocated_bytes"])
    axes.annotate(text, place, (0, 5), textcoords="offset points", ha=side, fontsize=FONT_SIZE)


def _finish(axes: Axes, highest: float) -> None:
    size, unit = byte_unit(highest)
    axes.set_ylim(0, ROOM * highest / size)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.set_ylabel(f"predicted, {unit} allocated")
    legend_above(axes, 3)


def _name(row: Row) -> str:
    recompute = f"recompute {row['recompute']}" if row["recompute"] else ""
    # a line of its own for each, as steps stand close
    blocks = _blocks(row).replace(" blocks on the device", " on device")
    early = "optimizer in backward" if row["optimizer_in_backward"] else ""
    return "\n".join(filter(None, [SHORT[row["method"]], recompute, blocks, early]))


def _tip(row: Row) -> str:
    return f"{step_text(row)}\npeak {bytes_text(row['peak_allocated_bytes'])}\nat {row['at']}"
