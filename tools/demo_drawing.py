"""What every figure of the demo's report shares: colours, units, and SVG that a page can hold.

What is drawn in INK becomes currentColor, so that a figure follows the page into dark mode.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1a1b1c"
# Okabe and Ito's palette without black, which is INK, the colour of a net trained end to end
BLOCK_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
SIGMA_LOW, SIGMA_HIGH = 0.002, 80.0  # the range that all the blocks share
WIDTH = 4.2  # inches: one column of the page, so that text is readable on a phone too
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "dbkernels",
    "text.parse_math": False,  # a run's name may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"),
    INK,
)


def finite(value: float | None) -> float | None:
    """Return the number, or None for one that is missing, NaN or infinite.

    Args:
        value:  what the results hold
    Returns:
        float or None.
    """
    return float(value) if value is not None and math.isfinite(value) else None


def block_colour(run: dict, index: int) -> str:
    """Return the colour of a block, the same in every figure.

    Args:
        run:    one run of the results
        index:  of the block
    Returns:
        "#rrggbb"; INK for a run of one block.
    """
    return INK if run["num_blocks"] == 1 else BLOCK_COLOURS[index % len(BLOCK_COLOURS)]


def byte_unit(count: float) -> tuple[float, str]:
    """Choose the binary unit that reads best.

    Args:
        count:  bytes
    Returns:
        bytes per unit and the unit's name.
    """
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    return 1024.0**power, ("bytes", "KiB", "MiB", "GiB", "TiB")[power]


def bytes_text(count: float) -> str:
    """Write bytes with three digits and their binary unit.

    Args:
        count:  bytes
    Returns:
        such as "1.5 MiB".
    """
    size, unit = byte_unit(count)
    value = count / size
    return f"{value:.0f} {unit}" if size == 1 or value >= 100 else f"{value:.3g} {unit}"


def _inline(svg: str, alt: str) -> str:
    """Make matplotlib's file an element of a page: no header, no size, ids of its own."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    prefix = "f" + hashlib.sha256(alt.encode()).hexdigest()[:8]
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def draw(paint: Callable[[Axes], None], alt: str, *, height: float = 2.8) -> str:
    """Draw one figure of one panel.

    Args:
        paint:   draws on the axes
        alt:     what the figure is, for those who cannot see it; unique on the page
        height:  inches
    Returns:
        an svg element that grows with its column.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), alt)


def short(name: str) -> str:
    """Cut a name to what fits beside a figure.

    Args:
        name:   any text
    Returns:
        the name, or its start and an ellipsis.
    """
    return name if len(name) <= 22 else f"{name[:21]}…"


def legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above the panel, where it hides nothing.

    Args:
        axes:     the panel
        columns:  of the legend
    """
    axes.figure.legend(loc="outside upper left", ncols=columns, fontsize=8.5, handlelength=1.6)


def noise_axis(axes: Axes) -> None:
    """Make x the noise level, the most noise at the left.

    Args:
        axes:   the panel
    """
    axes.set_xscale("log")
    axes.set_xlim(SIGMA_HIGH * 1.15, SIGMA_LOW / 1.15)
    ticks = (80, 10, 1, 0.1, 0.01, 0.002)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("noise level sigma, in units of the target")


def layers_text(block: dict) -> str:
    """Name the layers of a block.

    Args:
        block:  of a run
    Returns:
        such as "layers 0–3", or each index where they do not follow one another.
    """
    layers = block["layers"]
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[0] + len(layers))):
        return f"layers {layers[0]}–{layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
