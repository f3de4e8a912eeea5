"""Labels beside points: placed where they hide nothing, and tooltips of SVG."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from demo_drawing import INK
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

FONT_SIZE = 8
RADIUS = 4.0  # of a marker, in points
REACH = (7.0, 14.0, 24.0, 38.0)  # from a marker to its label, in points
DIRECTIONS = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Label:
    """What is written beside a point."""

    x: float  # in data, as is y
    y: float
    text: str
    needed: bool  # or it is left out where there is no room


def place_labels(axes: Axes, labels: Sequence[Label], obstacles: Sequence[tuple[float, float]]):
    """Write each label at the first place near its point where it covers nothing.

    Args:
        axes:       whose limits are final
        labels:     the most important first
        obstacles:  (x, y) in data, of everything that is drawn
    """
    axes.figure.draw_without_rendering()
    points = axes.figure.dpi / 72  # pixels each
    taken = [_around(*axes.transData.transform(place), RADIUS * points) for place in obstacles]
    inside = axes.get_window_extent()
    for label in labels:
        best = min(
            (_cost(box, taken, inside) + reach / 1e3, order, where, box)
            for order, (reach, where, box) in enumerate(_places(axes, label, points))
        )
        cost, _, (x, y), box = best
        if cost >= 1 and not label.needed:
            continue
        taken.append(box)
        far = max(abs(x), abs(y)) > REACH[1]
        line = {"arrowstyle": "-", "lw": 0.5, "color": INK, "shrinkB": RADIUS} if far else None
        _annotate(axes, label, x, y, line)


def _annotate(axes: Axes, label: Label, x: float, y: float, line: dict | None):
    return axes.annotate(
        label.text,
        (label.x, label.y),
        (x, y),
        textcoords="offset points",
        ha=("right", "center", "left")[_sign(x) + 1],
        va=("top", "center", "bottom")[_sign(y) + 1],
        fontsize=FONT_SIZE,
        fontweight="bold" if label.needed else "normal",
        arrowprops=line,
        in_layout=False,
    )


def _places(axes: Axes, label: Label, points: float):
    for reach in REACH:
        for across, up in DIRECTIONS:
            # a diagonal label begins at a corner, so it is nearer
            scale = reach * (0.6 if across and up else 1)
            trial = _annotate(axes, label, across * scale, up * scale, None)
            box = trial.get_window_extent()
            trial.remove()
            yield reach, (across * scale, up * scale), _grown(box, points)


def _cost(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """Pixels that a label would share, and many for each that is outside the panel."""
    hidden = sum(_shared(box, other) for other in taken)
    return hidden + 10 * (box.width * box.height - _shared(box, inside))


def _shared(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)


def _around(x: float, y: float, radius: float) -> Bbox:
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _grown(box: Bbox, by: float) -> Bbox:
    return Bbox.from_extents(box.x0 - by, box.y0 - by, box.x1 + by, box.y1 + by)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move heights apart, in their order, so that labels there do not touch.

    Args:
        heights:  in points
        gap:      that is left between two, less where there is no room for it
        low:      of the panel, as is high
    Returns:
        the heights, each gap or more apart.
    """
    gap = min(gap, (high - low) / max(len(heights) - 1, 1))
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [0.0] * len(heights)
    floor = low
    for index in order:
        placed[index] = floor = max(heights[index], floor)
        floor += gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def with_tips(svg: str, tips: Sequence[str]) -> str:
    """Give what was drawn with the gid "tip-N" a tooltip.

    Args:
        svg:   of `demo_drawing.draw`
        tips:  the N-th is plain text
    Returns:
        the svg.
    """

    def titled(match: re.Match) -> str:
        return f"{match[0]}<title>{escape(tips[int(match[1])])}</title>"

    return re.sub(r'<g id="[^"]*-tip-(\d+)">', titled, svg)
