"""Figures of the demo's report, each one inline SVG or PNG that needs nothing from outside.

Noise falls from left to right in every figure, as it does while sampling.
"""

import base64
import io
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from demo_drawing import (
    INK,
    SIGMA_HIGH,
    SIGMA_LOW,
    block_colour,
    byte_unit,
    bytes_text,
    draw,
    finite,
    layers_text,
    legend_above,
    noise_axis,
    short,
)
from matplotlib.axes import Axes
from matplotlib.image import imsave
from matplotlib.ticker import LogLocator, MaxNLocator

# the palette's other colours and two greys, so that no category looks like one of three blocks
CATEGORIES = {
    "saved_activations": ("saved activations", "#D55E00"),
    "parameters": ("parameters", "#999999"),
    "gradients": ("gradients", "#CC79A7"),
    "optimizer": ("optimizer", "#56B4E9"),
    "inputs": ("inputs", "#F0E442"),
    "temporaries": ("temporaries", "#DDDDDD"),
}

GRID_SHADE = 90  # of 255, between digits


def loss_rows(run: dict) -> np.ndarray:
    """Collect the rows of a training log whose loss is a number.

    Args:
        run:    one run of the results
    Returns:
        (rows, 3) float64: step, block, loss.
    """
    rows = [row for row in run.get("loss") or () if finite(row[2]) is not None]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def loss_figure(run: dict, limits: tuple[float, float], alt: str) -> str | None:
    """Draw the training loss of each block: every row faintly, and its running mean.

    Args:
        run:     one run of the results
        limits:  lowest and highest loss of all the runs that this one is compared with
        alt:     what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG, or None without a row.
    """
    rows = loss_rows(run)
    if not len(rows):
        return None

    def paint(axes: Axes) -> None:
        for block in np.unique(rows[:, 1]).astype(int):
            step, _, loss = rows[rows[:, 1] == block].T
            width = max(1, len(loss) // 25)
            mean = np.convolve(loss, np.full(width, 1 / width), "valid")
            colour = block_colour(run, block)
            axes.plot(step, loss, color=colour, alpha=0.3, linewidth=0.6)
            name = "all layers" if run["num_blocks"] == 1 else f"block {block}"
            marker = "." if len(mean) < 10 else ""
            axes.plot(step[width - 1 :], mean, marker=marker, color=colour, lw=1.8, label=name)
        low, high = limits
        if low > 0:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.1, high * 1.1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            # a range of about a decade is labelled between its powers of ten too
            few = high / low < 20
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if few else range(2, 10)))
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.1g}" if few else "")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        legend_above(axes, 4)

    return draw(paint, alt)


def serving_block(run: dict, level: float) -> int:
    """Find the block whose served interval (low, high] holds a noise level.

    Args:
        run:    one run of the results
        level:  sigma
    Returns:
        the block's index; the least noisy block for the bottom of the range.
    """
    for block in run["blocks"]:
        if block["low"] < level <= block["high"]:
            return block["index"]
    return min(run["blocks"], key=lambda block: block["low"])["index"]


def accuracy_points(run: dict) -> list[tuple[float, float]]:
    """Pair the noise level of each Euler step with the accuracy after it.

    Args:
        run:    one run of the results
    Returns:
        (sigma, accuracy) of the steps that were measured.
    """
    pairs = zip(run.get("levels") or (), run.get("accuracy") or (), strict=False)
    return [(finite(a), finite(b)) for a, b in pairs if None not in (finite(a), finite(b))]


def accuracy_figure(runs: Sequence[dict], alt: str) -> str | None:
    """Draw accuracy after each Euler step, a line a run, a marker in the colour of its block.

    Args:
        runs:   runs of one task
        alt:    what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG, or None without a point.
    """
    drawn = [(run, accuracy_points(run)) for run in runs if accuracy_points(run)]
    if not drawn:
        return None

    def paint(axes: Axes) -> None:
        for number, (run, points) in enumerate(drawn):
            style = {"linestyle": ("-", "--", ":", "-.")[number % 4], "marker": "os^D"[number % 4]}
            axes.plot(
                *zip(*points, strict=True), **style, color=INK, lw=1.2, label=short(run["name"])
            )
            for level, accuracy in points:
                colour = block_colour(run, serving_block(run, level))
                axes.plot(
                    level, accuracy, style["marker"], color=colour, ms=8, zorder=3, clip_on=False
                )
        low, high = axes.get_ylim()
        axes.set_ylim(low, max(min(high, 1.002), low + 0.001))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        axes.set_ylabel("accuracy")
        noise_axis(axes)
        legend_above(axes, 2)

    return draw(paint, alt)


def bars_figure(rows: Sequence[tuple[str, float | None, str]], title: str, alt: str) -> str | None:
    """Draw one horizontal bar a row, its value beside it.

    Args:
        rows:   label, value or None, colour
        title:  of the axis, with its unit
        alt:    what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG, or None without a value; a row without one says "not measured".
    """
    values = [value for _, value, _ in rows if value is not None]
    if not values:
        return None

    def paint(axes: Axes) -> None:
        for place, (_, value, colour) in enumerate(rows):
            axes.barh(place, value or 0, color=colour, height=0.62)
            text = "not measured" if value is None else f"{value:.3g}"
            axes.annotate(
                text, (value or 0, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(rows)), [short(label) for label, _, _ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, max(*values, 1e-9) * 1.25)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(title)

    return draw(paint, alt, height=0.75 + 0.36 * len(rows))


def _bracket(axes: Axes, block: dict, colour: str, num_blocks: int) -> None:
    text = (
        layers_text(block) if num_blocks == 1 else f"block {block['index']}, {layers_text(block)}"
    )
    low, high, y = block["trained_low"], block["trained_high"], 0.37 + 0.06 * block["index"]
    axes.plot([low, low, high, high], [y - 0.012, y, y, y - 0.012], color=colour, lw=1.5)
    axes.text((low * high) ** 0.5, y + 0.006, text, ha="center", va="bottom", fontsize=8)


def partition_figure(run: dict, alt: str) -> str:
    """Draw the density of training noise, the bands that blocks serve, the brackets they train on.

    Args:
        run:    one run of the results
        alt:    what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG.
    """
    prior = NormalDist(*run["prior"])

    def density(low: float, high: float) -> tuple[np.ndarray, list[float]]:
        logs = np.linspace(np.log(low), np.log(high), 200)
        return np.exp(logs), [prior.pdf(log) for log in logs]

    def paint(axes: Axes) -> None:
        axes.plot(*density(SIGMA_LOW, SIGMA_HIGH), color=INK, lw=1)
        for block in run["blocks"]:
            colour = block_colour(run, block["index"])
            axes.axvspan(block["low"], block["high"], color=colour, alpha=0.12, lw=0)
            axes.fill_between(*density(block["low"], block["high"]), color=colour, alpha=0.45, lw=0)
            _bracket(axes, block, colour, len(run["blocks"]))
        axes.set_ylim(0, 0.44 + 0.06 * (len(run["blocks"]) - 1))
        axes.set_yticks([0, 0.1, 0.2, 0.3])
        axes.set_ylabel("density over ln sigma")
        noise_axis(axes)
        axes.set_title(f"ln sigma ~ N({prior.mean:g}, {prior.stdev:g}²)", fontsize=8.5, loc="right")

    return draw(paint, alt)


def bytes_figure(runs: Sequence[dict], alt: str) -> str | None:
    """Draw the bytes alive at the peak of a training step, a stacked bar a run.

    Args:
        runs:   runs of one task
        alt:    what the figure is, for those who cannot see it; unique on the page
    Returns:
        SVG, or None without a measured run.
    """
    rows = [(run, _category_bytes(run)) for run in runs]
    widest = max((sum(sizes.values()) for _, sizes in rows), default=0)
    if not widest:
        return None
    size, unit = byte_unit(widest)

    def paint(axes: Axes) -> None:
        left = np.zeros(len(rows))
        for category, (label, colour) in CATEGORIES.items():
            width = np.array([sizes.get(category, 0.0) for _, sizes in rows]) / size
            bars = axes.barh(range(len(rows)), width, left=left, color=colour, label=label)
            texts = [f"{part:.3g}" for part in width]
            # a text that is wider than its bar is left out
            room = 0.034 * widest / size
            pairs = zip(texts, width, strict=True)
            texts = [text if part > room * len(text) else "" for text, part in pairs]
            axes.bar_label(bars, texts, label_type="center", fontsize=8, color="black")
            left += width
        for place, (_, sizes) in enumerate(rows):
            text = bytes_text(sum(sizes.values())) if sizes else "not measured"
            axes.annotate(
                text, (left[place], place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(rows)), [short(run["name"]) for run, _ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, widest / size * 1.27)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{unit} at the peak of a step")
        legend_above(axes, 3)

    return draw(paint, alt, height=1.25 + 0.5 * len(rows))


def _category_bytes(run: dict) -> dict[str, float]:
    measured = {name: finite(count) for name, count in (run.get("by_category") or {}).items()}
    return {name: count for name, count in measured.items() if count is not None}


def digits_png(rows: Sequence[Sequence[Sequence[Sequence[int]]]]) -> str:
    """Lay images out as a grid, one pixel of it a pixel of theirs.

    Args:
        rows:   rows of images of one size, each a list of rows of 0..255; at least one image
    Returns:
        data URI of a PNG; what a short row lacks is left empty.
    """
    images = [[np.clip(image, 0, 255) for image in row] for row in rows]
    height, width = next(image.shape for row in images for image in row)
    columns = max(map(len, images))
    grid = np.full((len(rows) * (height + 1) + 1, columns * (width + 1) + 1), GRID_SHADE)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            top, left = i * (height + 1) + 1, j * (width + 1) + 1
            grid[top : top + height, left : left + width] = image
    file = io.BytesIO()
    rgb = np.repeat(grid[:, :, None], 3, axis=2).astype(np.uint8)
    imsave(file, rgb, format="png", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
