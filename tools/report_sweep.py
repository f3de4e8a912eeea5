"""A picture of sweeps over layers: how far each spaces the classes as the answers do."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import Section
from palette import PALETTE
from report_rows import Row

MODES = {  # of `benchmarks/isometry.py`
    "trajectory": ("answer of the last step", PALETTE[1], "-"),
    "within": ("answer of the block's own step", PALETTE[4], "--"),
}
TEXT = """r is the correlation of the distances between classes in the label token with those in the
answers. A line is the mean of the seeds, its band goes from the least of them to the most. Grey is
where 90 % lie if the classes of one side change places, at the mean over the seeds. Dotted lines
part the blocks, each of which reads the image anew. A layer without a point has one token for all
images, as the stream before the layers does."""


def sweep_section(rows: Sequence[Row]) -> Section:
    """Draw r over the layers, a panel for each arm.

    Args:
        rows:  of one setting, at least one. Each has its arm, its seed, and sweeps: by mode, what a
               `Sweep` of benchmarks/isometry.py has as a dictionary
    Raises:
        ValueError: there are no rows, a mode is unknown, or rows of an arm differ in their modes,
            layers or blocks.
    """
    if not rows:
        raise ValueError("rows of sweeps must be at least one, got none")
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    for arm, alike in arms.items():
        _check(arm, alike)
    columns = min(len(arms), 3)  # a line for each data of a study
    lines = -(-len(arms) // columns)
    figure = Figure((4 * columns, 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, (arm, alike) in zip(panels, arms.items(), strict=False):
        _panel(axes, alike)
        axes.set_title(arm, fontsize=9)
    for axes in panels[len(arms) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("r")
    names: dict[str, object] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        names |= dict(zip(labels, handles, strict=True))
    place = {"loc": "outside lower center", "ncols": len(names), "fontsize": 8, "frameon": False}
    figure.legend(list(names.values()), list(names), **place)
    seeds = sorted({len(alike) for alike in arms.values()})
    count = " or ".join(map(str, seeds)) + (" seed" if seeds == [1] else " seeds")
    text = f"{' '.join(TEXT.split())} Each panel has {count}."
    return Section("Where layers space the classes as the answers do", text, picture=figure)


def _check(arm: str, rows: Sequence[Row]) -> None:
    for row in rows:
        if not row["sweeps"] or not row["sweeps"].keys() <= MODES.keys():
            got = ", ".join(row["sweeps"]) or "none"
            raise ValueError(f"sweeps of {arm} must be of {', '.join(MODES)}, got {got}")
    shapes = {
        (mode, *(tuple(each[name]) for name in ("layers", "block")))
        for row in rows
        for mode, each in row["sweeps"].items()
    }
    count = sum(len(row["sweeps"]) for row in rows)
    if len({shape[1:] for shape in shapes}) > 1 or count != len(rows) * len(shapes):
        raise ValueError(f"rows of {arm} must have the same modes, layers and blocks, got others")


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    every = [each for row in rows for each in row["sweeps"].values()]
    layers, block = every[0]["layers"], np.array(every[0]["block"])
    places = np.arange(len(layers))
    ends = np.flatnonzero(np.diff(block)) + 1
    # where no permutation changes anything there are no distances, and r is no measurement
    low, high = (
        _known([each[name] for each in every], every) for name in ("null_low", "null_high")
    )
    null = {"color": PALETTE[-1], "alpha": 0.25, "lw": 0, "label": "classes change places"}
    axes.fill_between(places, low.mean(0), high.mean(0), **null)
    for mode, (label, colour, style) in MODES.items():
        some = [row["sweeps"][mode] for row in rows if mode in row["sweeps"]]
        if not some:
            continue
        r = _known([each["r"] for each in some], some)
        for part in np.split(places, ends):
            own = {"color": colour, "ls": style, "marker": ".", "label": label}
            axes.plot(part, r[:, part].mean(0), **own)
            band = r[:, part].min(0), r[:, part].max(0)
            axes.fill_between(part, *band, color=colour, alpha=0.15, lw=0)
    for end in ends:
        axes.axvline(end - 0.5, color="black", ls=":", lw=0.8)
    axes.axhline(0, color="black", lw=0.5)
    axes.set_xticks(places, layers)
    axes.set_ylim(top=1)
    axes.set_xlabel("layer")
    axes.grid(alpha=0.2)


def _known(values: Sequence[Sequence[float]], sweeps: Sequence[Row]) -> np.ndarray:
    """(sweeps, layers), with NaN where a sweep has no distances."""
    no_null = [np.equal(each["null_low"], each["null_high"]) for each in sweeps]
    return np.where(no_null, np.nan, values)
