"""Draw the pictures of the pages under docs, which are read on light and on dark paper.

python tools/pictures.py
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from palette import PALETTE
from report_rows import Row, read, tables
from report_studies import TITLES, by_scale, picture_of

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.memory.units import UNITS
from dbkernels.training.partition import partition

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
INK = "#7c828d"  # which either shows
COLOURS = (PALETTE[4], PALETTE[3], PALETTE[6])  # of blocks, the noisiest first
DEPTH, NUM_BLOCKS, GAMMA = 12, 3, 0.05
GIB = UNITS["GiB"]
CASE = {"family": "dit", "preset": "XL/2", "batch": 128, "dtype": "autocast"}
BARS = {  # what a bar is of, and the settings of its row
    "end to end": {"method": "end_to_end"},
    "torch.compile": {"method": "compiled", "budget": 1.0},
    "checkpointed": {"method": "checkpointed"},
    "3 blocks,\npublished method": {"method": "block_stock", "num_blocks": 3},
    "3 blocks": {"method": "block_fused", "num_blocks": 3, "recompute": "layer"},
    "3 blocks, one\non the device": {
        "method": "block_fused", "num_blocks": 3, "recompute": "layer", "offload": "cpu",
    },
}  # fmt: skip
PLAIN = {"optimizer_in_backward": False, "launch": "ops", "offload": "none"}


def draw_blocks(figure: Figure) -> None:
    """The layers on the left, and the noise of each block on the right."""
    process = LogNormal()
    blocks = partition(DEPTH, NUM_BLOCKS, process, gamma=GAMMA)
    layers, noise = figure.subplots(1, 2, width_ratios=[1, 3])
    for block, colour in zip(blocks, COLOURS, strict=True):
        for place in block.layers:
            layers.barh(-place, 1, 0.8, color=colour)
        middle = -sum(block.layers) / len(block.layers)
        layers.text(1.15, middle, f"block {block.index}", va="center", color=INK)
    layers.set(xlim=(0, 2.3), title="12 layers, the input above")
    layers.axis("off")

    x = np.linspace(process.mean - 3.2 * process.std, process.mean + 3.2 * process.std, 400)
    density = np.exp(-(((x - process.mean) / process.std) ** 2) / 2)
    noise.plot(x, density, color=INK)
    for block, colour in zip(blocks, COLOURS, strict=True):
        low, high = np.log([block.noise.low, block.noise.high])
        noise.fill_between(x, density, where=(x >= low) & (x <= high), color=colour, lw=0)
        low, high = np.log([block.trained_noise.low, block.trained_noise.high])
        height = -0.08 - 0.07 * block.index
        noise.plot(np.clip([low, high], x[0], x[-1]), [height] * 2, color=colour, lw=3)
    noise.set(
        title=f"How often training draws a level: each block {1 / NUM_BLOCKS:.0%}",
        xlabel="ln sigma, more noise to the right; lines are what a block trains on",
        xlim=(x[0], x[-1]),
        yticks=[],
    )


def draw_memory(figure: Figure) -> None:
    """Predicted peaks of one training step."""
    rows = read([ROOT / "benchmarks" / "results" / "h100-predicted"])
    axes = figure.subplots()
    found = {name: _row(rows, told) for name, told in BARS.items()}
    peaks = [row["peak_allocated_bytes"] / GIB for row in found.values()]
    colours = [PALETTE[-1]] * 3 + [PALETTE[6]] * 3
    bars = axes.barh([*found], peaks, color=colours)
    axes.bar_label(bars, [f"{peak:.1f}" for peak in peaks], padding=4, color=INK)
    axes.invert_yaxis()
    axes.set(xlabel="GiB at the peak of a step: DiT-XL/2, batch 128, autocast; predicted")
    axes.margins(x=0.08)


def _row(rows: list[Row], told: Row) -> Row:
    wanted = {**CASE, **PLAIN, **told}
    return next(row for row in rows if wanted.items() <= row.items())


PICTURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "blocks": (draw_blocks, (8.5, 3.6)),
    "memory": (draw_memory, (7.5, 3.2)),
}


def main() -> int:
    """Write every picture."""
    # words stay words, in the font of the page
    matplotlib.rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 10})
    FOLDER.mkdir(exist_ok=True)
    for name, (draw, size) in PICTURES.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        _save(figure, name)
    for name, figure in studies():
        _save(figure, f"study-{name}")
    return 0


def studies() -> Iterator[tuple[str, Figure]]:
    """The picture of each study that has rows, at the smallest scale that it has."""
    every = tables(read([ROOT / "benchmarks" / "results"]), "study")
    for name in TITLES:
        if some := [table for table in every if table[0]["study"] == name]:
            yield name, picture_of(by_scale(some)[0])


def _save(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        _in_ink(axes)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(INK)
    path = FOLDER / f"{name}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None})
    print(path)


def _in_ink(axes: Axes) -> None:
    """Without a box, and with axes and words in one colour."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK, length=0)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)


if __name__ == "__main__":
    sys.exit(main())
