"""Sections of the demo's models of text: where a token's information lies, and what they write."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import Section
from palette import PALETTE
from report_names import FAMILIES, blocks_text
from report_rows import Row

COLOURS = PALETTE[1:]
REAL = "From the plays that no model has read"
SHOWN_LINES, WIDTH = 3, 76  # of each text on a terminal
INFORMATION = """Each block works at its own noise, where a part of the information lies. For the
autoregressive model: what a little less noise tells of a character, in bits per unit of ln sigma.
It is the error over sigma squared, and a block's area is its bits. All areas down to where the
bound stops, and the cross-entropy there, are the bits of a character. For the masked model: a
block's area is its bits, over the share of characters that are masked, and all add up."""
WRITTEN = """Each model wrote this from nothing, with one seed that was fixed before; real text is
the last. In 27 symbols there are no capitals, stops or lines. Look for words that exist, then for
words that go together: a model this small, after minutes, has learned to spell and little more."""


def information_section(rows: Sequence[Row]) -> Section:
    """Where the bits of a table of the suite demo lie; without a picture where it has none."""
    text, picture = " ".join(INFORMATION.split()), information_picture(rows)
    return Section("Where a token's information lies", text, picture=picture)


def texts_section(rows: Sequence[Row]) -> list[Section]:
    """What the models of a table of the suite demo write; nothing where they write none."""
    if not (texts := texts_of(rows)):
        return []
    first = Section("What the models of text write", " ".join(WRITTEN.split()), level=3)
    return [first, *(Section(name, text, level=4) for name, text in texts.items())]


def texts_of(rows: Sequence[Row]) -> dict[str, str]:
    """What each model writes, by its name, and real text as the last."""
    rows = [row for row in rows if "text" in row]
    names = [f"{FAMILIES[row['family']]}, {blocks_text(row['num_blocks'])}" for row in rows]
    found = dict(zip(names, (row["text"] for row in rows), strict=True))
    return found | ({REAL: rows[0]["held_out"]} if rows else {})


def texts_in_lines(rows: Sequence[Row]) -> str:
    """The first lines of each text, for a terminal."""
    parts = []
    for name, text in texts_of(rows).items():
        lines = textwrap.wrap(text, WIDTH)[:SHOWN_LINES]
        parts.append("\n".join([f"{name}:", *(f"  {line}" for line in lines)]))
    return "\n".join(parts)


def information_picture(rows: Sequence[Row]) -> Figure | None:
    """Draw where blocks' bits lie: over sigma, and over the share of masked tokens."""
    noisy = next((row for row in rows if row.get("curves")), None)
    masked = [row for row in rows if row.get("shares")]
    paints = [(_density, noisy), (_cross_entropy, noisy)] if noisy else []
    paints += [(_masked, masked)] if masked else []
    if not paints:
        return None
    figure = Figure((3.9 * len(paints), 3.6), layout="constrained")
    panels = figure.subplots(1, len(paints), squeeze=False)[0]
    for axes, (paint, drawn) in zip(panels, paints, strict=True):
        paint(axes, drawn)
        axes.grid(alpha=0.2)
    return figure


def _density(axes: Axes, row: Row) -> None:
    of_blocks = zip(row["blocks"], row["curves"], COLOURS, strict=False)
    for block, (bits, curve, colour) in enumerate(of_blocks):
        levels = np.array(curve["levels"])
        density = np.array(curve["errors"]) / levels**2 / math.log(2)
        axes.plot(levels, density, color=colour, label=f"block {block}: {bits:.2f} bits")
        axes.fill_between(levels, density, color=colour, alpha=0.2, lw=0)
    axes.set_ylim(0, 1.4 * axes.dataLim.ymax)
    axes.legend(fontsize=7, frameon=False)
    axes.set_ylabel("bits per unit of ln sigma")
    _over_sigma(axes, f"{FAMILIES[row['family']]}: a character's information")


def _cross_entropy(axes: Axes, row: Row) -> None:
    for block, (curve, colour) in enumerate(zip(row["curves"], COLOURS, strict=False)):
        bits = np.array(curve["cross_entropy"]) / math.log(2)
        axes.plot(curve["levels"], bits, color=colour, label=f"block {block}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("bits per character")
    axes.legend(fontsize=7, frameon=False)
    _over_sigma(axes, f"{FAMILIES[row['family']]}: cross-entropy")


def _over_sigma(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sigma of the noise")
    axes.set_title(title)


def _masked(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        whole = row["num_blocks"] == 1
        for block, (bits, (high, low)) in enumerate(zip(row["blocks"], row["shares"], strict=True)):
            colour = "black" if whole else COLOURS[block % len(COLOURS)]
            height, style = bits / (high - low), {"fill": False} if whole else {"alpha": 0.35}
            axes.bar(low, height, high - low, align="edge", color=None if whole else colour,
                     edgecolor=colour, ls="--" if whole else "-", **style)  # fmt: skip
            if whole:
                name = f" end to end\n {bits:.2f} bits"
                axes.text(low, height, name, ha="left", va="bottom", fontsize=8)
            else:
                middle = (low + high) / 2
                axes.text(middle, height / 2, f"{bits:.2f} bits", ha="center", fontsize=8)
    axes.set_ylim(0, 1.25 * axes.dataLim.ymax)
    axes.set_ylabel("bits per unit of share")
    axes.set_xlabel("share of masked characters")
    axes.set_title(f"{FAMILIES[rows[0]['family']]}: a block's bits")
